"""Code World Model (Meta): windows in three layers of four."""

from flexpatch.registry import Adapter, register, sliding_windows

register(
    Adapter(
        name="Code World Model",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"cwm": [dict(sliding_window=8)]},
    )
)
