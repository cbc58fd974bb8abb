"""flex() against a plain softmax, and what it compiles.

Shapes: B rows, H query heads, G key/value heads, L tokens, D head size.
"""

import unittest
from typing import Any

import pytest
import torch
from helpers.oracle import name, random_ids, see_siblings
from parameterized import parameterized
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import flexpatch
from flexpatch import FlexpatchError, Rows, Tree, UnsupportedModelError, attention, build_rows, fa4
from flexpatch.attention import flex
from flexpatch.devices import LARGE, Card
from flexpatch.masks import block_mask, bucket, dense_mask
from flexpatch.models import tiny_model


def rows_of(*lengths: int) -> Rows:
    """One row for each length, of trees whose answers, shared beginnings and prompts are uneven."""
    bins = []
    for seed, length in enumerate(lengths):
        trees, left = [], length
        while left > 60:
            p, a, b = random_ids(left // 4, left // 6, left // 9 + 1, seed=seed + left)
            trees.append(Tree.of(p, [3, *a], [4, *b]))
            left -= len(p) + len(a) + len(b) + 2
        bins.append([*trees, *([Tree(random_ids(left)[0])] if left else [])])
    rows = build_rows(bins)
    assert rows.input_ids.shape == (len(lengths), max(lengths))
    return rows


SINKS = torch.tensor([0.5, -1.0, 2.0, 4.0], dtype=torch.float64)


def mask_of(rows: Rows, window: int | None = None) -> Any:
    return block_mask(rows.ends, rows.position_ids, window)


def random_qkv(B: int, H: int, G: int, L: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, heads, L, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (H, G, G)
    ]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The definition, in float64. ``mask`` is (B, 1, L, L) bool; the output is (B, L, H, D)."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:  # one more column, without a value
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        v = F.pad(v, (0, 0, 0, 1))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def with_gradients(out: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), qkv)]


@torch.no_grad()
def error(some: list[Tensor], true: list[Tensor]) -> float:
    """Largest relative error of the output and of the three gradients. For one token two of these are zero."""
    return max(
        float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1))
        for x, y in zip(some, true, strict=True)
    )


