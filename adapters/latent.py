"""Latent attention without an indexer: MiniCPM 3, Youtu, LongCat Flash, A.X K1. (DeepSeek: adapters/deepseek.py.)"""

from flexpatch.registry import Adapter, LogitTransform, register

LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
)
EXPERTS = dict(LATENT, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1)
EXPERTS |= dict(moe_intermediate_size=32, first_k_dense_replace=1)
ZERO_EXPERTS = dict(LATENT, n_routed_experts=4, zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=32)
ZERO_EXPERTS |= dict(ffn_hidden_size=96, num_layers=2)

register(
    Adapter(
        name="Youtu, LongCat Flash, A.X K1",
        masks="single",
        tiny={"youtu": [LATENT], "longcat_flash": [ZERO_EXPERTS], "axk1": [EXPERTS]},
    )
)

register(
    Adapter(
        name="MiniCPM 3",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=config.dim_model_base / config.hidden_size),
        tiny={"minicpm3": [dict(LATENT, scale_emb=3.0, scale_depth=1.4, dim_model_base=32)]},
    )
)
