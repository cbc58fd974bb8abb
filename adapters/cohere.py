"""Cohere: Command R (one mask for all layers), Command R7B and Command A (rope and windows in three layers of four)."""

from flexpatch.registry import FULL, SLIDING, Adapter, LogitTransform, register, sliding_windows

register(
    Adapter(
        name="Cohere",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale),
        tiny={"cohere": [dict(logit_scale=0.5), dict(logit_scale=0.5, use_qk_norm=True)]},
    )
)

register(
    Adapter(
        name="Cohere 2, dense and mixture of experts",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale),
        tiny={
            "cohere2": [dict(sliding_window=8, logit_scale=0.5)],
            "cohere2_moe": [
                dict(sliding_window=8, logit_scale=0.5, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
            ],
        },
    )
)

# Layers that see the whole past have no rope, as in North Micro Vision.
COMPASS = dict(
    sliding_window=8,
    logit_scale=0.5,
    layer_types=[SLIDING, FULL] * 2,
    rope_parameters={SLIDING: dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]), FULL: None},
)

register(
    Adapter(
        name="Cohere Compass (text)",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale or 1.0),
        tiny={"cohere_compass_text": [COMPASS]},
    )
)
