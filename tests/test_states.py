"""Mixers that are branched on the row: their functions against single sequences, and models with them."""

import copy
import importlib
import pickle
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.forests import random_rows
from helpers.needs import needs_hybrids
from helpers.oracle import trees
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch import Adapter, Rows, UnsupportedModelError, build_rows, check_parity
from flexpatch.arrival import CALL, GIVEN, Row
from flexpatch.branching import HANDLERS, Branching, plain, unwrap, wrap
from flexpatch.float64 import Float64
from flexpatch.forward import hook_of
from flexpatch.models import adapter_of, tiny_model, tiny_types
from flexpatch.plan import plan_of
from flexpatch.registry import CONVOLUTION, DELTA_RULE, STATE_SPACE, no_mask
from flexpatch.states import by_level, kept_by, takes

needs_hybrids()

FORESTS = 250  # for each of the four functions, of which fast tests take the first
FEW = 30
BOUND = 1e-12
GDN = "transformers.models.qwen3_5.modeling_qwen3_5"
BRANCHED = [each for each in tiny_types() if adapter_of(each).branched]


def row_of(rows: Rows, kind: str) -> Row:
    row = Row(rows.ends.shape[1], None, dense="sdpa", plan=plan_of(rows))
    row.kinds[kind] += 1
    return row


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def convolution(module: Any, x: list[Tensor], **call: Any) -> Tensor:
    out: Tensor = module.causal_conv1d_fn(x[0].transpose(1, 2), x[1], x[2], activation="silu", **call)
    return out.transpose(1, 2)


def delta(module: Any, x: list[Tensor], **call: Any) -> Tensor:
    q, k, v, g, b = x
    settings = dict(use_qk_l2norm_in_kernel=True, chunk_size=8, initial_state=None, output_final_state=False)
    name = "torch_chunk_gated_delta_rule" if g.ndim == 3 else "chunk_kimi_delta_attention"
    out, state = getattr(module, name)(q, k, v, g=-g.exp(), beta=b.sigmoid(), cu_seqlens=None, **settings, **call)
    assert state is None
    return out


def scan(module: Any, x: list[Tensor], **call: Any) -> Tensor:
    hidden, dt, B, C, A, bias, D = x
    limit = (0.05, float("inf"))  # padding would make such a step
    return module.mamba2_chunk_scan(
        hidden, dt, -A.exp(), B, C, chunk_size=16, D=D, z=None, dt_bias=bias, dt_softplus=True, dt_limit=limit,
        initial_states=None, return_final_states=False, **call,
    )  # fmt: skip


