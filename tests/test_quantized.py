"""Base weights in 4 and 8 bits under LoRA, against the same layers unpatched; the truth has their numbers in float64.

On the CPU here, in the kernels people train with in ``tests/gpu/test_bitsandbytes.py``.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import flexpatch
from flexpatch import UnsupportedModelError, refusals
from flexpatch.internals import dequantize
from flexpatch.models import TINY, tiny_model

WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32)  # bitsandbytes packs blocks of 64
FOUR = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR,
    "nf4, double": dict(FOUR, bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True, llm_int8_threshold=0.0),
}
OUTLIERS = dict(load_in_8bit=True, llm_int8_threshold=6.0)


def quantized(
    settings: dict[str, Any], folder: Path, *, model_type: str = "llama", dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """A tiny model, written and loaded with its layers quantized, under LoRA adapters that matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.models.TINY", TINY | WIDE)
        tiny_model(model_type, dtype=dtype).save_pretrained(folder)
    if "load_in_4bit" in settings:
        settings = dict(settings, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype, device_map={"": device}
    )
    # On a CPU bitsandbytes has other code for training than for inference: gradients go through 4-bit weights in the
    # one, activations are rounded to 8 bits in the other.
    model.train("load_in_4bit" in settings)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora)


@contextlib.contextmanager
def quiet() -> Any:
    """Without a line for every 8-bit product."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, tmp_path: Path) -> None:
    with quiet():
        model = quantized(KINDS[kind], tmp_path, dtype=torch.float32)
        report = flexpatch.check_parity(model)
    assert report.passed, str(report)
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(packed) == 4 * 7 and not any(p.requires_grad for p in packed), "the layers are quantized"


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
