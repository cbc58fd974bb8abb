"""Base weights in 4 and 8 bits under LoRA, through bitsandbytes' CUDA kernels."""

from pathlib import Path

import pytest
import torch
from helpers.quantized import FOUR, KINDS, quantized, quiet

import flexpatch

pytestmark = [pytest.mark.gpu, pytest.mark.heavy("bitsandbytes"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, model_type: str, tmp_path: Path) -> None:
    with quiet():
        model = quantized(KINDS[kind], tmp_path, model_type=model_type, dtype=torch.bfloat16, device="cuda")
        report = flexpatch.check_parity(model)
    print(report)
    assert report.passed, str(report)


@pytest.mark.parametrize("reentrant", [True, False])
def test_parity_under_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = quantized(FOUR, tmp_path, dtype=torch.bfloat16, device="cuda")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    report = flexpatch.check_parity(model)
    assert report.passed, str(report)
