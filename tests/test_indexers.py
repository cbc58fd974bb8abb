"""Models with an indexer keep its choice of keys in ordinary calls, which they make for attention that they know."""

import pytest
import torch
from parameterized import parameterized
from transformers import CONFIG_MAPPING

import flexpatch
from flexpatch.models import tiny_model


@parameterized.expand(
    [("deepseek_v32",), ("glm_moe_dsa",), ("axk2",), ("hy_v4",), ("dots3_note_text",), ("minimax_m3_vl_text",)]
)
def test_ordinary_calls_keep_the_choice(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"needs a transformers that knows {model_type}")
    model = tiny_model(model_type, dtype=torch.float32)
    ids = torch.arange(60).view(2, 30) % 140 + 3
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        patched = flexpatch.apply(model)(input_ids=ids).logits
        for module in model.modules():
            if hasattr(module, "index_topk"):
                module.index_topk = 64
            if hasattr(module, "topk_blocks"):
                module.topk_blocks = 64
        everything = model(input_ids=ids).logits
    assert torch.equal(patched, stock)
    assert (everything - stock).abs().max() > 1e-3, "no choice is made, so the test shows nothing"
