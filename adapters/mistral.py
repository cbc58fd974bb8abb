"""Mistral, Mixtral and Ministral: windows in every layer if ``sliding_window`` is set."""

from flexpatch.registry import FULL, SLIDING, Adapter, register, sliding_windows

MOE = dict(num_local_experts=4, num_experts_per_tok=2)

register(
    Adapter(
        name="Mistral, Ministral 3",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window},
        tiny={
            "mistral": [dict(sliding_window=None), dict(sliding_window=8)],
            "mixtral": [dict(MOE, sliding_window=None), dict(MOE, sliding_window=8)],
            # Ministral 3 has a yarn rope, and queries scaled by their positions.
            "ministral3": [{}, dict(sliding_window=8)],
        },
    )
)

register(
    Adapter(
        name="Ministral",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"ministral": [dict(sliding_window=8), dict(sliding_window=8, layer_types=[SLIDING, FULL] * 2)]},
    )
)
