"""Every tuner and option of the installed peft: proven exact against the unpatched model, or refused with the way out."""

import copy
import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.tuners
import pytest
import torch
from oracle import BOUNDS, CONTROL, Result, see_siblings, separate
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from tuner_kinds import EXACT, REFUSED, TREES, Maker, adapted, bare, batch, corda, eva, lifted, lora, lora_ga

import flexpatch
from flexpatch import UnsupportedModelError, build_rows, patch, refusals, tuners
from flexpatch.tuners import tuner_table

# Some tuners compute in float32 within: the unpatched model differs so much between two shapes of its own batch.
NOISE = (1e-5, 1e-5)


@pytest.fixture(autouse=True)
def always_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_gains", lambda *args: True)


def padded(model: nn.Module) -> Result:
    return Result.of(model, flexpatch.separate_logprobs(model, TREES))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and gradients of what is trained, on rows and folded batches, without and with adapters."""
    # Each way of running has a new model: some adapters remember calls.
    fresh = adapted(EXACT[kind], training)
    stock = copy.deepcopy(fresh)
    true = Result.of(stock, separate(stock, TREES))
    batched = padded(copy.deepcopy(fresh))
    noise = batched.errors(true)
    assert noise[0] <= NOISE[0] and noise[1] <= NOISE[1], "the unpatched model looks at more than one sequence"
    bounds = (max(BOUNDS[0], 8 * noise[0]), max(BOUNDS[1], 8 * noise[1]))

    rows = build_rows([TREES])
    model = flexpatch.apply(copy.deepcopy(fresh))
    Result.packed(model, rows).matches(true, bounds)
    Result.packed(model, see_siblings(rows)).differs(true, bounds)
    if isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        with torch.no_grad(), stock.disable_adapter(), model.disable_adapter():
            base, reference = separate(stock, TREES[:1]).tokens, flexpatch.answer_logprobs(model, rows).tokens
        assert (reference[: len(base)] - base).abs().max() <= BOUNDS[0]
        assert (true.tokens[: len(base)] - base).abs().max() > CONTROL * bounds[0], "the adapters must matter"

    model = flexpatch.apply(copy.deepcopy(fresh))
    padded(model).matches(batched, bounds)
    assert flexpatch.savings(model).folded == 1
    fold = patch.fold_batch

    def broken(*args: Any) -> Any:
        folded = fold(*args)
        return dataclasses.replace(folded, rows=see_siblings(folded.rows))

    monkeypatch.setattr(patch, "fold_batch", broken)
    padded(flexpatch.apply(fresh)).differs(batched, bounds)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At apply, or at the first call if the adapters come later; and without that it would go wrong."""
    maker, reason = REFUSED[kind]
    match = f"(?i){kind.split()[-1]}.*{re.escape(reason)}.*flexpatch.remove"
    with pytest.raises(UnsupportedModelError, match=match):
        flexpatch.apply(adapted(maker))
    rows, late = build_rows([TREES]), adapted(maker, training=True, patched_before=True)
    with pytest.raises(UnsupportedModelError, match=match):
        flexpatch.answer_logprobs(late, rows)
    if kind in ("POLY", "MULTITASK_PROMPT_TUNING"):
        return  # the unpatched model, too, wants a task for each sequence

    own_tokens = reason == "tokens of its own"
    batched = padded(adapted(maker, training=True))
    if own_tokens:  # such calls do not tell their tokens, and run as given
        padded(late).matches(batched)
        assert flexpatch.savings(late).folded == 0
    else:
        with pytest.raises(UnsupportedModelError, match=match):
            padded(late)
    monkeypatch.setattr(refusals, "refusal", lambda module: None)
    stock, patched, again = (adapted(maker, training=True, patched_before=late) for late in (False, True, True))
    true = Result.of(stock, separate(stock, TREES))
    wrong = [wrongness(lambda: Result.packed(patched, rows), true), wrongness(lambda: padded(again), batched)]
    assert any(wrong), "exact after all"


def wrongness(run: Callable[[], Result], true: Result) -> bool:
    """Whether a run fails inside, or gives other numbers than the unpatched model."""
    try:
        return max(run().errors(true)) > CONTROL * BOUNDS[1]
    except (RuntimeError, ValueError, IndexError):
        return True
