"""Which rows backend="auto" runs on FlashAttention-4's kernels, and which of their layers.

The kernels need a GPU (tests/gpu/test_fa4.py). Here torch is told that it has one, and what a layer asks for is noted.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.oracle import name
from parameterized import parameterized

import flexpatch
from flexpatch import FlexpatchError, FlexpatchWarning, Rows, Tree, attention, build_rows, devices, fa4, row_calls
from flexpatch.devices import Card
from flexpatch.models import tiny_model

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
HOPPER, AMPERE = Card("cuda", "an H100", (9, 0), 227), Card("cuda", "an A100", (8, 0), 163)
HEADS = frozenset({(128, 128)})


def pairs(prompt: int, answer: int, count: int = 1) -> Rows:
    return build_rows([[Tree.of([1] * prompt, [2] * answer, [3] * answer)] * count])


DEEP, SHALLOW = pairs(4000, 100), pairs(500, 100, 8)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FlashAttention-4 be installed, and right, on a Hopper."""
    monkeypatch.setattr(fa4, "check_fa4", lambda: None)
    monkeypatch.setattr(fa4, "card_of", lambda device: HOPPER)
    monkeypatch.setattr(fa4, "_error", lambda *call: 0.003)
    for function in (fa4._installed, fa4._is_right):
        function.cache_clear()
    yield
    for function in (fa4._installed, fa4._is_right):
        function.cache_clear()


def test_what_a_token_sees_is_counted() -> None:
    for rows in (DEEP, SHALLOW):
        index = torch.arange(rows.input_ids.shape[1])
        assert rows.visible == int((rows.ends - index).sum())
    assert DEEP.visible > fa4.DEEP_KEYS * DEEP.tokens and SHALLOW.visible < fa4.DEEP_KEYS * SHALLOW.tokens


def test_deep_rows_take_it() -> None:
    assert fa4.takes(DEEP, CUDA, BF16, HEADS) and fa4.takes(DEEP, CUDA, torch.float16, HEADS)
    assert fa4.takes(DEEP, CUDA, BF16, HEADS | {(256, 256)}), "a model's other layers do not matter"
    assert not fa4.takes(SHALLOW, CUDA, BF16, HEADS)
    assert not fa4.takes(DEEP, CUDA, torch.float32, HEADS)
    assert not fa4.takes(DEEP, torch.device("cpu"), BF16, HEADS)
    for other in (frozenset({(256, 256)}), frozenset({(192, 128)}), frozenset({(32, 32)})):
        assert not fa4.takes(DEEP, CUDA, BF16, other)


@parameterized.expand([(False,), (True,)], name_func=name)
def test_deterministic_algorithms_keep_tritons_kernels(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert not fa4.takes(DEEP, CUDA, BF16, HEADS)
    finally:
        torch.use_deterministic_algorithms(False)


def test_policy_and_reference_take_the_same() -> None:
    with torch.no_grad():
        assert fa4.takes(DEEP, CUDA, BF16, HEADS)


def test_where_it_is_not_installed_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said where it is not installed, or too old: it is an option. What is installed and wrong is told."""

    def refuse() -> None:
        raise FlexpatchError("not installed")

    with monkeypatch.context() as patch:
        patch.setattr(fa4, "check_fa4", refuse)
        fa4._installed.cache_clear()
        assert not fa4.takes(DEEP, CUDA, BF16, HEADS)
    with monkeypatch.context() as patch:
        patch.setattr(fa4, "card_of", lambda device: AMPERE)
        fa4._installed.cache_clear()
        assert not fa4.takes(DEEP, CUDA, BF16, HEADS)

    def crash(*call: Any) -> float:
        raise RuntimeError("no kernel image")

    fa4._installed.cache_clear()
    for error, told in ((crash, "RuntimeError: no kernel image"), (lambda *call: 0.3, r"off by 0\.3 of their norm")):
        monkeypatch.setattr(fa4, "_error", error)
        fa4._is_right.cache_clear()
        with pytest.warns(FlexpatchWarning, match=told):
            assert not fa4.takes(DEEP, CUDA, BF16, HEADS)
        assert not fa4.takes(DEEP, CUDA, BF16, HEADS), "told once"


@pytest.mark.usefixtures("flex_on_cpu")
def test_its_check_sees_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at first use, with plain kernels in place of FlashAttention-4's: right, and wrong on purpose."""
    monkeypatch.undo()
    from helpers.flex import let_flex_train_on_cpu

    let_flex_train_on_cpu(monkeypatch)
    cpu = torch.device("cpu")
    assert 0 < fa4._error(cpu, 64, BF16) < fa4.LARGEST_ERROR
    real = attention.flex
    monkeypatch.setattr(fa4, "flex", lambda q, k, v, mask, fa4: real(q, 1.1 * k, v, mask, fa4=fa4))
    assert fa4._error(cpu, 64, BF16) > fa4.LARGEST_ERROR


class Asked:
    """Kernels that attention asked for, call by call."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.flash: list[bool] = []

        def attend(*call: Any) -> Any:
            self.flash.append(call[-1].get("BACKEND") == "FLASH")
            return attention._attend(*call)  # no gradient is looked at

        patch.setattr(attention, "_compiled", lambda: attend)


@pytest.mark.usefixtures("flex_on_cpu")
def test_layers_take_it_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full layers do, windowed layers do not, nor rows that are not deep; with and without gradients alike."""
    asked = Asked(monkeypatch)
    monkeypatch.setattr(flexpatch.dispatch, "choose", lambda *call: devices.Choice("flex"))
    monkeypatch.setattr(attention, "FA4_HEADS", (16,))
    monkeypatch.setattr(fa4, "FA4_HEADS", (16,))
    monkeypatch.setattr(row_calls, "takes", lambda rows, device, *rest: fa4.takes(rows, CUDA, *rest))
    monkeypatch.setattr(fa4, "DEEP_KEYS", 50)
    deep, shallow = pairs(100, 20), pairs(10, 5, 4)
    for kind, expected in (("gemma3_text", {True, False}), ("gemma2", {False})):
        model = flexpatch.apply(tiny_model(kind, dtype=BF16))
        found = []
        for gradients in (True, False):
            asked.flash.clear()
            with torch.set_grad_enabled(gradients):
                flexpatch.answer_logprobs(model, deep)
            found.append(list(asked.flash))
        assert found[0] == found[1]
        assert set(found[0]) == expected, (kind, found)
        asked.flash.clear()
        flexpatch.answer_logprobs(model, shallow)
        assert asked.flash and not any(asked.flash)


@pytest.mark.slow
@pytest.mark.usefixtures("flex_on_cpu")
def test_compiled_layers_read_the_mark_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexpatch.dispatch, "choose", lambda *call: devices.Choice("flex"))
    monkeypatch.setattr(attention, "FA4_HEADS", (16,))
    monkeypatch.setattr(row_calls, "takes", lambda *call: True)
    model = flexpatch.apply(tiny_model("llama", dtype=BF16), compile=True)
    rows = pairs(100, 20)
    found = flexpatch.answer_logprobs(model, rows).answers
    plain = flexpatch.answer_logprobs(flexpatch.apply(model, backend="flex"), rows).answers
    assert torch.allclose(found, plain, rtol=2e-2)
