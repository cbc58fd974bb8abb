"""Padding-free rows fold by their restarts, and come back as rows: to what the unpatched model makes of them."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.needs import needs_type
from helpers.oracle import FIRST
from packaging.version import Version
from parameterized import parameterized
from torch import Tensor

import flexpatch
from flexpatch import padding_free
from flexpatch.float64 import Float64
from flexpatch.forward import hook_of
from flexpatch.internals import eager_experts
from flexpatch.layouts import multimodal_types
from flexpatch.models import adapter_of, tiny_model, tiny_types
from flexpatch.padding_free import find_starts, fold_sequences

BOUND = 1e-10
KINDS = [("llama", 0), ("mistral", 1), ("gemma3_text", 0), ("qwen3_moe", 0), ("granite_swa", 0), ("gemma3", 0)]


def make(rows: int, seed: int = 0) -> dict[str, Any]:
    """Rows of groups of completions, with other lengths and other orders in each row."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 151, (count,), generator=generator).tolist()

    ids, positions = [], []
    for row in range(rows):
        first, second = draw(24 + row), draw(9)
        sequences = [first + draw(5), second + draw(3), first + draw(8 - 3 * row), first + draw(2), second + draw(4)]
        ids.append([token for sequence in sequences for token in sequence])
        positions.append([position for sequence in sequences for position in range(len(sequence))])
    assert len(set(map(len, ids))) == 1
    return dict(input_ids=torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False)


