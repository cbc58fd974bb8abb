"""Inkling: attention with relative positions, and short convolutions around its blocks."""

from typing import Any

from flexpatch.registry import FULL, SLIDING, Adapter, Visible, no_mask, register

TINY = dict(
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=16,
    sliding_window_size=8,
    d_rel=8,
    rel_extent=16,
    log_scaling_n_floor=4,
    layer_types=["hybrid", "hybrid_sliding"] * 2,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
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
