"""Packed rows against separate sequences: log-probs and gradients of every registered architecture.

The oracle is transformers' own model, unpatched, one sequence at a time, in float64. Norms, ropes, routers and eager
softmaxes of transformers ask for float32, which would blow a difference in the last bit up to 1e-7, for some models in
every token and for others once in a while, by the CPU. Both sides keep to float64, so one bound serves all models.
"""

import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.oracle import (
    BOUNDS,
    FIRST,
    MODELS,
    WITHOUT_POSITIONS,
    Result,
    answers_under,
    bounds_of,
    few,
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
from torch import Tensor
from torch.nn import functional

import flexpatch
from flexpatch import Adapter, Rows, Tree, build_rows
from flexpatch.float64 import Float64
from flexpatch.masks import mask_of
from flexpatch.models import adapter_of, tiny_config, tiny_model
from flexpatch.patch import model_inputs
from flexpatch.registry import FULL, SLIDING, adapters, decoder_config
from flexpatch.trials import in_one_batch
from flexpatch.verification import FLOAT64_FACTOR


class Served:
    """A patched model of one kind, on one backend, and the results that its unpatched twin has."""

    def __init__(self, model_type: str, variant: int, backend: str, samples: Callable[[], list[Tree]]) -> None:
        self.kind = model_type, variant
        self.model = flexpatch.apply(tiny_model(model_type, variant), backend=backend)
        self.true = oracle(model_type, variant, lifted=True, samples=samples)
        self.trees = samples()

    def packed(self, rows: Rows, adapter: Adapter | None = None) -> Result:
        with Float64():
            return Result.packed(self.model, rows, adapter)

    def matches(self) -> None:
        """One row of all trees, two rows with padding, and a folded batch, which is one row itself."""
        one, two = build_rows([self.trees]), build_rows([self.trees[:3], self.trees[3:]], pad_id=7)
        assert two.input_ids.numel() > two.tokens, "the second case must have padding"
        for rows in (one, two) if len(self.trees) == len(trees()) else (two,):
            self.packed(rows).matches(self.true)
        self.folded().matches(self.true)

    def folded(self) -> Result:
        """All answers as one ordinary batch, padded on the right, which the patched model folds."""
        with Float64():
            result = Result.of(self.model, flexpatch.separate_logprobs(self.model, self.trees))
        assert flexpatch.savings(self.model).folded == 1
        return result

    def differs(self) -> None:
        """The ways to break a row."""
        one, adapter = build_rows([self.trees]), adapter_of(self.kind[0])
        broken: dict[str, tuple[Rows, Adapter | None]] = {"answers see their siblings": (see_siblings(one), None)}
        if has_window(*self.kind):
            broken["no window"] = one, no_window(adapter)
            broken["a window one token too wide"] = one, wider(adapter, 1)
            broken["a window one token too narrow"] = one, wider(adapter, -1)
        if self.kind not in WITHOUT_POSITIONS:
            broken["positions are row indices"] = packed_positions(one), None
        for what, (rows, other) in broken.items():
            self.packed(rows, other).differs(self.true, what=what)


def has_window(model_type: str, variant: int) -> bool:
    config = decoder_config(tiny_config(model_type, variant))
    windows = adapter_of(model_type).windows(config)
    return any(windows[layer] for layer in getattr(config, "layer_types", None) or windows if layer in windows)


# One of each kind of mask, window, head and class. The slow tests take all variants through what these go through.
KINDS = [
    case
    for case in [
        *(("llama", 0), ("mistral", 1), ("qwen2_moe", 1), ("gemma2", 0), ("gemma3", 0), ("gemma4", 0), ("gemma4", 1)),
        *(("gemma4_unified", 0), ("gpt_oss", 0), ("deepseek_v3", 0), ("phi3", 2)),
    ]
    if case in MODELS
]
# What FlexAttention does differently for: windows, soft caps, shared keys and values, sinks, heads of two sizes.
FLEX = [case for case in KINDS if case[0] not in ("qwen2_moe", "gemma3", "gemma4_unified", "phi3") and case[1] != 1]
FLEX += [("mistral", 1)]
# Every record once by dense masks on few trees, with all negative controls, and each kind on all trees.
RECORDS = [case for case in MODELS if case[0] in FIRST and case[1] == 0 and case not in KINDS]
FAST = [(case, "dense", few) for case in RECORDS]
FAST += [(case, backend, trees) for backend, cases in (("dense", KINDS), ("flex", FLEX)) for case in cases]
ALL = [(case, backend, trees) for backend in ("dense", "flex") for case in MODELS]
VERIFIED = [("mistral", 1)]


@pytest.mark.usefixtures("flex_on_cpu")
class ParityTest(unittest.TestCase):
    """Names end in the backend, so that tests of one model run one after the other: they share its oracle."""

    @parameterized.expand([(*case, backend) for case, backend, samples in FAST if samples is trees], name_func=name)
    def test(self, model_type: str, variant: int, backend: str) -> None:
        self.check(model_type, variant, backend)

    @parameterized.expand([(*case, backend) for case, backend, samples in FAST if samples is few], name_func=name)
    def test_few(self, model_type: str, variant: int, backend: str) -> None:
        self.check(model_type, variant, backend, few)

    @parameterized.expand(
        [(*case, backend) for case, backend, _ in ALL if (case, backend, trees) not in FAST], name_func=name
    )
    @pytest.mark.slow
    def test_all(self, model_type: str, variant: int, backend: str) -> None:
        self.check(model_type, variant, backend)

    def check(self, model_type: str, variant: int, backend: str, samples: Callable[[], list[Tree]] = trees) -> None:
        served = Served(model_type, variant, backend, samples)
        served.matches()
        if backend == "dense":
            served.differs()

    @parameterized.expand(MODELS, name_func=name)
    @pytest.mark.slow
    def test_bounds(self, model_type: str, variant: int) -> None:
        bounds = bounds_of(model_type, variant, lifted=True)
        assert bounds == BOUNDS, f"in float64 the unpatched model itself is {bounds} off in another batch"


@pytest.mark.usefixtures("flex_on_cpu")
class FlexParityTest(unittest.TestCase):
    @parameterized.expand(VERIFIED, name_func=name)
    def test_verifier(self, model_type: str, variant: int) -> None:
        self.verify(model_type, variant)

    @parameterized.expand([case for case in MODELS if case not in VERIFIED], name_func=name)
    @pytest.mark.slow
    def test_verifier_of_all(self, model_type: str, variant: int) -> None:
        self.verify(model_type, variant)

    def verify(self, model_type: str, variant: int) -> None:
        """The verifier breaks rows by itself, and fails where that is not noticed."""
        report = flexpatch.check_parity(tiny_model(model_type, variant), backend="flex")
        assert report.passed, str(report)
        assert report.settings["backend"] == "flex"
        controls = {check.name for check in report.checks if check.margin}
        assert ("control, log-probs: windows dropped" in controls) == has_window(model_type, variant)
        positions = "control, log-probs: packed indices as positions" in controls
        assert positions == ((model_type, variant) not in WITHOUT_POSITIONS)

    @parameterized.expand(KINDS, name_func=name)
    def test_logits_to_keep(self, model_type: str, variant: int) -> None:
        self.keep(model_type, variant)

    # xLSTM and TrOCR keep all logits, whatever they are told.
    @parameterized.expand(
        [case for case in MODELS if case not in KINDS and case[0] not in ("xlstm", "trocr")], name_func=name
    )
    @pytest.mark.slow
    def test_logits_to_keep_of_all(self, model_type: str, variant: int) -> None:
        self.keep(model_type, variant)

    def keep(self, model_type: str, variant: int) -> None:
        """Some text stacks drop tokens before their last layers, in a row the wrong ones; and a bare backbone that is
        told of none must keep all."""
        model = tiny_model(model_type, variant)
        prompt, *answers = random_ids(20, 4, 4, 4)
        batch = dict(input_ids=torch.tensor([prompt + answer for answer in answers]), use_cache=False)
        with torch.no_grad(), Float64():
            before = [model(**batch, logits_to_keep=keep).logits for keep in (0, 2)]
            before.append(model.base_model(**batch).last_hidden_state)
            flexpatch.apply(model, backend="flex")
            after = [model(**batch, logits_to_keep=keep).logits for keep in (0, 2)]
            after.append(model.base_model(**batch).last_hidden_state)
        assert flexpatch.savings(model).folded == 3
        for true, ours in zip(before, after, strict=True):
            assert ours.shape == true.shape
            assert (ours - true).abs().max() <= BOUNDS[0]
        assert (before[1] - before[0][:, :2]).abs().max() > 1000 * BOUNDS[0], "other tokens would not be noticed"

    def test_without_the_soft_cap(self) -> None:
        model = tiny_model("gemma2")
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        flexpatch.apply(model, backend="flex")
        with Float64():
            Result.packed(model, build_rows([trees()])).differs(oracle("gemma2", 0, lifted=True))


class BoundsTest(unittest.TestCase):
    """Bounds of models that keep their float32 steps."""

    def test_they_come_from_the_unpatched_model(self) -> None:
        assert bounds_of("llama") == BOUNDS
        attention, router = bounds_of("gemma2"), bounds_of("solar_open")
        assert 1e-9 < router[0] < attention[0] < 1e-4, (router, attention)

    def test_a_float32_step_that_nobody_listed_widens_them(self) -> None:
        """A linear layer in float32, whose rounding depends on the batch's shape on some CPUs alone: here on all."""
        model = tiny_model("llama")
        layer = model.model.layers[1].mlp.up_proj
        true = Result.of(model, separate(model, trees()))
        forward = layer.forward

        def rounded(hidden: Tensor) -> Tensor:
            return forward(hidden) * (1 + 1e-8 * hidden.shape[0] * hidden.shape[1])

        layer.forward = rounded
        other = Result.of(model, in_one_batch(model, trees())).errors(Result.of(model, separate(model, trees())))
        assert FLOAT64_FACTOR * other[0] > 100 * BOUNDS[0]
        with pytest.raises(AssertionError, match="nat off"):
            Result.of(model, separate(model, trees())).matches(true)
        report = flexpatch.check_parity(model)
        assert all(check.bound > 100 * BOUNDS[0] for check in report.checks if "log-probs" in check.name), str(report)

    def test_on_another_cpu(self) -> None:
        self.on_another_cpu("deepseek_v2")

    @pytest.mark.slow
    def test_on_another_cpu_other_routers(self) -> None:
        self.on_another_cpu("ernie4_5_moe")

    def on_another_cpu(self, model_type: str) -> None:
        """There the rounding of a router in float32 depends on how many tokens come with a token."""
        linear, rows = functional.linear, build_rows([trees()])

        def rounded(hidden: Tensor, *args: Any) -> Tensor:
            out = linear(hidden, *args)
            return out * (1 + 2.0**-22 * (out.shape[:-1].numel() % 5)) if out.dtype == torch.float32 else out

        def errors() -> tuple[float, float]:
            model = tiny_model(model_type)
            true = Result.of(model, separate(model, trees()))
            return Result.packed(flexpatch.apply(model, backend="dense"), rows).errors(true)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "linear", rounded)
            model = tiny_model(model_type)
            true = Result.of(model, separate(model, trees()))
            own = Result.of(model, in_one_batch(model, trees())).errors(true)
            assert 100 * BOUNDS[0] < errors()[0] <= FLOAT64_FACTOR * own[0]
            with Float64():
                assert errors()[0] <= BOUNDS[0] and errors()[1] <= BOUNDS[1]
            report = flexpatch.check_parity(model)
        assert report.passed, str(report)
        assert all(check.bound == BOUNDS[0] for check in report.checks if "log-probs" in check.name)

    def test_a_bound_too_wide_to_show_anything_fails_the_report(self) -> None:
        """A stock model that depends on its batch by a thousandth: the controls are no longer a thousand bounds off."""
        model = tiny_model("llama")
        layer = model.model.layers[1].mlp.up_proj
        forward = layer.forward
        layer.forward = lambda hidden: forward(hidden) * (1 + 1e-3 * hidden.shape[0])
        report = flexpatch.check_parity(model)
        assert not report.passed
        assert "NOT CAUGHT" in str(report)