# Of each function: its kind, what calls it, its modeling file, the trailing shapes of inputs with one entry for each
# token, and the shapes of its parameters.
FUNCTIONS: dict[str, tuple[str, Callable[..., Tensor], str, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "convolution": (CONVOLUTION, convolution, GDN, [(5,)], [(5, 4), (5,)]),
    "gated delta rule": (DELTA_RULE, delta, GDN, [(2, 4), (2, 4), (4, 3), (4,), (4,)], []),
    "Kimi's delta rule": (
        DELTA_RULE,
        delta,
        "transformers.models.kimi_linear.modeling_kimi_linear",
        [(2, 4), (2, 4), (2, 3), (2, 4), (2,)],
        [],
    ),
    "Mamba-2's scan": (
        STATE_SPACE,
        scan,
        "transformers.models.nemotron_h.modeling_nemotron_h",
        [(4, 3), (4,), (2, 5), (2, 5)],
        [(4,), (4,), (4,)],
    ),
}


def by_sequences(run: Callable[[list[Tensor]], Tensor], tokens: list[Tensor], paths: list[list[int]]) -> Tensor:
    """Outputs of all tokens, each from the first root-to-leaf sequence that holds it, by one padded batch."""
    parents = {path[-2] for path in paths if len(path) > 1}
    leaves = [path for token, path in enumerate(paths) if token not in parents]
    longest = max(map(len, leaves))
    index = torch.tensor([path + path[-1:] * (longest - len(path)) for path in leaves])
    out = run([x.flatten(0, 1)[index] for x in tokens]).flatten(2)
    owners: dict[int, tuple[int, int]] = {}
    for n, path in enumerate(leaves):
        for column, token in enumerate(path):
            owners.setdefault(token, (n, column))
    rows, columns = zip(*(owners[token] for token in range(len(paths))), strict=True)
    return out[list(rows), list(columns)]


class TestFunctions(unittest.TestCase):
    """Values and gradients of 1,000 random forests, against every sequence alone."""

    @parameterized.expand(FUNCTIONS)
    def test_a_row_is_its_sequences(self, name: str) -> None:
        self.check(name, range(FEW))

    @parameterized.expand(FUNCTIONS)
    @pytest.mark.slow
    def test_many_rows_are_their_sequences(self, name: str) -> None:
        self.check(name, range(FEW, FORESTS))

    def check(self, name: str, seeds: range) -> None:
        kind, run, file, of_tokens, others = FUNCTIONS[name]
        module = pytest.importorskip(file)
        worst = 0.0
        for seed in seeds:
            rows, paths, real = random_rows(seed, longest_run=(3, 9, 30)[seed % 3])
            B, L = rows.ends.shape
            tokens = [random(10 * seed + i, B, L, *shape) for i, shape in enumerate(of_tokens)]
            parameters = [random(10 * seed + 7 + i, *shape) for i, shape in enumerate(others)]
            weights = random(3, B * L, 1).detach() * torch.tensor(real)[:, None]
            row = row_of(rows, kind)
            with Float64(), plain([file]):
                wrap([file], row)
                ours = run(module, [*tokens, *parameters], **{CALL: row}).flatten(0, 1).flatten(1)
                assert row.branched == row.kinds
                theirs = by_sequences(lambda x: run(module, [*x, *parameters]), tokens, paths)  # noqa: B023
            inputs = [*tokens, *parameters]
            gradients = [torch.autograd.grad((out * weights).square().sum(), inputs) for out in (ours, theirs)]
            known = torch.tensor(real)
            worst = max(worst, float((ours - theirs).detach()[known].abs().max() / theirs.detach().abs().max()))
            for one, other in zip(*gradients, strict=True):
                worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-3)))
            assert worst < BOUND, (seed, worst)
        unwrap()

    def test_segments_behind_each_other_are_the_padded_groups(self) -> None:
        """The schedule for kernels that take ``cu_seqlens``, with a stand-in for such a kernel."""
        module = importlib.import_module(GDN)
        rule = module.torch_chunk_gated_delta_rule

        def padded(x: list[Tensor], initial: Tensor | None, group: Any) -> Any:
            q, k, v, g, b = x
            return rule(q, k, v, g=g, beta=b, chunk_size=8, initial_state=initial, output_final_state=group.keeps)

        def packed(x: list[Tensor], initial: Tensor | None, group: Any) -> Any:
            outputs, states = [], []
            for i, (start, stop) in enumerate(zip(group.bounds.array[:-1], group.bounds.array[1:], strict=True)):
                own = [each[:, start:stop] for each in x]
                output, state = padded(own, None if initial is None else initial[i : i + 1], group)
                outputs.append(output)
                states.append(state)
            return torch.cat(outputs, 1), torch.cat(states) if group.keeps else None

        for seed in range(20):
            rows, _, _ = random_rows(seed)
            shapes = FUNCTIONS["gated delta rule"][3]
            x = [random(10 * seed + i, *rows.ends.shape, *shape) for i, shape in enumerate(shapes)]
            with Float64():
                x = [*x[:3], -x[3].exp(), x[4].sigmoid()]
                segments = plan_of(rows).segments
                one = by_level(segments, x, padded, varlen=False)
                other = by_level(segments, x, packed, varlen=True)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class TestWrapping(unittest.TestCase):
    def test_other_calls_reach_the_original_without_our_argument(self) -> None:
        seen = []

        def original(*args: Any, **kwargs: Any) -> str:
            seen.append((args, kwargs))
            return "its result"

        wrapped = Branching(original, CONVOLUTION, lambda *_: pytest.fail("it has no row"))
        for call in ({}, {CALL: GIVEN}, {CALL: None}, {CALL: Row(3, None, dense="sdpa")}):
            assert wrapped(1, weight=2, **call) == "its result"
        assert seen == [((1,), {"weight": 2})] * 4

    def test_fused_kernels_are_declined_for_rows_alone(self) -> None:
        _, handler = HANDLERS["mamba2_split_conv1d_scan_combined"]
        wrapped = Branching(lambda *args, **kwargs: "fused", None, handler)
        rows = build_rows([trees()])
        assert wrapped(1, **{CALL: row_of(rows, STATE_SPACE)}) is None
        assert wrapped(1) == "fused"

    def test_a_kernel_tells_whether_it_takes_an_argument(self) -> None:
        module = importlib.import_module(GDN)
        assert takes(module.torch_chunk_gated_delta_rule, "use_qk_l2norm_in_kernel")
        assert not takes(module.torch_chunk_gated_delta_rule, "cu_seqlens"), "torch's own raises if it gets one"

        class Func(nn.Module):
            """As the package ``kernels`` makes one."""

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return func(*args, **kwargs)

        func = module.torch_chunk_gated_delta_rule
        assert kept_by(Func()) == kept_by(func)
        assert takes(Func(), "g") and not takes(Func(), "cu_seqlens")

    def test_plain_functions_are_those_of_torch(self) -> None:
        module = importlib.import_module(GDN)
        before = module.torch_chunk_gated_delta_rule
        with plain([GDN]):
            assert module.torch_chunk_gated_delta_rule is before.__wrapped__
        assert module.torch_chunk_gated_delta_rule is before

    def test_functions_stay_wrapped_while_a_row_may_be_recomputed(self) -> None:
        module = importlib.import_module(GDN)
        before = module.causal_conv1d_fn
        row = row_of(build_rows([trees()]), CONVOLUTION)
        wrap([GDN], row)
        unwrap()
        assert isinstance(module.causal_conv1d_fn, Branching)
        del row
        unwrap()
        assert module.causal_conv1d_fn is before


