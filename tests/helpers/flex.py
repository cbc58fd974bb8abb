"""FlexAttention that trains on the CPU."""

from functools import cache
from typing import Any

import pytest
import torch

from flexpatch import attention, compiled


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
