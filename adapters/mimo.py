"""MiMo V2 Flash: experts, sinks, and heads of another size in layers with a window."""

from flexpatch.registry import FULL, SLIDING, Adapter, register, sliding_windows

register(
    Adapter(
        name="MiMo V2 Flash",
        masks="by_layer_type",
        windows=sliding_windows,
        # sdpa has no sinks.
        implementations=("eager",),
        tiny={
            "mimo_v2_flash": [
                dict(
                    num_experts_per_tok=2,
                    n_routed_experts=4,
                    moe_intermediate_size=32,
                    v_head_dim=12,
                    sliding_window=8,
                    layer_types=[FULL, SLIDING] * 2,
                )
            ]
        },
        limits="attn_implementation='eager' for ordinary calls; not with backend='fa4'",
    )
)
