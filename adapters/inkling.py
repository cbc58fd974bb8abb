"""Inkling 1 and 2: attention with relative positions, and short convolutions around its blocks."""

from typing import Any

from flexpatch.registry import FULL, SLIDING, Adapter, LogitTransform, Visible, causal, no_mask, register

SHARED = dict(
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=16,
    sliding_window_size=8,
    d_rel=8,
    rel_extent=16,
    log_scaling_n_floor=4,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
TINY = dict(
    SHARED,
    layer_types=["hybrid", "hybrid_sliding"] * 2,
    n_shared_experts=1,
    mlp_layer_types=["dense", "sparse"] * 2,
    logits_mup_width_multiplier=1.0,
)


def visible(module: Any) -> Visible:
    """Layers of one type have a window."""
    return Visible(window=module.sliding_window if module.is_sliding else None)


register(
    Adapter(
        name="Inkling (text)",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(FULL, SLIDING, "linear_attention", "hybrid", "hybrid_sliding"),
        unshared={"InklingAttention": visible, "InklingShortConvolution": no_mask},
        restarts=False,
        begins="column",
        since="5.16",
        tiny={"inkling_text": [TINY]},
        limits="batches padded on the left run as they are given",
    )
)

TINY2 = dict(
    SHARED, unpadded_vocab_size=151, layer_types=["hybrid_sliding", "hybrid"] * 2, n_layers_per_attn_res_block=1
)
LOOP = dict(TINY2, loop_layer_index_start=1, loop_layer_index_end=3, loop_num_passes=2, loop_gate_rank=8)
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4, posemb_grid_size=4)
MEDIA = dict(vision_config=dict(VISION, projection_hidden_dim=32, text_hidden_size=64), image_token_id=149)


def mixers(prefix: str) -> dict[str, Any]:
    """Name the mixers of one of the two models; a dynamic convolution is within attention."""
    sliding = {f"{prefix}SlidingAttention": visible, f"{prefix}FullAttention": causal}
    return sliding | {f"{prefix}ShortConvolution": no_mask}


register(
    Adapter(
        name="Inkling 2",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(FULL, SLIDING, "linear_attention", "hybrid", "hybrid_sliding"),
        unshared=mixers("Inkling2") | mixers("Inkling2Loop"),
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping, wide=True),
        implementations=("eager",),
        restarts=False,
        begins="column",
        since="5.24",
        tiny={
            "inkling2_text": [TINY2],
            "inkling2_loop_text": [LOOP],
            "inkling2": [dict(text_config=TINY2, **MEDIA)],
            "inkling2_loop": [dict(text_config=LOOP, **MEDIA)],
        },
        limits="attn_implementation='eager' for ordinary calls; batches padded on the left, and calls with images, run "
        "as they are given",
    )
)
