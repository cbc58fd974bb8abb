"""Cohere Command R (one mask) and Command R7B, Command A (rope and windows on three of four layers)."""

from flexpatch.registry import FULL, SLIDING, Adapter, Head, register

register(
    Adapter(
        name="Cohere",
        masks="single",
        head=lambda config: Head(scale=config.logit_scale),
        tiny={"cohere": [dict(logit_scale=0.5), dict(logit_scale=0.5, use_qk_norm=True)]},
    )
)

register(
    Adapter(
        name="Cohere 2",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        head=lambda config: Head(scale=config.logit_scale),
        tiny={"cohere2": [dict(sliding_window=8, logit_scale=0.5)]},
    )
)
