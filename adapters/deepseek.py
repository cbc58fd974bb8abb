"""DeepSeek V2 and V3 (latent attention, experts), GLM-4.7-Flash, and models with their code, such as Moonlight.

Later models, whose layers choose keys: adapters/indexed.py.
"""

from flexpatch.registry import Adapter, register
from flexpatch.tiny import EXPERTS, LATENT

TINY = dict(LATENT, **EXPERTS, qk_nope_head_dim=8, head_dim=8, first_k_dense_replace=1)

register(
    Adapter(
        name="DeepSeek V2, V3, GLM-4.7-Flash, Sarvam",
        masks="single",
        tiny={
            "deepseek_v2": [TINY],
            "deepseek_v3": [TINY, dict(TINY, q_lora_rank=None, v_head_dim=24)],
            "glm4_moe_lite": [TINY],
            "sarvam_mla": [TINY],
        },
    )
)