def scores(model: nn.Module, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs, and gradients of their sum."""
    tokens = flexpatch.answer_logprobs(model, rows).tokens
    tokens.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return tokens.detach(), gradients


def expect_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], bound: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=bound)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, rtol=0, atol=bound * float(gradient.abs().max() + 1e-9))


class TestModels(unittest.TestCase):
    @parameterized.expand(BRANCHED)
    def test_all_mixers_of_records_are_branched(self, model_type: str) -> None:
        model = flexpatch.apply(tiny_model(model_type))
        hook = hook_of(model)
        assert hook is not None and hook.branches is not None
        counts = list(hook.branches.kinds.values())
        others = [name for name in adapter_of(model_type).unshared if name not in hook.branches.branched]
        left = {name for module in model.modules() for name in [type(module).__name__] if name in others}
        assert counts and bool(hook.mixers) == bool(left)
        assert counts == [counts[0]] * len(counts), "each mixer calls each function once"

    @parameterized.expand([kind for kind in ("qwen3_5_text", "nemotron_h", "mamba2", "lfm2") if kind in BRANCHED])
    def test_parity_with_all_controls(self, model_type: str) -> None:
        report = check_parity(tiny_model(model_type))
        assert report.passed, report
        names = " ".join(check.name for check in report.checks)
        for control in ("branched and unshared", "another sequence", "left on the row", "convolutions not branched"):
            assert control in names
        if model_type != "lfm2":
            for control in ("through siblings", "from zero", "no gradient to parents"):
                assert control in names

    def test_parity_of_the_other_way(self) -> None:
        report = check_parity(tiny_model("qwen3_5_text"), mixers="unshared")
        assert report.passed, report
        assert "left on the row" in str(report) and "siblings" not in str(report).replace("see each other", "")

    @parameterized.expand([(True,), (False,)])
    def test_checkpointing_gives_the_same_bits(self, reentrant: bool) -> None:
        rows = build_rows([trees()])
        model = flexpatch.apply(tiny_model("qwen3_5_text")).train()
        plainly = scores(model, rows)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        expect_same(scores(model, rows), plainly, 0.0)

    def test_backward_after_another_row_and_after_remove(self) -> None:
        """The row travels with the call: neither the next forward nor remove changes what is recomputed."""
        rows, others = build_rows([trees()]), build_rows([trees()[::-1]])
        model = flexpatch.apply(tiny_model("qwen3_5_text")).train()
        plainly = scores(model, rows)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = flexpatch.answer_logprobs(model, rows).tokens
        flexpatch.answer_logprobs(model, others)
        flexpatch.remove(model)
        tokens.sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, plainly[1][name]), name

    def test_both_ways_agree(self) -> None:
        rows = build_rows([trees()[:3], trees()[3:]])
        model = tiny_model("qwen3_5_text")
        with Float64():
            branched = scores(flexpatch.apply(model), rows)
            unshared = scores(flexpatch.apply(model, mixers="unshared"), rows)
        hook = hook_of(model)
        assert hook is not None and hook.branches is not None and hook.mixers == 3 and not hook.branches.kinds
        expect_same(branched, unshared, 1e-10)

    def test_generation_and_caches_are_bit_identical(self) -> None:
        model = tiny_model("qwen3_5_text")
        ids = torch.randint(3, 150, (2, 9), generator=torch.Generator().manual_seed(0))
        stock = model(ids, use_cache=True).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
        flexpatch.apply(model, fold=False)
        scores(model, build_rows([trees()]))  # its functions are wrapped now
        ours = model(ids, use_cache=True).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])

    def test_remove_leaves_modules_and_files_as_they_were(self) -> None:
        model = tiny_model("qwen3_5_text")
        module = importlib.import_module(GDN)
        functions = {name: getattr(module, name) for name in HANDLERS if hasattr(module, name)}
        scores(flexpatch.apply(model), build_rows([trees()]))
        assert any(isinstance(getattr(module, name), Branching) for name in functions)
        flexpatch.remove(model)
        assert {name: getattr(module, name) for name in functions} == functions
        assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())

    def test_copies_and_pickles_branch_too(self) -> None:
        rows = build_rows([trees()])
        model = flexpatch.apply(tiny_model("qwen3_5_text"))
        want = scores(model, rows)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expect_same(scores(other, rows), want, 0.0)


def of_another_library(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that drops what it does not know."""
    return lambda *args, **kwargs: function(*args, **{name: x for name, x in kwargs.items() if name != CALL})


class TestRefusals:
    def test_functions_that_others_replaced_later_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A function that drops our argument would run through all siblings, and nobody would see it."""
        module = importlib.import_module(GDN)
        rule = module.torch_chunk_gated_delta_rule
        model = flexpatch.apply(tiny_model("qwen3_5_text"))
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", of_another_library(rule))
        with pytest.raises(UnsupportedModelError, match=r'0 of 3 delta rule calls.*mixers="unshared"'):
            flexpatch.answer_logprobs(model, build_rows([trees()]))

    def test_functions_that_others_replaced_before_are_not_branched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module(GDN)
        rule = module.torch_chunk_gated_delta_rule
        rows = build_rows([trees()])
        model = tiny_model("qwen3_5_text")
        with Float64():
            want = scores(flexpatch.apply(model), rows)
            monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", of_another_library(rule))
            expect_same(scores(flexpatch.apply(model), rows), want, 1e-10)
        hook = hook_of(model)
        assert hook is not None and hook.mixers == 3
        flexpatch.remove(model)
        with pytest.raises(UnsupportedModelError, match="another library replaced torch_chunk_gated_delta_rule"):
            flexpatch.apply(model, mixers="branched")
        assert not flexpatch.is_applied(model)

    def test_unknown_ways(self) -> None:
        with pytest.raises(flexpatch.FlexpatchError, match="mixers='both'; expected one of auto, branched, unshared"):
            flexpatch.apply(tiny_model("qwen3_5_text"), mixers="both")

    def test_records_that_branch_what_they_do_not_name(self) -> None:
        for branched in ({"Other": (CONVOLUTION,)}, {"Mixer": ("attention",)}):
            record = Adapter(name="Odd", masks="none", tiny={}, unshared={"Mixer": no_mask}, branched=branched)
            with pytest.raises(flexpatch.FlexpatchError, match=r"Odd adapter's branched has (Other|attention)"):
                flexpatch.register(record)
