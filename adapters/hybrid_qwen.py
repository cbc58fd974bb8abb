"""Qwen3-Next and Qwen3.5, dense and mixture of experts: gated delta rule and full attention by turns."""

from flexpatch.registry import CONVOLUTION, DELTA_RULE, FULL, Adapter, no_mask, register

LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "linear_attention", FULL, "linear_attention"],
)
MOE = dict(LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
MIXERS = "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"

register(
    Adapter(
        name="Qwen3-Next, Qwen3.5",
        masks="by_layer_type",
        unmasked=("linear_attention",),
        unshared=dict.fromkeys(MIXERS, no_mask),
        branched=dict.fromkeys(MIXERS, (CONVOLUTION, DELTA_RULE)),
        tiny={"qwen3_next": [MOE], "qwen3_5_text": [LINEAR], "qwen3_5_moe_text": [MOE]},
    )
)