# Models of two kinds of layers, and the mask of one of them.
HYBRIDS = [
    (*case, masks)
    for case in MODELS
    if adapter_of(case[0]).masks == "by_layer_type" and has_window(*case)
    for masks in (FULL, SLIDING)
    if set(decoder_config(tiny_config(*case)).layer_types) != {masks}
]


class TrapTest(unittest.TestCase):
    """What looks right, runs without an error and is wrong."""

    # How far off, in nats, the usual mistakes are on these models.
    visible = 0.1

    def tokens(self, model_type: str, variant: int, rows: Rows, adapter: Adapter | None = None) -> Tensor:
        model = flexpatch.apply(tiny_model(model_type, variant), backend="dense")
        return answers_under(model, rows, adapter).tokens

    @parameterized.expand(KINDS, name_func=name)
    def test_restarted_positions_alone_do_not_share_a_prompt(self, model_type: str, variant: int) -> None:
        self.restart(model_type, variant)

    @parameterized.expand([case for case in MODELS if case[1] == 0 and case not in KINDS], name_func=name)
    @pytest.mark.slow
    def test_restarted_positions_of_all(self, model_type: str, variant: int) -> None:
        self.restart(model_type, variant)

    def restart(self, model_type: str, variant: int) -> None:
        """Stock packing: transformers sees position_ids restart and starts a new sequence, without the prompt."""
        model = tiny_model(model_type, variant)
        rows = build_rows([trees()])
        with Float64():  # Inkling 2's router has no other way in float64
            logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
        naive = read(logits, rows).tokens
        assert (naive - oracle(model_type, variant, lifted=True).tokens).abs().max() > self.visible

    @parameterized.expand([case for case in KINDS if has_window(*case)], name_func=name)
    def test_windows_count_positions_not_row_indices(self, model_type: str, variant: int) -> None:
        self.window_by_index(model_type, variant)

    @parameterized.expand([case for case in MODELS if has_window(*case) and case not in KINDS], name_func=name)
    @pytest.mark.slow
    def test_windows_of_all_count_positions(self, model_type: str, variant: int) -> None:
        self.window_by_index(model_type, variant)

    def window_by_index(self, model_type: str, variant: int) -> None:
        """By index a later answer is too far from its prompt. Rope still sees the right positions here."""
        rows = build_rows([trees()])
        by_index = packed_positions(rows)
        model = flexpatch.apply(tiny_model(model_type, variant), backend="dense")
        inputs = model_inputs(model, by_index) | dict(position_ids=rows.position_ids)
        wrong = read(model(**inputs).logits, rows).tokens
        assert (wrong - oracle(model_type, variant).tokens).abs().max() > self.visible

    @parameterized.expand([case for case in HYBRIDS if case[:2] in KINDS], name_func=name)
    def test_one_mask_for_a_hybrid_is_taken_without_a_word(self, model_type: str, variant: int, layer: str) -> None:
        self.one_mask(model_type, variant, layer)

    @parameterized.expand([case for case in HYBRIDS if case[:2] not in KINDS], name_func=name)
    @pytest.mark.slow
    def test_one_mask_for_any_hybrid(self, model_type: str, variant: int, layer: str) -> None:
        self.one_mask(model_type, variant, layer)

    def one_mask(self, model_type: str, variant: int, layer: str) -> None:
        """transformers gives it to every layer: the windows are lost, or hold everywhere."""
        adapter = adapter_of(model_type)
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
