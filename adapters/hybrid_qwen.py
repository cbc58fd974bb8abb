"""Qwen3-Next, Qwen3.5 and Qwen4-Exp, dense and mixture of experts: gated delta rule and full attention by turns."""

from flexpatch.layouts import Grid, Media, register_media, videos_like
from flexpatch.pictures import draw_grid
from flexpatch.registry import CONVOLUTION, DELTA_RULE, FULL, Adapter, causal, no_mask, register

LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "linear_attention", FULL, "linear_attention"],
)
MOE = dict(LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    depth=1,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=16,
)
MEDIA = dict(vision_config=VISION, image_token_id=149, video_token_id=148, vision_start_token_id=147)
MEDIA |= dict(vision_end_token_id=146)
MIXERS = "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"

register(
    Adapter(
        name="Qwen3-Next, Qwen3.5",
        masks="by_layer_type",
        unmasked=("linear_attention",),
        unshared=dict.fromkeys(MIXERS, no_mask),
        branched=dict.fromkeys(MIXERS, (CONVOLUTION, DELTA_RULE)),
        restarts=False,
        since="5.16",
        tiny={
            "qwen3_next": [MOE],
            "qwen3_5_text": [LINEAR],
            "qwen3_5_moe_text": [MOE],
        },
    )
)

register_media(
    Media(
        name="Qwen3.5",
        images=Grid(),
        videos=videos_like(Grid()),
        draw=draw_grid(),
        types="mm_token_type_ids",
        three_axes=True,
        tiny={
            "qwen3_5": [dict(text_config=LINEAR, **MEDIA)],
            "qwen3_5_moe": [dict(text_config=MOE, **MEDIA)],
        },
    )
)

EXP = MOE | dict(
    layer_types=["linear_attention", "linear_attention", "indexed_attention", "linear_attention"],
    linear_value_head_dim=16,
    hc_count=2,
    hc_lowrank=8,
    ple_layer_ids=[1, 4],
    ple_embed_dim=32,
    ngram_size=3,
    heads_per_ngram=2,
    ngram_vocab_size_base=200,
    make_ngram_vocab_size_divisible_by=8,
    split_ngram_parts=1,
    indexer_n_heads=16,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=6,
    indexer_compress_ratio=2,
)

register(
    Adapter(
        name="Qwen4-Exp",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=("linear_attention", "indexed_attention"),
        unshared={
            "Qwen4ExpTextGatedDeltaNet": no_mask,
            "Qwen4ExpTextAttention": causal,
            "Qwen4ExpTextPLELayer": no_mask,
        },
        branched={"Qwen4ExpTextGatedDeltaNet": (CONVOLUTION, DELTA_RULE)},
        restarts=False,
        since="5.24",
        tiny={"qwen4_exp_text": [EXP], "qwen4_exp": [dict(text_config=EXP, **MEDIA)]},
        limits="multimodal class: calls with images run as they are given",
    )
)
