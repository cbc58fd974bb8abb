"""LLaVA and others that put a tower and a projector before a text model of another family."""

import math
from collections.abc import Mapping
from typing import Any

from flexpatch.layouts import Drawn, Media, Nested, Stacked, register_media
from flexpatch.pictures import draw_sized, draw_square, draw_tiled
from flexpatch.registry import FULL, SLIDING

SIGLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
LLAMA = dict(model_type="llama")
IDEFICS = dict(text_config=LLAMA, scale_factor=2, image_token_id=149)


def mistral_side(config: Any) -> int:
    """Return the pixels along a side of what one token of Mistral 3 stands for."""
    return int(config.vision_config.patch_size * config.spatial_merge_size)


def mistral_tokens(config: Any, size: Any) -> int:
    """Count the tokens of an image of Mistral 3, of (height, width) pixels."""
    height, width = (int(side) // mistral_side(config) for side in size)
    return height * width


def pixtral_tokens(config: Any, size: Any) -> int:
    """Count the tokens of an image of LLaVA with Pixtral's tower, of (height, width) pixels."""
    height, width = (int(side) // int(config.vision_config.patch_size) for side in size)
    return height * width


def draw_llava(config: Any, number: int, generator: Any) -> Drawn:
    """Draw an image of the one size that LLaVA's tower takes, or of several if it takes them."""
    if config.vision_config.model_type == "pixtral":
        return draw_sized(lambda config: int(config.vision_config.patch_size))(config, number, generator)
    return draw_square(lambda config: int(config.image_seq_length))(config, number, generator)


def best_resolution(config: Any, height: int, width: int) -> tuple[int, int]:
    """Choose the resolution at which LLaVA-Next cuts an image of some size into tiles: the most used, least wasted."""
    fits: list[tuple[int, int, int, tuple[int, int]]] = []
    for tall, wide in config.image_grid_pinpoints:
        scale = min(wide / width, tall / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        fits.append((used, used - tall * wide, -len(fits), (tall, wide)))
    return max(fits)[-1]


def unpadded(config: Any, size: Any) -> tuple[int, int]:
    """Return the patches (down, across) of a tiled image that are no padding of LLaVA-Next."""
    height, width = (int(side) for side in size)
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    down, across = (pixels // side * patches for pixels in best_resolution(config, height, width))
    if width / height > across / down:
        down -= 2 * ((down - int(round(height * (across / width), 7))) // 2)
    else:
        across -= 2 * ((across - int(round(width * (down / height), 7))) // 2)
    return down, across


def tile_tokens(config: Any) -> int:
    """Count the patches of one tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def next_tokens(config: Any, size: Any) -> int:
    """Count the tokens of an image of LLaVA-Next: the whole, and its tiles with a token at the end of each line."""
    down, across = unpadded(config, size)
    return tile_tokens(config) + down * (across + 1)


def onevision_tokens(config: Any, size: Any) -> int:
    """Count the tokens of an image of LLaVA-OneVision, which shrinks what would be too many."""
    down, across = unpadded(config, size)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * tile_tokens(config)
    ratio = math.sqrt(down * across / most)
    if ratio > 1.1:
        down, across = int(down // ratio), int(across // ratio)
    return tile_tokens(config) + down * (across + 1)


def several(call: Mapping[str, Any]) -> str | None:
    """Refuse prompts of several LLaVA-OneVision images: how they are tiled depends on the others of their prompt."""
    counts = call.get("batch_num_images")
    if counts is not None and any(count > 1 for count in counts.tolist()):
        return "several images in a prompt, which this model does not cut into tiles"
    return None


def tiles(config: Any, size: Any) -> int:
    """Count the tiles of an image of LLaVA-Next, and the whole image."""
    side = config.vision_config.image_size
    tall, wide = best_resolution(config, *size)
    return 1 + (tall // side) * (wide // side)


register_media(
    Media(
        name="LLaVA",
        # Pixtral's tower alone takes images of several sizes, and is told them.
        images=Stacked(names=("pixel_values", "image_sizes"), sizes=("image_sizes",), tokens=pixtral_tokens, even=True),
        draw=draw_llava,
        tiny={
            "llava": [
                dict(
                    text_config=LLAMA,
                    vision_config=dict(SIGLIP, model_type="clip_vision_model"),
                    image_token_index=149,
                    image_seq_length=4,
                ),
                dict(
                    text_config=dict(model_type="mistral", sliding_window=None),
                    vision_config=dict(SIGLIP, model_type="pixtral", image_size=64, patch_size=4, head_dim=16),
                    image_token_index=149,
                    vision_feature_layer=-1,
                    vision_feature_select_strategy="full",
                ),
            ]
        },
    )
)

register_media(
    Media(
        name="SmolVLM, Idefics 3",
        images=Nested(names=("pixel_values", "pixel_attention_mask")),
        draw=draw_square(
            lambda config: (
                (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
            )
        ),
        tiny={
            "smolvlm": [dict(IDEFICS, vision_config=dict(SIGLIP, patch_size=7, model_type="smolvlm_vision"))],
            "idefics3": [dict(IDEFICS, vision_config=dict(SIGLIP, patch_size=7, model_type="idefics3_vision"))],
        },
    )
)

register_media(
    Media(
        name="Mistral 3",
        images=Stacked(names=("pixel_values", "image_sizes"), sizes=("image_sizes",), tokens=mistral_tokens),
        draw=draw_sized(mistral_side),
        tiny={
            "mistral3": [
                dict(
                    text_config=dict(model_type="mistral", sliding_window=None),
                    vision_config=dict(SIGLIP, model_type="pixtral", image_size=64, patch_size=4, head_dim=16),
                    image_token_index=149,
                    spatial_merge_size=2,
                )
            ]
        },
    )
)


def one_mask(config: Any) -> str | None:
    """Refuse PaliGemma 2, which makes a mask for each layer type itself, whatever it is given."""
    if config.get_text_config().model_type == "gemma":
        return None
    return "PaliGemma 2 takes no masks by layer type. Train it unpatched"


def prompt_types(call: Mapping[str, Any]) -> str | None:
    """Refuse calls of PaliGemma that do not tell prompts from answers."""
    return "no token_type_ids, which tell prompts from answers" if call.get("token_type_ids") is None else None


register_media(
    Media(
        name="PaliGemma",
        images=Stacked(),
        draw=draw_square(tile_tokens),
        types="token_type_ids",
        # A prompt is one block, and padding of its type sees it.
        blocks=lambda config, types: (types == 0) - 1,
        text_blocks=True,
        first_position=1,
        text_logits=True,
        block_layers=(FULL, SLIDING),
        beyond_windows=True,
        reject=prompt_types,
        unfit=one_mask,
        limits="padding in front of a prompt sees nothing, unpatched all of the prompt: no answer is read there",
        tiny={
            "paligemma": [
                dict(
                    text_config=dict(model_type="gemma"),
                    vision_config=dict(SIGLIP, projection_dim=64),
                    projection_dim=64,
                    image_token_index=149,
                )
            ]
        },
    )
)

CLIP = dict(SIGLIP, model_type="clip_vision_model")
PINPOINTS = [[28, 56], [56, 28], [56, 56]]

register_media(
    Media(
        name="LLaVA-Next",
        images=Stacked(names=("pixel_values", "image_sizes"), sizes=("image_sizes",), tokens=next_tokens),
        draw=draw_tiled(tiles, next_tokens),
        tiny={
            "llava_next": [
                dict(text_config=LLAMA, vision_config=CLIP, image_token_index=149, image_grid_pinpoints=PINPOINTS)
            ]
        },
    )
)

register_media(
    Media(
        name="LLaVA-OneVision",
        images=Stacked(names=("pixel_values", "image_sizes"), sizes=("image_sizes",), tokens=onevision_tokens),
        draw=draw_tiled(tiles, onevision_tokens),
        passed=frozenset({"batch_num_images"}),
        reject=several,
        limits="prompts of several images run as they are given",
        tiny={
            "llava_onevision": [
                dict(
                    text_config=dict(model_type="qwen2"),
                    vision_config=dict(SIGLIP, model_type="siglip_vision_model"),
                    image_token_index=149,
                    video_token_index=146,
                    image_grid_pinpoints=PINPOINTS,
                    vision_aspect_ratio=ratio,
                )
                for ratio in ("anyres_max_9", "anyres_max_2")
            ]
        },
    )
)


def shuffled(config: Any) -> int:
    """Count the tokens of a tile of Aya Vision and Cohere 2 Vision."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // config.downsample_factor) ** 2


COHERE = dict(
    text_config=dict(model_type="cohere2", sliding_window=8, sliding_window_pattern=2),
    vision_config=dict(SIGLIP, patch_size=7, model_type="siglip_vision_model"),
)

register_media(
    Media(
        name="InternVL",
        images=Stacked(),
        draw=draw_square(lambda config: config.image_seq_length, tiles=(1, 2, 3)),
        tiny={
            "internvl": [
                dict(
                    text_config=dict(model_type="qwen2"),
                    vision_config=dict(SIGLIP, image_size=[28, 28], patch_size=[7, 7]),
                    image_token_id=149,
                    image_seq_length=4,
                    downsample_ratio=0.5,
                )
            ]
        },
    )
)

register_media(
    Media(
        name="Aya Vision, Cohere 2 Vision",
        images=Stacked(),
        draw=draw_square(shuffled, tiles=(1, 2, 3)),
        tiny={
            "aya_vision": [dict(COHERE, image_token_index=149)],
            "cohere2_vision": [dict(COHERE, image_token_id=149, alignment_intermediate_size=64)],
        },
    )
)
