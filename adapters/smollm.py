"""SmolLM3: every fourth layer has no rope. (SmolLM and SmolLM2 are Llamas.)"""

from flexpatch.registry import FULL, SLIDING, Adapter, register

NOPE = dict(no_rope_layer_interval=2)

register(
    Adapter(
        name="SmolLM3",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        tiny={"smollm3": [NOPE, dict(NOPE, use_sliding_window=True, sliding_window=8)]},
    )
)
