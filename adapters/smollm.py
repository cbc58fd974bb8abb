"""SmolLM3: every fourth layer has no rope. (SmolLM and SmolLM2 are Llamas.)"""

from flexpatch.registry import Adapter, register, sliding_windows

NOPE = dict(no_rope_layer_interval=2)

register(
    Adapter(
        name="SmolLM3",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"smollm3": [NOPE, dict(NOPE, use_sliding_window=True, sliding_window=8)]},
    )
)
