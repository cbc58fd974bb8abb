"""Hybrids of attention and linear attention, short convolutions or recurrences."""

from flexpatch.registry import (
    CONVOLUTION,
    DELTA_RULE,
    FULL,
    SLIDING,
    Adapter,
    LogitTransform,
    no_mask,
    register,
    sliding_windows,
)
from flexpatch.tiny import LATENT

LINEAR = "linear_attention"
LAYERS = [LINEAR, LINEAR, FULL, LINEAR]
DELTA = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    layer_types=LAYERS,
)
MIXERS = "OlmoHybridGatedDeltaNet", "KimiLinearDeltaAttention", "BailingHybridDeltaAttention"
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
KIMI = dict(
    LATENT,
    qk_nope_head_dim=16,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    num_local_experts=4,
    num_hidden_layers=2,
    mlp_layer_types=["dense", "sparse"],
    layer_types=[LINEAR, FULL],  # torch's version of the rule is slow
)

register(
    Adapter(
        name="OLMo Hybrid, Kimi Linear, Bailing Hybrid",
        masks="by_layer_type",
        unmasked=(LINEAR,),
        unshared=dict.fromkeys(MIXERS, no_mask),
        branched=dict.fromkeys(MIXERS, (CONVOLUTION, DELTA_RULE)),
        restarts=False,
        since="5.16",
        tiny={
            "olmo_hybrid": [DELTA],
            "kimi_linear": [dict(KIMI, **MOE, linear_head_dim=16, linear_num_heads=4)],
            "bailing_hybrid": [dict(KIMI, **MOE, num_mtp_layers=0)],
        },
    )
)

register(
    Adapter(
        name="Lara Mini",
        masks="by_layer_type",
        windows=sliding_windows,
        unmasked=(LINEAR,),
        unshared={"LaraMiniGatedDeltaNet": no_mask},
        branched={"LaraMiniGatedDeltaNet": (CONVOLUTION, DELTA_RULE)},
        restarts=False,
        since="5.24",
        tiny={
            "lara_mini": [
                dict(
                    DELTA,
                    **MOE,
                    num_experts=4,
                    shared_expert_intermediate_size=32,
                    sliding_window=8,
                    layer_types=[LINEAR, SLIDING, LINEAR, FULL],
                )
            ]
        },
    )
)

register(
    Adapter(
        name="MiniMax 01",
        masks="by_layer_type",
        windows=lambda config: {FULL: config.sliding_window},
        unmasked=(LINEAR,),
        unshared={"MiniMaxLightningAttention": no_mask},
        restarts=False,
        since="5.16",
        tiny={
            "minimax": [
                dict(
                    num_local_experts=4, num_experts_per_tok=2, block_size=256, layer_types=LAYERS, sliding_window=None
                ),
                dict(num_local_experts=4, num_experts_per_tok=2, block_size=8, layer_types=LAYERS, sliding_window=8),
            ]
        },
    )
)

SHORT = dict(layer_types=["conv", "conv", FULL, "conv"])

register(
    Adapter(
        name="LFM2",
        masks="by_layer_type",
        unmasked=("conv",),
        unshared=dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv"), no_mask),
        branched=dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv"), (CONVOLUTION,)),
        restarts=False,
        since="5.16",
        tiny={
            "lfm2": [SHORT],
            "lfm2_moe": [dict(SHORT, **MOE, num_experts=4, num_dense_layers=1)],
        },
    )
)

register(
    Adapter(
        name="LFM3",
        masks="by_layer_type",
        windows=sliding_windows,
        unmasked=("conv",),
        unshared={"Lfm3ShortConv": no_mask},
        branched={"Lfm3ShortConv": (CONVOLUTION,)},
        ropes=frozenset({"default", "proportional"}),
        restarts=False,
        since="5.24",
        tiny={"lfm3": [dict(layer_types=["conv", SLIDING, FULL, "conv"], sliding_window=8)]},
    )
)

register(
    Adapter(
        name="RecurrentGemma",
        masks="by_layer_type",
        windows=lambda config: {SLIDING: config.attention_window_size},
        unmasked=(LINEAR,),
        unshared={"RecurrentGemmaRecurrentBlock": no_mask},
        restarts=False,
        logit_transform=lambda config: LogitTransform(softcap=config.logits_soft_cap),
        since="5.24",
        tiny={"recurrent_gemma": [dict(attention_window_size=8, lru_width=64, logits_soft_cap=5.0)]},
        limits="batches padded on the left run as they are given",
    )
)
