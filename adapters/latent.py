"""Latent attention without an indexer: MiniCPM 3, Youtu, LongCat Flash, A.X K1. (DeepSeek: adapters/deepseek.py.)"""

from flexpatch.registry import Adapter, LogitTransform, register
from flexpatch.tiny import EXPERTS, LATENT

DENSE = dict(LATENT, qk_nope_head_dim=8, head_dim=8)
ROUTED = dict(DENSE, **EXPERTS, first_k_dense_replace=1)
ZERO_EXPERTS = dict(DENSE, n_routed_experts=4, zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=32)
ZERO_EXPERTS |= dict(ffn_hidden_size=96, num_layers=2)

register(
    Adapter(
        name="Youtu, LongCat Flash, A.X K1",
        masks="single",
        tiny={"youtu": [DENSE], "longcat_flash": [ZERO_EXPERTS], "axk1": [ROUTED]},
    )
)

register(
    Adapter(
        name="MiniCPM 3",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=config.dim_model_base / config.hidden_size),
        tiny={"minicpm3": [dict(DENSE, scale_emb=3.0, scale_depth=1.4, dim_model_base=32)]},
    )
)