def results(model: torch.nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Logits of all tokens, and a gradient in all weights."""
    model.zero_grad()
    output = model(**call)
    logits = output.logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), output


def apart(model: torch.nn.Module, call: dict[str, Any]) -> Tensor:
    """Logits of all tokens from separate calls, a sequence each."""
    found = torch.zeros(*call["input_ids"].shape, model.config.get_text_config().vocab_size, dtype=torch.float64)
    for row, (ids, starts) in enumerate(zip(call["input_ids"], find_starts(call["position_ids"].numpy()), strict=True)):
        bounds = [*np.flatnonzero(starts).tolist(), len(ids)]
        for start, stop in pairwise(bounds):
            found[row, start:stop] = model(input_ids=ids[None, start:stop], use_cache=False).logits[0]
    return found


@parameterized.expand([(*kind, rows) for kind in KINDS for rows in (1, 2)])
def test_rows_fold(model_type: str, variant: int, rows: int) -> None:
    needs_type(model_type)
    if model_type == "gemma3" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip("transformers before 5.6 wants token_type_ids where Gemma 3 trains")
    stock, call = tiny_model(model_type, variant).train(), make(rows)
    model = flexpatch.apply(copy.deepcopy(stock))
    with Float64():
        true, slope, _ = results(stock, call)
        ours, our_slope, output = results(model, call)
        separate = apart(stock, call).detach()
    assert output.logits.shape[:2] == call["input_ids"].shape
    assert (ours - true).abs().max() < BOUND and (ours - separate).abs().max() < BOUND
    assert (our_slope - slope).norm() < BOUND * slope.norm()
    saved = flexpatch.savings(model)
    assert saved.folded == 1 and saved.factor > 1.5 and saved.padding == 0, saved


@parameterized.expand(["restarts ignored", "order"])
def test_the_comparison_can_fail(broken: str) -> None:
    stock, call = tiny_model("llama"), make(1)
    model = flexpatch.apply(copy.deepcopy(stock))

    def reversed_order(ids: np.ndarray, starts: np.ndarray, worth: Any) -> Any:
        folded = fold_sequences(ids, starts, worth)
        assert folded is not None
        return padding_free.replace(folded, index=folded.index.flip(1))

    def ignored(ids: np.ndarray, starts: np.ndarray, worth: Any) -> Any:
        first = np.zeros_like(starts)
        first[:, 0] = True
        return fold_sequences(ids, first, lambda counts: True)

    wrong = ignored if broken == "restarts ignored" else reversed_order
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.folding.fold_sequences", wrong)
        assert (model(**call).logits - stock(**call).logits).abs().max() > 0.1
    assert flexpatch.savings(model).batches == 1


@parameterized.expand([(False,), (True,)])
@pytest.mark.filterwarnings("ignore:flexpatch")
def test_a_cache_that_hides_restarts(checkpointed: bool) -> None:
    """Where a call would make a cache, transformers takes the row for one sequence: so does the patched model."""
    stock, call = tiny_model("llama").train(), make(1)
    del call["use_cache"]
    if checkpointed:  # under which transformers makes no cache
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    model = flexpatch.apply(copy.deepcopy(stock))
    output = model(**call)
    assert output.past_key_values is None and (output.logits - stock(**call).logits).abs().max() < 1e-6
    saved = flexpatch.savings(model)
    assert saved.folded == checkpointed
    if not checkpointed:
        assert (stock(**call).logits - stock(**call, use_cache=False).logits).abs().max() > 0.1, "the control"
        assert "restart, which transformers ignores where a call makes a cache" in next(iter(saved.reasons))


@pytest.mark.filterwarnings("ignore:flexpatch")
def test_rows_that_run_as_given() -> None:
    """A continued document, a mask beside the positions, and rows with nothing to share."""
    stock, call = tiny_model("llama"), make(1)
    continued = call | {"position_ids": call["position_ids"] + 7}
    masked = call | {"attention_mask": torch.ones_like(call["input_ids"])}
    alone = dict(input_ids=torch.arange(3, 43)[None], position_ids=torch.arange(20).repeat(2)[None], use_cache=False)
    model = flexpatch.apply(copy.deepcopy(stock))
    for each in (continued, masked, alone):
        assert torch.equal(model(**each).logits, stock(**each).logits)
    reasons = list(flexpatch.savings(model).reasons)
    assert flexpatch.savings(model).folded == 0 and len(reasons) == 3
    for wanted in ("nor restart at 0", "that do not count a sequence's columns", "too little to share"):
        assert any(wanted in reason for reason in reasons), reasons


def test_arguments_of_kernels_do_not_reach_a_folded_row() -> None:
    """Boundaries, lengths and sequence numbers describe the row that was given."""
    stock, call = tiny_model("llama"), make(1)
    starts = find_starts(call["position_ids"].numpy())
    cu = torch.from_numpy(padding_free.boundaries(starts)).int()
    more = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=40, max_length_k=40)
    more["seq_idx"] = torch.from_numpy(starts.cumsum(1) - 1).int()
    model = flexpatch.apply(copy.deepcopy(stock))
    seen: list[dict[str, Any]] = []
    model.model.layers[0].register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    assert (model(**call, **more).logits - stock(**call, **more).logits).abs().max() < 1e-6
    assert flexpatch.savings(model).folded == 1
    assert all(seen[0].get(name) is None for name in padding_free.VARLEN)


def told(model_type: str) -> bool:
    """Tell whether a model's calls of text run as given unless they say what is a prompt."""
    record = multimodal_types().get(model_type)
    return record is not None and record.text_blocks


@parameterized.expand([(model_type,) for model_type in FIRST])
def test_records_say_whether_a_model_tells_sequences_apart(model_type: str) -> None:
    tells_apart(model_type)


@parameterized.expand(
    [(model_type,) for model_type in tiny_types() if model_type not in FIRST and not told(model_type)]
)
@pytest.mark.slow
def test_records_say_so_of_all(model_type: str) -> None:
    tells_apart(model_type)


def tells_apart(model_type: str) -> None:
    stock, call = eager_experts(tiny_model(model_type)), make(1)
    with torch.no_grad(), Float64():  # Inkling 2's router has no other way in float64
        differs = float((stock(**call).logits - apart(stock, call)).abs().max())
    assert differs < 1e-3 if adapter_of(model_type).restarts else differs > 0.1


@pytest.mark.filterwarnings("ignore:flexpatch")
def test_a_model_that_takes_a_row_for_one_sequence() -> None:
    stock, call = tiny_model("gpt_oss"), make(1)
    model = flexpatch.apply(copy.deepcopy(stock))
    assert torch.equal(model(**call).logits, stock(**call).logits)
    assert list(flexpatch.savings(model).reasons) == ["with position_ids that restart, which this architecture ignores"]


@parameterized.expand([(model_type,) for model_type in tiny_types() if not told(model_type)])
@pytest.mark.slow
def test_every_architecture(model_type: str) -> None:
    stock, call = eager_experts(tiny_model(model_type)).train(), make(1)
    model = flexpatch.apply(copy.deepcopy(stock))
    with Float64():
        (true, slope, _), (ours, our_slope, _) = results(stock, call), results(model, call)
    assert (ours - true).abs().max() < BOUND and (our_slope - slope).norm() < BOUND * slope.norm()
    hook = hook_of(model)
    assert hook is not None
    mixes = hook.folding.padding_skipped is not None  # its mixers do not look at positions
    assert flexpatch.savings(model).folded == (adapter_of(model_type).restarts and not mixes)
