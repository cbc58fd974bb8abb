"""Base weights in 4 and 8 bits under LoRA, against the same layers unpatched; the truth has their numbers in float64.

On the CPU here, in the kernels people train with in ``tests/gpu/test_bitsandbytes.py``.
"""

from pathlib import Path

import pytest
import torch
from helpers.needs import needs_type
from helpers.quantized import FOUR, KINDS, quantized, quiet
from torch import nn

import flexpatch
from flexpatch import UnsupportedModelError, refusals
from flexpatch.internals import dequantize
from flexpatch.models import tiny_model
from flexpatch.quantized_layers import layer_fault

OUTLIERS = dict(load_in_8bit=True, llm_int8_threshold=6.0)

pytestmark = pytest.mark.heavy("bitsandbytes")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, tmp_path: Path) -> None:
    with quiet():
        model = quantized(KINDS[kind], tmp_path, dtype=torch.float32)
        report = flexpatch.check_parity(model)
    assert report.passed, str(report)
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(packed) == 4 * 7 and not any(p.requires_grad for p in packed), "the layers are quantized"


@pytest.mark.parametrize("mixers", ["branched", "unshared"])
@pytest.mark.parametrize(("model_type", "projections"), [("qwen3_5_text", 5), ("bamba", 2)])
def test_hybrids(model_type: str, projections: int, mixers: str, tmp_path: Path) -> None:
    """Projections of mixers are packed too, and in both ways answers of LoRA on them are the unpatched model's."""
    needs_type(model_type)
    model = flexpatch.apply(quantized(FOUR, tmp_path, model_type=model_type, dtype=torch.float32), mixers=mixers)
    report = flexpatch.check_parity(model)
    assert report.passed, str(report)
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv1d)]
    places = [name.removesuffix("conv1d") for name in convolutions]
    packed = [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    for place in places:
        inside = [name for name in packed if name.startswith(place) and name.endswith(".base_layer")]
        assert len(inside) == projections, inside
    assert len(places) == 3
    assert [name for name, layer in model.named_modules() if layer_fault(layer)] == []


def test_weights_in_numbers(tmp_path: Path) -> None:
    """What the truth is made of: no packed weight is left, and none is trained."""
    model = dequantize(quantized(FOUR, tmp_path, dtype=torch.float32))
    assert all(p.is_floating_point() for p in model.parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    plain = tiny_model("llama")
    assert dequantize(plain) is plain


def test_outliers_are_refused(tmp_path: Path) -> None:
    model = quantized(OUTLIERS, tmp_path, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*llm_int8_threshold=6.0.*llm_int8_threshold=0.0"):
        flexpatch.apply(model)
    assert not flexpatch.is_applied(model)


def test_outliers_of_one_answer_reach_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why they are refused."""
    monkeypatch.setattr("flexpatch.patch.check_quantization", lambda model: None)
    monkeypatch.setattr(refusals, "layer_fault", lambda layer: None)
    with quiet():
        report = flexpatch.check_parity(quantized(OUTLIERS, tmp_path, dtype=torch.float32))
    leak = next(check for check in report.checks if check.name.startswith("leak"))
    assert leak.error > 0
