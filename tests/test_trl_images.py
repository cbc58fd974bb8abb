"""Stock trainers of TRL on datasets with an ``images`` column, in float64: unpatched against one line."""

import re
import warnings
from collections.abc import Iterable
from functools import partial

import pytest
import torch
import trl
from helpers.processors_offline import MADE
from helpers.trl_images import BOUND, CASES, CONTROL, STOCK_RAISES, Outcome, apart, build, faults, train
from packaging.version import Version
from parameterized import parameterized
from peft import LoraConfig
from transformers import PreTrainedModel

import flexpatch
from flexpatch.layouts import multimodal_types

pytestmark = [
    pytest.mark.filterwarnings("error::flexpatch.FlexpatchWarning"),
    pytest.mark.usefixtures("nothing_cached"),
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older releases lack some of them"),
]

# One of each layout, with two-way blocks, rope of three axes, sizes, tiles, positions, and states that branch.
LAYOUTS = ["llava", "gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "idefics3", "mistral3", "internvl", "qwen3_5"]


def crossed(kinds: Iterable[str]) -> list:
    """Every trainer with every class that stock can train so. All but one are slow."""
    pairs = [(case, kind) for case in CASES for kind in kinds if (case, kind) not in STOCK_RAISES]
    return [p if p == ("DPO", "qwen2_5_vl") else pytest.param(*p, marks=pytest.mark.slow) for p in pairs]


def both(case: str, kind: str, **settings: object) -> tuple[Outcome, Outcome]:
    return train(build(case, kind, **settings), False), train(build(case, kind, flexpatch.apply, **settings), True)


def test_every_class_has_a_processor() -> None:
    assert set(multimodal_types()) == set(MADE)


@pytest.mark.parametrize(("case", "kind"), crossed(MADE), ids=str)
def test_agrees(case: str, kind: str) -> None:
    stock, ours = both(case, kind)
    assert faults(stock, ours) == []


@parameterized.expand(list(STOCK_RAISES))
@pytest.mark.slow
def test_stock_cannot(case: str, kind: str) -> None:
    """Unpatched, and patched likewise."""
    for prepare in (lambda model: model, flexpatch.apply):
        with pytest.raises((TypeError, ValueError), match=re.compile(STOCK_RAISES[case, kind], re.DOTALL)):
            train(build(case, kind, prepare), False)


@pytest.mark.parametrize(("case", "kind"), crossed(LAYOUTS))
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


@parameterized.expand(LAYOUTS)
@pytest.mark.slow
def test_frozen_tower(kind: str) -> None:
    stock = train(build("DPO", kind, frozen), False)
    ours = train(build("DPO", kind, lambda model: flexpatch.apply(frozen(model))), True)
    assert faults(stock, ours) == []


def rounding(kind: str, stock: Outcome) -> float:
    """The bound of a comparison in float32. Qwen3.5, whose states branch, is held to stock's distance from float64."""
    return max(1e-5, *apart(stock, train(build("DPO", kind), False))) if kind == "qwen3_5" else 1e-5


# Gemma 4's last layers use keys of earlier ones, to which reentrant checkpointing gives no gradient: it is refused.
CHECKPOINTED = [
    (kind, reentrant) for kind in LAYOUTS for reentrant in (False, True) if kind != "gemma4" or not reentrant
]


@parameterized.expand(CHECKPOINTED)
@pytest.mark.slow
def test_checkpointing(kind: str, reentrant: bool) -> None:
    """In float32: models of float64 compute some steps in float32 when backward recomputes them."""
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    stock, ours = both("DPO", kind, dtype=torch.float32, **options)
    assert faults(stock, ours, rounding(kind, stock)) == []


@parameterized.expand(LAYOUTS)
@pytest.mark.slow
def test_recomputing_as_memory_demands(kind: str) -> None:
    stock = train(build("DPO", kind, dtype=torch.float32), False)
    again = partial(flexpatch.apply, recompute_layers="auto")
    ours = train(build("DPO", kind, again, dtype=torch.float32), True)
    assert faults(stock, ours, rounding(kind, stock)) == []


@pytest.mark.parametrize("kind", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_truncated_images_are_stocks_own_error(kind: str) -> None:
    """Where ``max_length`` cuts placeholders off."""
    said = []
    for prepare in (lambda model: model, flexpatch.apply):
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match=r"image placeholder tokens .* truncated") as raised,
        ):
            warnings.simplefilter("ignore", flexpatch.FlexpatchWarning)  # the batch runs as it was given
            train(build("DPO", kind, prepare, max_length=16), False)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_faults_are_found() -> None:
    counts = flexpatch.counts.Savings(batches=1, folded=1, padded=4, computed=2, padding=1, shared=1, reasons={})
    one, other = torch.zeros(1), torch.ones(1)
    right = Outcome([1.0], one, other, {"model": counts})
    assert faults(right, right) != []  # no image was left out
