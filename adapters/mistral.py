"""Mistral and Mixtral: one mask for all layers, windowed in every layer when ``sliding_window`` is set."""

from flexpatch.registry import FULL, Adapter, register

MOE = dict(num_local_experts=4, num_experts_per_tok=2)

register(
    Adapter(
        name="Mistral",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window},
        tiny={
            "mistral": [dict(sliding_window=None), dict(sliding_window=8)],
            "mixtral": [dict(MOE, sliding_window=None), dict(MOE, sliding_window=8)],
        },
        limits="Mixtral: no router auxiliary loss",
    )
)
