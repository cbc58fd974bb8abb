"""Qwen2-VL to Qwen3-VL and GLM-4V: their images are grids of patches, and rope has three axes."""

from dataclasses import replace
from typing import Any

from flexpatch.layouts import Grid, Media, register_media, videos_like
from flexpatch.pictures import draw_grid
from flexpatch.registry import FULL, SLIDING, Adapter, register

IDS = dict(image_token_id=149, video_token_id=146, vision_start_token_id=148, vision_end_token_id=147)
TOWER = dict(hidden_size=32, num_heads=2, depth=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
OUT = dict(TOWER, out_hidden_size=64, intermediate_size=48)


def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Return the settings of a rope whose frequencies are shared out among three axes."""
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=sections, **others))


QWEN2 = dict(text_config=rope(2, 3, 3), vision_config=dict(TOWER, embed_dim=32, hidden_size=64, mlp_ratio=2), **IDS)
WINDOWED = dict(OUT, depth=4, window_size=16, fullatt_block_indexes=[1, 3])
QWEN2_5 = dict(text_config=rope(2, 3, 3), vision_config=WINDOWED, **IDS)
DEEP = dict(OUT, depth=4, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])
QWEN3 = dict(text_config=rope(4, 2, 2, mrope_interleaved=True), vision_config=DEEP, **IDS)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
QWEN3_MOE = dict(QWEN3, text_config=EXPERTS | rope(4, 2, 2, mrope_interleaved=True))
GLM_IDS = dict(image_token_id=149, video_token_id=146, image_start_token_id=148, image_end_token_id=147)
GLM = dict(
    text_config=rope(2, 3, 3, partial_rotary_factor=1.0), vision_config=dict(OUT, image_size=32),
    video_start_token_id=145, video_end_token_id=144, **GLM_IDS,
)  # fmt: skip

register(
    Adapter(
        name="Qwen2-VL, Qwen2.5-VL (text)",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window or None},
        restarts=False,
        tiny={
            "qwen2_vl_text": [dict(QWEN2, model_type="qwen2_vl")],
            "qwen2_5_vl_text": [dict(QWEN2_5, model_type="qwen2_5_vl")],
        },
    )
)

register(
    Adapter(
        name="Qwen3-VL (text)",
        masks="single",
        tiny={
            "qwen3_vl_text": [dict(QWEN3, model_type="qwen3_vl")],
            "qwen3_vl_moe_text": [dict(QWEN3_MOE, model_type="qwen3_vl_moe")],
        },
    )
)

register(
    Adapter(
        name="GLM-4V (text)",
        masks="single",
        restarts=False,
        tiny={"glm4v_text": [dict(GLM, model_type="glm4v")]},
    )
)

register_media(
    Media(
        name="Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        images=Grid(),
        videos=videos_like(Grid()),
        draw=draw_grid(),
        types="mm_token_type_ids",
        three_axes=True,
        passed=frozenset({"second_per_grid_ts"}),
        tiny={
            "qwen2_vl": [QWEN2],
            "qwen2_5_vl": [QWEN2_5],
            "qwen3_vl": [QWEN3],
            "qwen3_vl_moe": [QWEN3_MOE],
        },
    )
)

register_media(
    Media(
        name="GLM-4V",
        images=Grid(),
        # Frames of its videos fill placeholders of images, between other tokens.
        videos=replace(videos_like(Grid()), token="image_token_id"),
        draw=draw_grid(),
        types="mm_token_type_ids",
        three_axes=True,
        limits="rows of your own take no videos, whose placeholders are those of images",
        tiny={"glm4v": [GLM]},
    )
)
