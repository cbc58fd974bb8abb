"""StarCoder 2: one mask for all layers, windows in every layer if ``sliding_window`` is set."""

from flexpatch.registry import FULL, Adapter, register

register(
    Adapter(
        name="StarCoder 2",
        masks="single",
        windows=lambda config: {FULL: config.sliding_window},
        tiny={"starcoder2": [dict(sliding_window=None), dict(sliding_window=8)]},
    )
)
