"""EXAONE 4, dense and mixture of experts: windows with rope, full attention without rope, or full attention alone."""

from flexpatch.registry import FULL, Adapter, register, sliding_windows

SHORT = dict(sliding_window=8, sliding_window_pattern=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=32)

register(
    Adapter(
        name="EXAONE 4",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={
            "exaone4": [SHORT, dict(sliding_window=None, layer_types=[FULL] * 4)],
            "exaone_moe": [dict(SHORT, **MOE)],
        },
    )
)
