"""Hunyuan dense and mixture of experts, Hy3 and Hy4. Queries and keys of the first ones are scaled behind rope.

Hy4's layers choose keys.
"""

from flexpatch.registry import Adapter, causal, register

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

register(
    Adapter(
        name="Hunyuan",
        masks="single",
        begins="position",
        since="5.24",
        tiny={
            "hunyuan_v1_dense": [{}],
            "hunyuan_v1_moe": [dict(num_experts=4, moe_topk=2, moe_intermediate_size=32)],
        },
        limits="batches padded on the left fold if they have position_ids",
    )
)

register(
    Adapter(name="Hy3", masks="single", tiny={"hy_v3": [dict(MOE, num_shared_experts=1, first_k_dense_replace=1)]})
)

CHOICE = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    index_topk=6,
    index_n_heads=16,
    index_head_dim=16,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    indexer_types=["full", "shared", "full", "shared"],
    hc_mult=2,
)

register(
    Adapter(
        name="Hy4",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=("indexed_attention",),
        unshared={"HYV4Attention": causal},
        # sdpa has no sinks.
        implementations=("eager",),
        since="5.24",
        tiny={"hy_v4": [CHOICE]},
        limits="attn_implementation='eager' for ordinary calls",
    )
)
