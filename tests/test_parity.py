"""Packed rows against separate sequences: log-probs and gradients of every registered architecture.

The oracle is transformers' own model, unpatched, one sequence at a time, in float64. sdpa then leaves 1e-15 in
log-probs; gradients keep 1e-7, because transformers' norms and rope compute in float32.
"""

import unittest
from dataclasses import replace

import pytest
import torch
from oracle import (
    MODELS,
    Result,
    bounds_of,
    name,
    no_window,
    oracle,
    packed_positions,
    random_ids,
    read,
    see_siblings,
    separate,
    trees,
    wider,
)
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch import Adapter, Rows, Tree, build_rows
from flexpatch.masks import mask_of
from flexpatch.models import tiny_model
from flexpatch.patch import model_inputs, text_config
from flexpatch.registry import FULL, SLIDING, adapters


def shared(model_type: str, variant: int, backend: str, rows: Rows, adapter: Adapter | None = None) -> Result:
    model = flexpatch.apply(tiny_model(model_type, variant), backend=backend)
    return Result.packed(model, rows, adapter)


def check(model_type: str, variant: int, backend: str) -> None:
    """One row of all trees, two rows with padding, and then the ways to break them."""
    true = oracle(model_type, variant)
    bounds = bounds_of(model_type)
    one, two = build_rows([trees()]), build_rows([trees()[:3], trees()[3:]], pad_id=7)
    assert two.input_ids.numel() > two.tokens, "the second case must have padding"
    for rows in (one, two):
        shared(model_type, variant, backend, rows).matches(true, bounds)

    adapter = adapters()[model_type]
    broken: dict[str, tuple[Rows, Adapter | None]] = {"answers see their siblings": (see_siblings(one), None)}
    if has_window(model_type, variant):
        broken["no window"] = one, no_window(adapter)
    if backend == "dense":
        broken["positions are row indices"] = packed_positions(one), None
        if has_window(model_type, variant):
            broken["a window one token too wide"] = one, wider(adapter, 1)
            broken["a window one token too narrow"] = one, wider(adapter, -1)
    for what, (rows, other) in broken.items():
        shared(model_type, variant, backend, rows, other).differs(true, bounds, what)


def has_window(model_type: str, variant: int) -> bool:
    config = text_config(tiny_model(model_type, variant))
    windows = adapters()[model_type].windows(config)
    return any(windows[layer] for layer in getattr(config, "layer_types", None) or windows if layer in windows)


class DenseParityTest(unittest.TestCase):
    @parameterized.expand(MODELS, name_func=name)
    def test(self, model_type: str, variant: int) -> None:
        check(model_type, variant, "dense")


@pytest.mark.usefixtures("flex_on_cpu")
class FlexParityTest(unittest.TestCase):
    @parameterized.expand(MODELS, name_func=name)
    def test(self, model_type: str, variant: int) -> None:
        check(model_type, variant, "flex")


@pytest.mark.usefixtures("float64_softmax")
class Gemma2Test(unittest.TestCase):
    """With its one float32 step out of the way, the soft cap is held to the bounds of all other models."""

    true: Result

    def setUp(self) -> None:
        model = tiny_model("gemma2")
        self.true = Result.of(model, separate(model, trees()))

    def test_dense(self) -> None:
        shared("gemma2", 0, "dense", build_rows([trees()])).matches(self.true)

    @pytest.mark.usefixtures("flex_on_cpu")
    def test_flex(self) -> None:
        shared("gemma2", 0, "flex", build_rows([trees()])).matches(self.true)

    @pytest.mark.usefixtures("flex_on_cpu")
    def test_flex_without_the_soft_cap(self) -> None:
        model = tiny_model("gemma2")
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        flexpatch.apply(model, backend="flex")
        Result.packed(model, build_rows([trees()])).differs(self.true)


@pytest.fixture
def float64_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention in the dtype of its scores."""
    softmax = nn.functional.softmax

    def in_own_dtype(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", in_own_dtype)


class TrapTest(unittest.TestCase):
    """What looks right, runs without an error and is wrong."""

    # How far off, in nats, the usual mistakes are on these models.
    visible = 0.1

    def tokens(self, model_type: str, variant: int, rows: Rows, adapter: Adapter | None = None) -> Tensor:
        model = flexpatch.apply(tiny_model(model_type, variant), backend="dense")
        return flexpatch.answer_logprobs(model, rows, adapter=adapter).tokens

    @parameterized.expand([case for case in MODELS if case[1] == 0], name_func=name)
    def test_restarted_positions_alone_do_not_share_a_prompt(self, model_type: str, variant: int) -> None:
        """Stock packing: transformers sees position_ids restart and starts a new sequence, without the prompt."""
        model = tiny_model(model_type, variant)
        rows = build_rows([trees()])
        logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
        naive = read(logits, rows).tokens
        assert (naive - oracle(model_type, variant).tokens).abs().max() > self.visible

    @parameterized.expand([case for case in MODELS if has_window(*case)], name_func=name)
    def test_windows_count_positions_not_row_indices(self, model_type: str, variant: int) -> None:
        """By index a later answer is too far from its prompt. Rope still sees the right positions here."""
        rows = build_rows([trees()])
        by_index = packed_positions(rows)
        model = flexpatch.apply(tiny_model(model_type, variant), backend="dense")
        inputs = model_inputs(model, by_index) | dict(position_ids=rows.position_ids)
        wrong = read(model(**inputs).logits, rows).tokens
        assert (wrong - oracle(model_type, variant).tokens).abs().max() > self.visible

    @parameterized.expand(
        [
            (*case, masks)
            for case in MODELS
            if adapters()[case[0]].masks == "by_layer_type" and has_window(*case)
            for masks in (FULL, SLIDING)
            if set(text_config(tiny_model(*case)).layer_types) != {masks}
        ],
        name_func=name,
    )
    def test_one_mask_for_a_hybrid_is_taken_without_a_word(self, model_type: str, variant: int, layer: str) -> None:
        """transformers gives it to every layer: the windows are lost, or hold everywhere."""
        adapter = adapters()[model_type]
        single = replace(adapter, masks="single", windows=lambda config: {FULL: adapter.windows(config)[layer]})
        wrong = self.tokens(model_type, variant, build_rows([trees()]), single)
        assert (wrong - oracle(model_type, variant).tokens).abs().max() > self.visible

    def test_a_window_of_0_is_no_window(self) -> None:
        """Qwen2-MoE stores 0 when its windows are off; taken at its word nothing would see anything."""
        config = tiny_model("qwen2_moe").config
        assert config.sliding_window == 0, "transformers changed what it stores; look at the Qwen2-MoE window rule"
        assert set(adapters()["qwen2_moe"].windows(config).values()) == {None}
        literal = replace(adapters()["qwen2_moe"], windows=lambda config: dict.fromkeys((FULL, SLIDING), 0))
        wrong = self.tokens("qwen2_moe", 0, build_rows([trees()]), literal)
        assert not (wrong - oracle("qwen2_moe", 0).tokens).abs().max() < self.visible

    def test_a_window_that_no_sequence_reaches_is_dropped(self) -> None:
        """mask_of drops it for speed; it must look at sequence lengths, not at the row's."""
        rows = build_rows([[Tree.of(*random_ids(5, 4, 4)) for _ in range(8)]])
        assert rows.depth == 9
        assert mask_of(rows, 9, torch.bool) is mask_of(rows, None, torch.bool)
        assert mask_of(rows, 8, torch.bool) is not mask_of(rows, None, torch.bool)
