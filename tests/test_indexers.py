"""Models with an indexer keep its choice of keys in ordinary calls, which they make for attention that they know."""

import pytest
import torch
from parameterized import parameterized
from transformers import CONFIG_MAPPING

import flexpatch
from flexpatch import Tree, build_rows
from flexpatch.float64 import Float64
from flexpatch.models import tiny_model


def test_the_block_of_a_query_is_always_seen() -> None:
    """MiniMax M3 chooses it by position. The tiny model has none, because wrong positions would be an error."""
    if "minimax_m3_vl_text" not in CONFIG_MAPPING:
        pytest.skip("needs a transformers that knows minimax_m3_vl_text")
    answers, trees = [], [Tree.of(list(range(3, 40)), list(range(50, 80)), list(range(90, 107)))]
    for blocks in (1, 0):
        model = tiny_model("minimax_m3_vl_text")
        for module in model.modules():
            if hasattr(module, "local_blocks"):
                module.local_blocks, module.topk_blocks = blocks, 1
        with Float64(), torch.no_grad():
            stock = flexpatch.separate_logprobs(model, trees).tokens
            ours = flexpatch.answer_logprobs(flexpatch.apply(model), build_rows([trees])).tokens
        assert (ours - stock).abs().max() < 1e-10
        answers.append(stock)
    assert (answers[0] - answers[1]).abs().max() > 1e-3, "the control: the block matters"


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