@pytest.mark.usefixtures("flex_on_cpu")
class SoftmaxTest(unittest.TestCase):
    """Output and gradients against the definition, in float64."""

    bound = 1e-13

    def check(
        self, H: int, G: int, D: int, lengths: list[int], window: int | None = None, **options: float | None
    ) -> None:
        rows = rows_of(*lengths)
        qkv = random_qkv(len(lengths), H, G, max(lengths), D)
        true = with_gradients(softmax_attention(*qkv, self.dense(rows, window), **options), qkv)
        ours = with_gradients(flex(*qkv, mask_of(rows, window), **options), qkv)
        assert ours[0].shape == (len(lengths), max(lengths), H, D) and ours[0].is_contiguous()
        assert ours[0].dtype == torch.float64
        # A compiled log-sum-exp is float32.
        bound = 1e-7 if "s_aux" in options else self.bound
        assert error(ours, true) < bound, error(ours, true)
        if max(lengths) > 60:  # shorter rows here share nothing
            wrong = with_gradients(flex(*qkv, mask_of(see_siblings(rows), window), **options), qkv)
            assert error(wrong, true) > 1e-2, "the control must see a wrong mask"

    def dense(self, rows: Rows, window: int | None) -> Tensor:
        return dense_mask(rows.ends, rows.position_ids, window)

    @parameterized.expand(
        [
            (4, 4, 16),
            (4, 1, 64),
            (8, 8, 256),  # Gemma
            (9, 3, 64),
            (4, 4, 96),  # Phi 3
        ],
        name_func=name,
    )
    def test_heads(self, H: int, G: int, D: int) -> None:
        self.check(H, G, D, [150])

    @parameterized.expand(
        [
            (4, 2, 64),
            (24, 8, 128),  # 24 query heads: Llama 3.2 3B
            (28, 4, 128),  # Qwen2 7B
            (14, 2, 64),  # Qwen2 0.5B
        ],
        name_func=name,
    )
    @pytest.mark.slow
    def test_more_heads(self, H: int, G: int, D: int) -> None:
        self.check(H, G, D, [150])

    @parameterized.expand([(1,), (128,), (129,), (300,)], name_func=name)
    def test_lengths(self, length: int) -> None:
        self.check_length(length)

    @parameterized.expand([(2,), (100,), (127,), (640,)], name_func=name)
    @pytest.mark.slow
    def test_more_lengths(self, length: int) -> None:
        self.check_length(length)

    def check_length(self, length: int) -> None:
        self.check(2, 1, 16, [length])
        self.check(2, 1, 16, [length], window=8)

    @parameterized.expand(
        [
            ("softcap", dict(softcap=2.0)),
            ("scaling", dict(scaling=0.4)),
            ("both", dict(softcap=3.0, scaling=1.0)),
            ("window", dict(window=17)),
            ("sinks", dict(s_aux=SINKS)),
            ("all", dict(softcap=3.0, scaling=1.0, window=17, s_aux=SINKS)),
        ]
    )
    def test_options(self, _: str, options: dict[str, Any]) -> None:
        self.check(4, 2, 16, [200], **options)
        plain = {option: value for option, value in options.items() if option != "window"}
        rows, qkv = rows_of(200), random_qkv(1, 4, 2, 200, 16)
        true = softmax_attention(*qkv, self.dense(rows, None))
        ours = flex(*qkv, mask_of(rows, options.get("window")), **plain)
        assert error([ours], [true]) > 1e-3, "the options must matter"

    def test_gradients_of_sinks(self) -> None:
        """They come through the log-sum-exp alone."""
        rows, qkv = rows_of(200), random_qkv(1, 4, 2, 200, 16)
        sinks = SINKS.clone().requires_grad_()
        ours = with_gradients(flex(*qkv, mask_of(rows), s_aux=sinks), [sinks])
        true = with_gradients(softmax_attention(*qkv, self.dense(rows, None), s_aux=sinks), [sinks])
        assert error(ours, true) < 1e-6  # a compiled log-sum-exp is float32
        assert true[1].norm() > 1e-3

    def test_rows_of_different_lengths(self) -> None:
        self.check(4, 2, 16, [200, 140, 61])

    @parameterized.expand([(None,), (8,)], name_func=name)
    def test_padding_is_finite_and_sees_itself_alone(self, window: int | None) -> None:
        """A row without any visible key would give NaN, and in backward spread it over the batch."""
        rows = rows_of(300, 61)
        qkv = random_qkv(2, 4, 2, 300, 16)
        out, *gradients = with_gradients(flex(*qkv, mask_of(rows, window)), qkv)
        assert all(x.isfinite().all() for x in (out, *gradients))
        own = qkv[2][1, :, 61:].repeat_interleave(2, 0).transpose(0, 1)
        assert torch.equal(out[1, 61:], own), "a padding token attends to itself"


