"""Hybrids on a GPU: attention of rows through FlexAttention, other mixers on separate sequences or branched."""

import pytest
import torch
from parameterized import parameterized

from flexpatch.models import tiny_model, tiny_types
from flexpatch.parity import check_parity
from flexpatch.registry import adapters

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
TYPES = [t for t in tiny_types() if adapters()[t].unshared]
# In 16 bits a tiny delta rule is all noise: the unpatched model's own gradients are off by half.
NARROW = ["rwkv", "deepseek_v4", "llama4_text", "glm_moe_dsa", "bamba", "minimax", "jamba", "falcon_h1"]


@parameterized.expand([(t, torch.float32) for t in TYPES] + [(t, torch.bfloat16) for t in NARROW])
def test_parity(model_type: str, dtype: torch.dtype) -> None:
    report = check_parity(tiny_model(model_type, 0, dtype=dtype).to("cuda"))
    assert report.passed, str(report)
