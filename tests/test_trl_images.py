"""Stock trainers of TRL on datasets with an ``images`` column, in float64: unpatched against one line."""

import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import trl
from helpers.processors_offline import MADE, make_model
from helpers.trl_images import BOUND, CASES, CONTROL, STOCK_RAISES, Outcome, apart, build, faults, train
from packaging.version import Version
from parameterized import parameterized
from peft import LoraConfig
from transformers import PreTrainedModel

import flexpatch
from flexpatch.checkpointing import Memory, Recomputation
from flexpatch.compiled import _recording
from flexpatch.internals import backbone_of, layers_of
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


class Noted(Recomputation):
    """Notes how many layers each call keeps, on a device with room for all."""

    kept_layers: ClassVar[list[int]] = []

    def __init__(self, setting: int | str) -> None:
        super().__init__(setting, lambda device: Memory(100, 100, 10**12))

    def __call__(self, backbone: PreTrainedModel, call: dict[str, Any]) -> Any:
        result = super().__call__(backbone, call)
        if backbone.training and torch.is_grad_enabled():
            self.kept_layers.append(len(self.kept))
        return result


@pytest.fixture
def kept_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr("flexpatch.forward.Recomputation", Noted)
    monkeypatch.setattr(Noted, "kept_layers", [])
    return Noted.kept_layers


CHECKPOINTS = {
    "none": {},
    "not reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)),
}
COMPILED = dict(backend="flex", compile=True)
FEW = ["qwen2_5_vl", "gemma3", "llava"]


# Gemma 4's last layers use keys of earlier ones, to which reentrant checkpointing gives no gradient: it is refused.
@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_checkpointing(kind: str, checkpoints: str) -> None:
    if (kind, checkpoints) == ("gemma4", "reentrant"):
        with pytest.raises(flexpatch.UnsupportedModelError, match="reentrant"):
            both("DPO", kind, **CHECKPOINTS[checkpoints])
        return
    stock, ours = both("DPO", kind, **CHECKPOINTS[checkpoints])
    assert faults(stock, ours) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", [1, "auto"])
@pytest.mark.parametrize("checkpoints", ["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", FEW)
def test_recomputing_some_layers(kind: str, checkpoints: str, setting: int | str, kept_layers: list[int]) -> None:
    """Of the text model: the tower recomputes all of its own. ``"auto"`` keeps all from the second step on."""
    settings = CHECKPOINTS[checkpoints]
    stock = train(build("DPO", kind, **settings), False)
    ours = train(build("DPO", kind, partial(flexpatch.apply, recompute_layers=setting), **settings), True)
    assert faults(stock, ours) == []
    layers = len(layers_of(backbone_of(make_model(kind))))
    assert kept_layers == ([layers - 1] * 3 if setting == 1 else [1, layers, layers])


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("kind", FEW)
def test_compiled_layers(
    kind: str, checkpoints: str, kept_layers: list[int], flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto", of three steps the first recomputes layers and the others none. And the control."""
    settings, options = CHECKPOINTS[checkpoints], COMPILED | dict(recompute_layers="auto")
    compiled = mock.Mock(wraps=_recording)
    monkeypatch.setattr("flexpatch.compiled._recording", compiled)
    stock = train(build("DPO", kind, one_size=True, **settings), False)
    ours = train(build("DPO", kind, partial(flexpatch.apply, **options), one_size=True, **settings), True)
    assert faults(stock, ours) == [] and compiled.call_count >= 6  # layers of policy and reference, three times
    assert settings == {} or kept_layers[0] < kept_layers[1]
    monkeypatch.setattr("flexpatch.media.identities", lambda held, units, prints: [0] * len(units))
    wrong = train(build("DPO", kind, partial(flexpatch.apply, **options), one_size=True, **settings), True)
    assert max(apart(wrong, stock)) > CONTROL * BOUND


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
