"""GLM-4 and GLM-4.5 (half of each head rotated) and GLM-4.7-Flash (latent attention): one mask for all layers. Later
ones that pick keys are refused."""

from flexpatch.registry import Adapter, register

MOE = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)

LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
)

register(
    Adapter(
        name="GLM-4, GLM-4.5, GLM-4.7-Flash",
        masks="single",
        tiny={
            "glm": [{}],
            "glm4": [{}],
            "glm4_moe": [MOE, dict(MOE, use_qk_norm=True)],
            "glm4_moe_lite": [dict(MOE, **LATENT)],
        },
        refused={
            "glm_moe_dsa": "its layers pick the keys that a query may see, from all tokens of a row; a mask cannot "
            "make that exact. Train it unpatched",
        },
    )
)
