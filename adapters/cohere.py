"""Cohere: Command R (one mask for all layers), Command R7B and Command A (rope and windows in three layers of four)."""

from typing import Any

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
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, depth=1, num_heads=2, patch_size=4, out_hidden_size=64
)
VISION |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
MEDIA: dict[str, Any] = dict(vision_config=VISION, image_token_id=149, video_token_id=148, vision_start_token_id=147)
MEDIA |= dict(vision_end_token_id=146)

register(
    Adapter(
        name="Cohere Compass",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale or 1.0),
        since="5.24",
        tiny={"cohere_compass_text": [COMPASS], "cohere_compass": [dict(text_config=COMPASS, **MEDIA)]},
        limits="multimodal class: calls with images run as they are given",
    )
)
