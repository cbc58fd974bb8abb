"""Fixtures shared by all tests."""

import os
from functools import cache
from typing import Any

import pytest
import torch

from flexpatch import attention, compiled

# Tiny models gain nothing from threads, and those of several workers would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, which accelerate imports, would print that it found no other


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention that trains on the CPU, exactly and in float64.

    Torch refuses gradients of flex on the CPU because Inductor has no kernel for them. Block masks, score functions,
    autograd and Dynamo's guards are the same code on every device, so with the check off and without Inductor
    (``aot_eager``) all of them are tested here; only the kernels need ``tests/gpu``.

    Graphs are kept from test to test; one that counts them starts with ``torch._dynamo.reset()``.
    """
    let_flex_train_on_cpu(monkeypatch)


def let_flex_train_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "_check_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "_compiled", _compiled)
    monkeypatch.setattr(compiled, "_compiled", _compiled_forward)


@cache
def _compiled() -> Any:
    return torch.compile(attention._attend, backend="aot_eager", fullgraph=True, dynamic=False)


@cache
def _compiled_forward() -> Any:
    return torch.compile(compiled._plain, backend="aot_eager", fullgraph=True, dynamic=False)
