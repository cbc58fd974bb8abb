"""Whole hybrids on flash-linear-attention's kernels, which know 16 bits alone: branched and on separate sequences.

The truth is torch's own function in float64. Random models as large as the other tests' forget their states at once and
are all noise in 16 bits; these are wider and forget slowly, so that every control, that of the gradient of a parent's
state too, is far above the noise.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexpatch.models import tiny_config
from flexpatch.parity import check_parity

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

WIDE = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=64, linear_value_head_dim=64)
# Turns within a few tokens, so that wrong positions tell.
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10.0, partial_rotary_factor=1.0))
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA | ROPE,
    "qwen3_next": DELTA | ROPE,
    "qwen3_5_moe_text": DELTA | ROPE,
    "olmo_hybrid": DELTA | dict(linear_num_key_heads=4),
    "lara_mini": DELTA,
    "kimi_linear": dict(linear_head_dim=64, linear_num_heads=4, num_key_value_heads=4),
    "bailing_hybrid": ROPE | dict(linear_head_dim=64, head_dim=8, num_key_value_heads=4, kda_lower_bound=-0.02),
}


def slowly_forgetting(model_type: str) -> PreTrainedModel:
    """Make a random model in bfloat16 whose states live long."""
    settings = tiny_config(model_type).to_dict() | WIDE | MODELS[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-5.0)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.fill_(1.0)  # sharp attention, so that wrong positions tell
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if ".q_" in name or ".kv_" in name else 0.06)
    return model


@pytest.mark.parametrize("mixers", ["branched", "unshared"])
@pytest.mark.parametrize("model_type", MODELS)
def test_parity(model_type: str, mixers: str) -> None:
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    report = check_parity(slowly_forgetting(model_type).to("cuda"), mixers=mixers)
    assert report.passed, str(report)
