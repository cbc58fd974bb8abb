"""AFMoE (Arcee's Trinity): windows with rope in three layers of four, full attention without rope in the fourth."""

from flexpatch.registry import Adapter, register, sliding_windows

register(
    Adapter(
        name="AFMoE (Trinity)",
        masks="by_layer_type",
        windows=sliding_windows,
        restarts=False,
        tiny={
            "afmoe": [
                dict(sliding_window=8, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
                | dict(moe_intermediate_size=32, mup_enabled=True, global_attn_every_n_layers=2)
            ]
        },
    )
)
