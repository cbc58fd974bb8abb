"""Stock trainers of TRL on datasets with an ``images`` column, in float64: unpatched against one line."""

from collections.abc import Iterable
from functools import partial

import pytest
import torch
import trl
from helpers.trl_images import BOUND, CASES, CONTROL, Outcome, apart, build, faults, train
from helpers.trl_processors import MARKS
from packaging.version import Version
from parameterized import parameterized
from peft import LoraConfig
from transformers import PreTrainedModel

import flexpatch

pytestmark = [
    pytest.mark.filterwarnings("error::flexpatch.FlexpatchWarning"),
    pytest.mark.usefixtures("nothing_cached"),
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older releases lack some of them"),
]


def slow_but(fast: str, every: Iterable[str]) -> list:
    return [each if each == fast else pytest.param(each, marks=pytest.mark.slow) for each in every]


KINDS = slow_but("qwen2_5_vl", MARKS)


def both(case: str, kind: str, **settings: object) -> tuple[Outcome, Outcome]:
    return train(build(case, kind, **settings), False), train(build(case, kind, flexpatch.apply, **settings), True)


@pytest.mark.parametrize("case", slow_but("DPO", CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_agrees(case: str, kind: str) -> None:
    stock, ours = both(case, kind)
    assert faults(stock, ours) == []


@pytest.mark.parametrize("case", slow_but("DPO", CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_images_taken_as_equal_are_noticed(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for images of one size: others would not even fit their placeholders."""
    stock = train(build(case, kind, one_size=True), False)
    monkeypatch.setattr("flexpatch.media.identities", lambda held, units, prints: [0] * len(units))
    ours = train(build(case, kind, flexpatch.apply, one_size=True), True)
    assert max(apart(ours, stock)) > CONTROL * BOUND


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" not in name and "visual" not in name)
    return model


LORA = dict(r=4, init_lora_weights=False)
TEXT = r".*language_model.*\.(q_proj|v_proj|up_proj)"
ADAPTERS = {
    "text alone": LoraConfig(target_modules=TEXT, **LORA),
    "tower too": LoraConfig(target_modules="all-linear", **LORA),
    "projector whole": LoraConfig(target_modules=TEXT, modules_to_save=["multi_modal_projector"], **LORA),
}


@pytest.mark.slow
@pytest.mark.parametrize("adapters", list(ADAPTERS))
@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_lora(adapters: str, kind: str) -> None:
    """The reference is the model without its adapter."""
    stock, ours = both("DPO", kind, peft_config=ADAPTERS[adapters], reference=False)
    assert faults(stock, ours) == []


@parameterized.expand(list(MARKS))
@pytest.mark.slow
def test_frozen_tower(kind: str) -> None:
    stock = train(build("DPO", kind, frozen), False)
    ours = train(build("DPO", kind, lambda model: flexpatch.apply(frozen(model))), True)
    assert faults(stock, ours) == []


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(MARKS))
def test_checkpointing(kind: str, reentrant: bool) -> None:
    """In float32: models of float64 compute some steps in float32 when backward recomputes them."""
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    stock, ours = both("DPO", kind, dtype=torch.float32, **options)
    assert faults(stock, ours, 1e-5) == []


@parameterized.expand(list(MARKS))
@pytest.mark.slow
def test_recomputing_as_memory_demands(kind: str) -> None:
    stock = train(build("DPO", kind, dtype=torch.float32), False)
    again = partial(flexpatch.apply, recompute_layers="auto")
    ours = train(build("DPO", kind, again, dtype=torch.float32), True)
    assert faults(stock, ours, 1e-5) == []


def test_faults_are_found() -> None:
    counts = flexpatch.counts.Savings(batches=1, folded=1, padded=4, computed=2, padding=1, shared=1, reasons={})
    one, other = torch.zeros(1), torch.ones(1)
    right = Outcome([1.0], one, other, {"model": counts})
    assert faults(right, right) != []  # no image was left out
