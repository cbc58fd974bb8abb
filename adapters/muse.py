"""Muse Glimmer: windows in three of four layers, logits scaled and capped, and images in grids of patches."""

from typing import Any

from flexpatch.layouts import Grid, Media, register_media, videos_like
from flexpatch.pictures import draw_grid
from flexpatch.registry import Adapter, LogitTransform, register, sliding_windows

TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, patch_size=4)
TOWER |= dict(pos_emb_height=4, pos_emb_width=4)
GLIMMER = dict(
    text_config=dict(sliding_window=8, final_logit_softcapping=20.0),
    vision_config=TOWER,
    out_hidden_size=128,
    projector_hidden_size=48,
    image_token_id=149,
    video_token_id=146,
)


def patch(config: Any) -> tuple[int, ...]:
    """Return the shape of a patch."""
    return (3 * config.vision_config.patch_temporal * config.vision_config.patch_size**2,)


def merge(config: Any) -> int:
    """Return how many patches along each side make a token."""
    return int(config.vision_config.merge_size)


GRID = Grid(merged=lambda config: merge(config) ** 2)

register(
    Adapter(
        name="Muse Glimmer (text)",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(config.output_multiplier, config.final_logit_softcapping),
        tiny={"muse_glimmer_text": [dict(GLIMMER, model_type="muse_glimmer")]},
    )
)

register_media(
    Media(
        name="Muse Glimmer",
        images=GRID,
        videos=videos_like(GRID),
        draw=draw_grid(patch, merge),
        text_logits=True,
        tiny={"muse_glimmer": [GLIMMER]},
    )
)
