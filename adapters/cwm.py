"""Code World Model (Meta): windows in three layers of four."""

from flexpatch.registry import FULL, SLIDING, Adapter, register

register(
    Adapter(
        name="Code World Model",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        tiny={"cwm": [dict(sliding_window=8)]},
    )
)
