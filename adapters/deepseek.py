"""DeepSeek V2 and V3 (latent attention, experts), GLM-4.7-Flash, and models with their code, such as Moonlight.

Later models, whose layers choose keys: adapters/indexed.py.
"""

from flexpatch.registry import Adapter, register

TINY = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
)
TINY |= dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1)
TINY |= dict(moe_intermediate_size=32, first_k_dense_replace=1)

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
