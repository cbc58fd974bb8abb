"""Models loaded with FlashAttention: it keeps serving ordinary calls, and batches fold to the very numbers it gives.

On a CPU by a stand-in with FlashAttention's ways; tests/gpu/test_flash_kernels.py runs the real kernels.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.completions import SEQUENCES
from helpers.flash_stand_in import NAME, flash_model
from parameterized import parameterized
from torch import Tensor

import flexpatch
from flexpatch.float64 import Float64
from flexpatch.fold import fold_batch
from flexpatch.models import tiny_model

BOUND = 1e-12
LENGTHS = torch.tensor([len(sequence) for sequence in SEQUENCES])
RIGHT = torch.nn.utils.rnn.pad_sequence(SEQUENCES, batch_first=True)
MASK = (torch.arange(RIGHT.shape[1]) < LENGTHS[:, None]).long()
LEFT = torch.nn.utils.rnn.pad_sequence(SEQUENCES, batch_first=True, padding_side="left")
HOLES = MASK.clone()
HOLES[:, 10:13] = 0
ROW = torch.cat(SEQUENCES)[None]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS.tolist()])[None]
CU = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).int()


def varlen(cu: Tensor) -> dict[str, Any]:
    longest = int(cu.diff().max())
    return dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest)


CALLS: dict[str, dict[str, Any]] = {
    "right": dict(input_ids=RIGHT, attention_mask=MASK),
    "left": dict(input_ids=LEFT, attention_mask=(LEFT != 0).long()),
    "holes": dict(input_ids=RIGHT, attention_mask=HOLES),
    "row": dict(input_ids=ROW, position_ids=POSITIONS),
    "row and a mask of ones": dict(input_ids=ROW, position_ids=POSITIONS, attention_mask=torch.ones_like(ROW)),
    "row with boundaries": dict(input_ids=ROW, position_ids=POSITIONS, **varlen(CU)),
}
GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "other boundaries": (
        dict(input_ids=ROW, position_ids=POSITIONS, **varlen(CU[[0, 2, 4]])),
        "with cu_seq_lens that differ from the restarts of position_ids",
    ),
    "boundaries alone": (dict(input_ids=ROW, **varlen(CU)), "with cu_seq_lens without position_ids"),
    "two rows": (
        dict(input_ids=ROW.repeat(2, 1), position_ids=POSITIONS.repeat(2, 1)),
        "with position_ids that restart in several rows",
    ),
}
TYPES = [("llama", 0), ("mistral", 1), ("qwen3_moe", 0), ("gemma3_text", 0)]


def read(call: dict[str, Any]) -> Tensor:
    """(N, S) bool: tokens, and padding before one, where its log-prob is read."""
    real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    return real | torch.nn.functional.pad(real[:, 1:], (0, 1))


def results(model: torch.nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits where they are read, and a gradient in all weights."""
    model.zero_grad()
    logits = model(**call).logits[read(call)]
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@parameterized.expand([(*kind, name) for kind in TYPES for name in CALLS])
def test_folds_to_what_it_gives(model_type: str, variant: int, name: str) -> None:
    stock, call = flash_model(model_type, variant).train(), CALLS[name]
    model = flexpatch.apply(copy.deepcopy(stock))
    windowed = name == "holes" and model_type in ("mistral", "gemma3_text")
    for cache in ({}, {"use_cache": False}):
        with Float64():
            (true, slope), (ours, our_slope) = results(stock, call | cache), results(model, call | cache)
        assert (ours - true).abs().max() < BOUND
        assert (our_slope - slope).norm() < BOUND * slope.norm()
    saved = flexpatch.savings(model)
    assert saved.folded == (0 if windowed else 2)
    if windowed:
        assert "across which FlashAttention counts windows otherwise" in next(iter(saved.reasons))


@parameterized.expand([(name,) for name in GIVEN])
@pytest.mark.filterwarnings("ignore:flexpatch")
def test_runs_as_given(name: str) -> None:
    stock, (call, reason) = flash_model("llama"), GIVEN[name]
    model = flexpatch.apply(copy.deepcopy(stock))
    assert torch.equal(model(**call, use_cache=False).logits, stock(**call, use_cache=False).logits)
    (given,) = flexpatch.savings(model).reasons
    assert given.startswith(reason)


def test_padding_that_sees_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: padding inside a sequence that sees what sdpa's padding sees is far off."""
    stock, call = flash_model("llama"), CALLS["holes"] | {"use_cache": False}
    model = flexpatch.apply(copy.deepcopy(stock))
    monkeypatch.setattr("flexpatch.folding.fold_batch", lambda *args, blind: fold_batch(*args))
    assert (results(model, call)[0] - results(stock, call)[0]).abs().max() > 0.01


def test_ordinary_calls_and_removal() -> None:
    """Generation through the original, bit by bit; copies, and a pickled model, keep working."""
    stock = flash_model("llama").eval()
    model = flexpatch.apply(copy.deepcopy(stock))
    assert model.config._attn_implementation == f"flexpatch_{NAME}"
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        given = dict(input_ids=LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=5, do_sample=False)
        assert torch.equal(each.generate(**given), stock.generate(**given))
    assert flexpatch.check_parity(model).passed
    assert flexpatch.remove(model).config._attn_implementation == NAME
    assert torch.equal(model(**CALLS["right"]).logits, stock(**CALLS["right"]).logits)


def test_boundaries_mean_nothing_to_other_kernels() -> None:
    """sdpa tells sequences by their positions alone, so boundaries that say otherwise do not matter."""
    stock = tiny_model("llama")
    model = flexpatch.apply(copy.deepcopy(stock))
    call = GIVEN["other boundaries"][0] | {"use_cache": False}
    assert (model(**call).logits - stock(**call).logits).abs().max() < 1e-6
    assert flexpatch.savings(model).folded == 1