@pytest.mark.usefixtures("flex_on_cpu")
class DtypeTest(unittest.TestCase):
    def dtypes(self, call: Any) -> set[torch.dtype]:
        """The dtypes of the queries, keys and values that reach the kernel."""
        seen: set[torch.dtype] = set()
        compiled = attention._compiled()

        def spy(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
            seen.update({q.dtype, k.dtype, v.dtype})
            return compiled(q, k, v, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_compiled", lambda: spy)
            call()
        return seen

    @parameterized.expand([(True,), (False,)], name_func=name)
    def test_mixed_dtypes_become_one(self, autocast: bool) -> None:
        """Rope and norms promote q and k to float32. Kernels for float32 are several times slower."""
        rows = rows_of(150)
        q, k, v = (
            x.detach().to(dtype)
            for x, dtype in zip(
                random_qkv(1, 4, 2, 150, 16), (torch.float32, torch.float32, torch.bfloat16), strict=True
            )
        )
        results = []

        def call() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                results.append(flex(q, k, v, mask_of(rows)))

        assert self.dtypes(call) == {torch.bfloat16}
        (out,) = results
        assert out.dtype == torch.bfloat16
        mask = dense_mask(rows.ends, rows.position_ids, None)
        true = softmax_attention(q, k, v, mask)
        stock = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v, mask, enable_gqa=True).transpose(1, 2)
        assert error([out], [true]) <= 2 * error([stock], [true])

    @parameterized.expand([(torch.float32,), (torch.bfloat16,), (torch.float16,)], name_func=name)
    def test_the_dtype_is_kept(self, dtype: torch.dtype) -> None:
        qkv = random_qkv(1, 4, 2, 150, 16, dtype)
        assert self.dtypes(lambda: flex(*qkv, mask_of(rows_of(150)))) == {dtype}
        assert flex(*qkv, mask_of(rows_of(150))).dtype == dtype

    def test_gradients_return_in_their_own_dtypes(self) -> None:
        q, k, v = random_qkv(1, 4, 2, 150, 16, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            flex(q, k, v.bfloat16(), mask_of(rows_of(150))).float().sum().backward()
        assert {x.grad.dtype for x in (q, k, v)} == {torch.float32}


class RefusalTest(unittest.TestCase):
    """Before anything is compiled."""

    def setUp(self) -> None:
        self.mask = mask_of(rows_of(150))

    def test_dropout(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"attention dropout 0.1 is not exact.*attention_dropout=0.0"):
            flex(*random_qkv(1, 4, 2, 150, 16), self.mask, dropout=0.1)

    def test_flash_attention_4_must_be_installed(self) -> None:
        def fails(name: str) -> None:
            raise ImportError(f"No module named '{name}'")

        fa4.check_fa4.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fa4, "import_module", fails)
            with pytest.raises(FlexpatchError, match=r"pip install 'flexpatch\[fa4\]'.*does not import here"):
                flexpatch.apply(tiny_model("llama"), backend="fa4")
            patch.setattr(fa4, "import_module", lambda name: None)
            patch.setattr(fa4.metadata, "version", lambda name: "4.0.0b11")
            with pytest.raises(FlexpatchError, match=r"4.0.0b11 has given wrong gradients"):
                flexpatch.apply(tiny_model("llama"), backend="fa4")

    def test_what_flash_attention_4_cannot_do(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for module in (flexpatch.dispatch, flexpatch.row_calls):
                patch.setattr(module, "check_fa4", lambda: None)
            for model_type, why in (("llama", "have 16"), ("gemma2", "caps its attention scores")):
                with pytest.raises(UnsupportedModelError, match=why):
                    flexpatch.apply(tiny_model(model_type), backend="fa4")
            patch.setattr(attention, "FA4_HEADS", (16,))
            rows = build_rows([[Tree([3] * 200, children=[Tree([4] * 100)])]])
            for compiled in (False, True):
                model = flexpatch.apply(tiny_model("mistral", 1, dtype=torch.bfloat16), backend="fa4", compile=compiled)
                with pytest.raises(FlexpatchError, match="fa4' runs on Hopper GPUs, not on cpu"):
                    flexpatch.answer_logprobs(model, rows)
            hopper = torch.device("cuda")
            patch.setattr(fa4, "card_of", lambda device: Card("cuda", "an H100", (9, 0)))
            fa4.check_fa4_call(hopper, torch.bfloat16, [None, 300], 300)
            with pytest.raises(UnsupportedModelError, match="300 tokens reach beyond this model's window of 299"):
                fa4.check_fa4_call(hopper, torch.bfloat16, [None, 299], 300)
            with pytest.raises(UnsupportedModelError, match=r"in 16 bits, and this model in torch\.float32"):
                fa4.check_fa4_call(hopper, torch.float32, [None], 300)
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
            with pytest.raises(FlexpatchError, match="no fixed order"):
                fa4.check_fa4_call(hopper, torch.bfloat16, [None], 300)
            for other in (Card("cuda", "an A100", (8, 0)), Card("rocm", "an MI300")):
                patch.setattr(fa4, "card_of", lambda device, other=other: other)
                with pytest.raises(FlexpatchError, match=f"runs on Hopper GPUs, not on {other.name}"):
                    fa4.check_fa4_call(hopper, torch.bfloat16, [None], 300)

    def test_attention_sinks_on_fa4(self) -> None:
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="gives sinks no gradient"):
            flex(*random_qkv(1, 4, 2, 150, 64), self.mask, s_aux=SINKS, fa4=True)

    @parameterized.expand(
        [
            ("mask_of_shorter_rows", 1, 300, 300),
            ("mask_of_longer_rows", 1, 40, 40),
            ("cached_keys", 1, 150, 200),
            ("one_step_of_generation", 1, 1, 150),
            ("mask_of_two_rows_for_three", 3, 150, 150),
        ]
    )
    def test_masks_of_other_rows(self, _: str, B: int, queries: int, keys: int) -> None:
        mask = mask_of(rows_of(150, 150)) if B == 3 else self.mask
        q = random_qkv(B, 4, 2, queries, 16)[0]
        _, k, v = random_qkv(B, 4, 2, keys, 16)
        with pytest.raises(FlexpatchError, match=r"block mask is for \d rows of up to 256 tokens.*use_cache=False"):
            flex(q, k, v, mask)

    def test_one_mask_for_several_rows(self) -> None:
        """Its rule reads the ends of each row, and has those of one."""
        with pytest.raises(FlexpatchError, match="block mask is for 1 rows of up to 256 tokens"):
            flex(*random_qkv(3, 4, 2, 150, 16), self.mask)

    def test_what_it_does_not_know_is_ignored(self) -> None:
        """Models pass their own keyword arguments along; an empty sink is none."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_compiled", lambda: lambda q, *_: q)
            qkv = [x.detach() for x in random_qkv(1, 4, 2, 150, 16)]
            out = flex(*qkv, self.mask, s_aux=None, sliding_window=8, position_ids=None, use_cache=False)
        assert torch.equal(out, qkv[0].transpose(1, 2))


@pytest.fixture
def graphs(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Counts compilations in ``self.count``, from none."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention._attend, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(attention, "_compiled", lambda: compiled)
    request.instance.counter = counter


@pytest.mark.usefixtures("graphs")
class CompilationTest(unittest.TestCase):
    """Torch stops compiling after 8 variants and goes on uncompiled, which is slow, needs O(L^2) memory and can be
    wrong in backward. So there must be few variants, and a limit that is loud."""

    counter: CompileCounterWithBackend

    @property
    def count(self) -> int:
        return self.counter.frame_count

    def run_flex(self, length: int, window: int | None = None, training: bool = False) -> None:
        rows = rows_of(length)
        qkv = [x.detach().requires_grad_(training) for x in random_qkv(1, 2, 1, length, 16, torch.float32)]
        out = flex(*qkv, mask_of(rows, window))
        if training:
            out.sum().backward()

    def test_one_graph_a_bucket_and_none_falls_back(self) -> None:
        lengths = [100, 250, 300, 400, 500, 600, 700, 800, 900, 1100, 1200, 1500]
        buckets = {bucket(length) for length in lengths}
        assert len(buckets) > 8 == torch._dynamo.config.recompile_limit
        for length in lengths + lengths:
            self.run_flex(length)
        assert self.count == len(buckets)
        assert torch._dynamo.config.recompile_limit == 8, "the limit is raised for our calls alone"

    def test_passing_the_limit_is_an_error(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "RECOMPILE_LIMIT", 2)
            self.run_flex(100)
            self.run_flex(200)
            with pytest.raises(FailOnRecompileLimitHit):
                self.run_flex(300)
        assert self.count == 2

    def test_masks_lengths_of_a_bucket_and_windows_share_graphs(self) -> None:
        for training, expected in ((True, 1), (False, 2)):
            for length in (520, 570, 640):
                assert bucket(length) == 640
                self.run_flex(length, training=training)
                assert self.count == expected, "another mask or length of the same bucket compiled anew"
        for training, expected in ((True, 3), (False, 4)):
            for window in (8, 16, 300):
                self.run_flex(600, window=window, training=training)
                assert self.count == expected, "another window compiled anew"

    def test_a_row_that_fills_its_bucket_shares_its_graph(self) -> None:
        """Packing often fills rows to the last token; models hand over transposed views, padding makes copies."""
        model = flexpatch.apply(tiny_model("llama"), backend="flex")
        for length in (250, 256):
            rows = build_rows([[Tree.of(*random_ids(length - 50, 30, 20))]])
            assert rows.input_ids.shape == (1, length)
            flexpatch.answer_logprobs(model, rows).answers.sum().backward()
        assert self.count == 1

    def test_layers_steps_and_modes_share_graphs(self) -> None:
        """Four layers, of two kinds; new rows every step; training and evaluation in turn."""
        model = flexpatch.apply(tiny_model("gemma3_text"), backend="flex")
        counts = []
        for step in range(3):
            rows = build_rows([[Tree.of(*random_ids(150 + step, 30, 20, seed=step))]])
            flexpatch.answer_logprobs(model.train(), rows).answers.sum().backward()
            with torch.no_grad():
                flexpatch.answer_logprobs(model.eval(), rows)
                flexpatch.answer_logprobs(model.train(), rows)
            flexpatch.answer_logprobs(model.eval(), rows).answers.sum().backward()
            counts.append(self.count)
        assert counts == [4, 4, 4], "expected one graph for (full, windowed) x (gradients, none)"


@pytest.mark.usefixtures("flex_on_cpu")
class KernelOptionsTest(unittest.TestCase):
    """Tiles that fit a device are constants of the graph: none is compiled for them, and no graph breaks."""

    @parameterized.expand([(size, whole) for size in (16, 512) for whole in (True, False)], name_func=name)
    def test_they_reach_the_kernels(self, size: int, whole: bool) -> None:
        seen: list[dict[str, Any]] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            calls = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention]
            seen.extend(argument for node in calls for argument in node.args if isinstance(argument, dict))
            return graph

        torch._dynamo.reset()
        mask = mask_of(rows_of(150))
        function = flex if whole else attention._attend  # compiled layers hold all of it
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(attention, "_compiled", lambda: compiled)
            for _ in range(3):
                qkv = [x.detach() for x in random_qkv(1, 2, 1, 150, size, torch.bfloat16)]
                (compiled if whole else flex)(*qkv, mask)
        (options,) = seen
        expected = dict(LARGE) if size == 512 else {}
        assert {name: value for name, value in options.items() if name.startswith(("fwd_", "bwd_"))} == expected


class RealCompilationTest(unittest.TestCase):
    """Without the fixture."""

    def test_training_on_the_cpu_is_an_error_and_not_a_fallback(self) -> None:
        with pytest.raises(FlexpatchError, match=r"no backward on the CPU.*backend='dense'"):
            flex(*random_qkv(1, 2, 1, 150, 16, torch.float32), mask_of(rows_of(150)))

    def test_compiled_layers_say_so_too(self) -> None:
        """Torch meets the error while it traces a layer."""
        model = flexpatch.apply(tiny_model("llama", dtype=torch.float32), backend="flex", compile=True)
        with pytest.raises(FlexpatchError, match=r"^FlexAttention has no backward on the CPU.*backend='dense'"):
            model(torch.ones(2, 40, dtype=torch.long), use_cache=False)

    @pytest.mark.slow
    def test_inductor_on_the_cpu(self) -> None:
        """The generated kernel, forward; needs a C++ compiler."""
        rows, qkv = rows_of(300), random_qkv(1, 4, 2, 300, 16, torch.float32)
        with torch.no_grad():
            out = flex(*qkv, mask_of(rows, 17), softcap=3.0)
        true = softmax_attention(*qkv, dense_mask(rows.ends, rows.position_ids, 17), softcap=3.0)
        assert error([out], [true]) < 1e-6
