"""Gemma 1 to 4. Gemma 2 caps its attention scores; from Gemma 3 on there is one rope per layer type."""

from typing import Any

from flexpatch.blocks import runs
from flexpatch.layouts import Media, Stacked, register_media
from flexpatch.pictures import draw_positioned, draw_square
from flexpatch.registry import FULL, SLIDING, Adapter, LogitTransform, register, sliding_windows

SHORT = dict(sliding_window=8, query_pre_attn_scalar=16)


def bidirectional(config: Any) -> str | None:
    """Refuse encoders, whose prompts see their answers. Gemma 4's images may look ahead among themselves."""
    value = getattr(config, "use_bidirectional_attention", None)
    if value and value != "vision":
        return f"use_bidirectional_attention={value} lets a prompt see its answer, so nothing can be shared"
    return None


register(Adapter(name="Gemma", masks="single", tiny={"gemma": [{}]}, reject=bidirectional))

register(
    Adapter(
        name="Gemma 2, VaultGemma",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        # Gemma 2 caps its attention scores. sdpa cannot, and older releases of transformers then drop the cap silently.
        implementations=("eager",),
        reject=bidirectional,
        tiny={"gemma2": [SHORT], "vaultgemma": [SHORT]},
        limits="attn_implementation='eager', whose softmax is float32, for ordinary calls",
    )
)

VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
IMAGES = dict(mm_tokens_per_image=4, image_token_index=149, boi_token_index=148, eoi_token_index=147)

register(
    Adapter(
        name="Gemma 3",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        reject=bidirectional,
        tiny={
            "gemma3_text": [
                dict(SHORT, sliding_window_pattern=2),
                dict(SHORT, sliding_window_pattern=3, final_logit_softcapping=30.0),
            ],
        },
    )
)

register_media(
    Media(
        name="Gemma 3",
        images=Stacked(),
        draw=draw_square(lambda config: config.mm_tokens_per_image),
        types="token_type_ids",
        # Each run of image tokens sees itself, also one of several images.
        blocks=lambda config, types: runs(types == 1),
        block_layers=(FULL, SLIDING),
        tiny={"gemma3": [dict(text_config=dict(SHORT, sliding_window_pattern=2), vision_config=VISION, **IMAGES)]},
    )
)

PER_LAYER = dict(SHORT, layer_types=[SLIDING, FULL] * 2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=151)
SPARSE = dict(PER_LAYER, laurel_rank=8, intermediate_size=[96] * 4, activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0])
# Full layers alone have heads of another size, and keys that serve as values.
WIDE = dict(PER_LAYER, global_head_dim=32)
SHARED = dict(WIDE, num_kv_shared_layers=2, final_logit_softcapping=30.0)
SAME = dict(WIDE, num_kv_shared_layers=0, attention_k_eq_v=True, num_global_key_value_heads=1)
LARGE = SAME | dict(hidden_size_per_layer_input=0)
EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
TOWER = dict(VISION, num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2)
PATCHES = dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)
MEDIA = dict(image_token_id=149, boi_token_id=148, eoi_token_id=147, video_token_id=146, audio_token_id=145)

register(
    Adapter(
        name="Gemma 3n (text), Gemma 4",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        ropes=frozenset({"default", "proportional"}),
        reject=bidirectional,
        tiny={
            "gemma3n_text": [dict(SPARSE, num_kv_shared_layers=2), dict(SPARSE, num_kv_shared_layers=0)],
            "gemma4_text": [SHARED, dict(LARGE, **EXPERTS)],
            "gemma4_unified_text": [SHARED, SAME],
        },
        limits="checkpointing: use_reentrant=False alone",
    )
)


# A tower of timm, each of whose blocks is as narrow as it can be.
NARROW = dict(model_args=dict(channel_multiplier=0.01, msfa_output_resolution=2), vocab_offset=141, vocab_size=9)
SOUND = dict(
    vocab_offset=150, vocab_size=1, hidden_size=16, conf_num_attention_heads=2, conf_num_hidden_layers=1,
    input_feat_size=16, sscp_conv_channel_size=(4, 4),
)  # fmt: skip
NARROW_IDS = dict(image_token_id=149, audio_token_id=150, boi_token_id=140, eoi_token_id=148)

register_media(
    Media(
        name="Gemma 3n",
        images=Stacked(),
        draw=draw_square(lambda config: config.vision_soft_tokens_per_image, side=64),
        types="token_type_ids",  # made by its processor, and ignored by its model
        text_logits=True,
        needs=("timm",),
        since="5.24",
        tiny={
            "gemma3n": [
                dict(
                    text_config=dict(SPARSE, num_kv_shared_layers=shared, vocab_size_per_layer_input=141),
                    vision_config=NARROW,
                    audio_config=SOUND,
                    vision_soft_tokens_per_image=4,
                    **NARROW_IDS,
                )
                for shared in (2, 0)
            ]
        },
    )
)


def vision_blocks(config: Any, types: Any) -> Any:
    """Number the runs of image and video tokens, which see themselves in the larger models alone."""
    seen = config.get_text_config().use_bidirectional_attention == "vision"
    return runs(((types == 1) | (types == 2)) & seen)


def pooled_tokens(config: Any, positions: Any) -> int:
    """Count the tokens of an image: its patches, which are pooled in squares, without padding."""
    return int((positions != -1).all(-1).sum()) // config.vision_config.pooling_kernel_size**2


def patches(config: Any, positions: Any) -> int:
    """Count the patches of an image without padding."""
    return int((positions != -1).all(-1).sum())


POSITIONS: dict[str, Any] = dict(names=("pixel_values", "image_position_ids"), sizes=("image_position_ids",))

register_media(
    Media(
        name="Gemma 4",
        images=Stacked(**POSITIONS, tokens=pooled_tokens),
        draw=draw_positioned(lambda config: config.vision_config.pooling_kernel_size),
        types="mm_token_type_ids",
        blocks=vision_blocks,
        text_logits=True,
        rounds_late=True,
        block_layers=(SLIDING,),
        tiny={
            "gemma4": [
                dict(text_config=SHARED, vision_config=TOWER, audio_config=None, **MEDIA),
                dict(text_config=dict(LARGE, use_bidirectional_attention="vision"), vision_config=TOWER, **MEDIA),
            ]
        },
    )
)

register_media(
    Media(
        name="Gemma 4, of one model for all",
        images=Stacked(**POSITIONS, tokens=patches),
        draw=draw_positioned(lambda config: 1),
        types="mm_token_type_ids",
        blocks=vision_blocks,
        text_logits=True,
        block_layers=(FULL, SLIDING),
        beyond_windows=True,
        limits="images of more tokens than a window, where they see themselves, run as they are given",
        tiny={
            "gemma4_unified": [
                dict(text_config=SHARED, vision_config=PATCHES, audio_config=None, **MEDIA),
                dict(text_config=dict(SAME, use_bidirectional_attention="vision"), vision_config=PATCHES, **MEDIA),
            ]
        },
    )
)
