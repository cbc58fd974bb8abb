"""LLaVA, SmolVLM, Idefics 3 and Mistral 3: a tower and a projector before a text model of another family."""

from typing import Any

from flexpatch.layouts import Media, Nested, Stacked, register_media
from flexpatch.pictures import draw_sized, draw_square

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


register_media(
    Media(
        name="LLaVA",
        images=Stacked(names=("pixel_values", "image_sizes")),
        draw=draw_square(lambda config: config.image_seq_length),
        tiny={
            "llava": [
                dict(
                    text_config=LLAMA,
                    vision_config=dict(SIGLIP, model_type="clip_vision_model"),
                    image_token_index=149,
                    image_seq_length=4,
                )
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
