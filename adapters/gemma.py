"""Gemma 1, 2 and 3 (text). Gemma 2 caps its attention scores; Gemma 3 has one rope per layer type."""

from typing import Any

from flexpatch.registry import FULL, SLIDING, Adapter, Head, register

SHORT = dict(sliding_window=8, query_pre_attn_scalar=16)


def bidirectional(config: Any) -> str | None:
    """An encoder looks ahead, so no token's state can be shared between answers."""
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention=True lets a prompt see its answer, so nothing can be shared"
    return None


register(Adapter(name="Gemma", masks="single", tiny={"gemma": [{}]}, reject=bidirectional))

register(
    Adapter(
        name="Gemma 2",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        head=lambda config: Head(softcap=config.final_logit_softcapping),
        # Gemma 2 caps its attention scores; sdpa cannot, and older releases of transformers dropped the cap in silence.
        implementations=("eager",),
        reject=bidirectional,
        tiny={"gemma2": [SHORT]},
        limits="attn_implementation='eager', whose softmax is float32, for ordinary calls",
    )
)

register(
    Adapter(
        name="Gemma 3 (text)",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        head=lambda config: Head(softcap=config.final_logit_softcapping),
        reject=bidirectional,
        tiny={
            "gemma3_text": [
                dict(SHORT, sliding_window_pattern=2),
                dict(SHORT, sliding_window_pattern=3, final_logit_softcapping=30.0),
            ],
        },
    )
)
