"""What only a GPU can show: compiled kernels, low precision, compile counts, and the cost of masks.

Run with ``pytest -m gpu tests/gpu``.
"""

import copy

import pytest
import torch
from helpers.attention import dense_attention, trees
from parameterized import parameterized
from torch import Tensor
from torch.nn import functional as F

import flexpatch
from benchmarks.masks import mask_cost, recompiles
from flexpatch.attention import flex
from flexpatch.masks import block_mask, dense_mask
from flexpatch.models import tiny_model, tiny_types, variants
from flexpatch.parity import check_parity
from flexpatch.report import Report
from flexpatch.rows import build_rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
DEVICE = torch.device("cuda")
VARIANTS = [(t, v) for t in tiny_types() for v in range(len(variants(t)))]


@parameterized.expand([(*variant, dtype) for variant in VARIANTS for dtype in (torch.float32, torch.bfloat16)])
def test_parity_through_compiled_flex(model_type: str, variant: int, dtype: torch.dtype) -> None:
    """A router that sends a single token elsewhere is off by a whole expert, in the unpatched model too: such models
    may miss a bound with one seed of five (benchmarks/noise.py looks closer)."""

    def report(seed: int) -> Report:
        model = tiny_model(model_type, variant, dtype=dtype, seed=seed).to(DEVICE)
        return check_parity(model, seed=seed)

    first = report(0)
    assert first.settings["backend"] == "flex"
    if not first.passed and any("experts" in name for name, _ in tiny_model(model_type, variant).named_modules()):
        controls = [check for check in first.checks if check.margin is not None or check.name.startswith("leak")]
        assert all(check.passed for check in controls), str(first)
        assert all(other.passed for other in map(report, range(1, 5))), str(first)
        return
    assert first.passed, str(first)


@parameterized.expand([("gemma2", True), ("gemma2", False), ("mistral", True), ("mistral", False)])
def test_parity_under_checkpointing(model_type: str, reentrant: bool) -> None:
    """The soft cap is a non-linear score_mod: uncompiled, it would break under non-reentrant checkpointing."""
    model = tiny_model(model_type, 0, dtype=torch.float32).to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    report = check_parity(model)
    assert report.passed, str(report)


@parameterized.expand([(64, 9, 3), (96, 4, 4), (128, 28, 4), (256, 8, 1), (128, 14, 2)])
def test_heads(head_dim: int, heads: int, kv_heads: int) -> None:
    """Forward and backward of one attention call against a dense float64 softmax."""
    rows = build_rows([trees((300, 90, 41), (7, 1, 200))]).to(DEVICE)
    length = rows.input_ids.shape[1]
    q, k, v = (
        torch.randn(1, h, length, head_dim, device=DEVICE, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    )
    weight = torch.randn(1, length, heads, head_dim, device=DEVICE)
    for window in (None, 64):
        out = flex(q, k, v, block_mask(rows.ends, rows.position_ids, window), softcap=20.0)
        ours = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
        truth = dense_attention(q, k, v, dense_mask(rows.ends, rows.position_ids, window), 20.0)
        theirs = [truth, *torch.autograd.grad((truth * weight).sum(), (q, k, v))]
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() / b.norm() < 1e-5


@parameterized.expand(
    [(512, 512, torch.bfloat16), (512, 512, torch.float32), (192, 128, torch.bfloat16), (256, 256, torch.bfloat16)]
)
def test_large_heads(size: int, value_size: int, dtype: torch.dtype) -> None:
    """Gemma 4's full layers (512) and DeepSeek's (192, and 128 for values): as close to a float64 softmax as a dense
    one in the same precision, times two."""
    rows = build_rows([trees((300, 90, 41), (7, 1, 200))]).to(DEVICE)
    length = rows.input_ids.shape[1]
    shapes = ((8, size), (2, size), (2, value_size))
    q, k, v = (torch.randn(1, h, length, d, device=DEVICE, dtype=dtype, requires_grad=True) for h, d in shapes)
    weight = torch.randn(1, length, 8, value_size, device=DEVICE)
    seen = dense_mask(rows.ends, rows.position_ids, None)

    def results(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]

    truth = results(dense_attention(q, k, v, seen))
    stock = results(F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2))
    ours = results(flex(q, k, v, block_mask(rows.ends, rows.position_ids, None)))
    for mine, theirs, true in zip(ours, stock, truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()


def test_autocast_runs_flex_in_low_precision() -> None:
    """Under autocast, rope and norms hand fp32 queries and keys to attention: those kernels would be 4 to 12 times
    slower. Ours is at most twice as far from the truth as the stock model."""
    samples = trees((200, 61, 33), (40, 5, 90))
    model = tiny_model("qwen3", 0, dtype=torch.float32).to(DEVICE)
    truth = flexpatch.separate_logprobs(copy.deepcopy(model).double(), samples).tokens
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        stock = flexpatch.separate_logprobs(model, samples).tokens
        ours = flexpatch.answer_logprobs(flexpatch.apply(model), build_rows([samples]).to(DEVICE)).tokens
    assert (ours - truth).abs().mean() <= 2 * (stock - truth).abs().mean()
    q, k = (torch.randn(1, 2, 128, 64, device=DEVICE) for _ in range(2))
    rows = build_rows([trees((100, 20, 8))]).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        out = flex(q, k, torch.randn_like(k, dtype=torch.bfloat16), block_mask(rows.ends, rows.position_ids, None))
    assert out.dtype == torch.bfloat16


def test_generation_is_unchanged() -> None:
    model = tiny_model("mistral", 1, dtype=torch.float32).to(DEVICE)
    prompt = torch.randint(3, 151, (2, 20), device=DEVICE)
    settings = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt))
    before = model.generate(prompt, **settings)
    assert torch.equal(before, flexpatch.apply(model).generate(prompt, **settings))


def test_a_mask_of_65536_tokens_costs_little() -> None:
    cost = mask_cost(65536, DEVICE)
    assert max(cost["ms"], cost["window_ms"]) < 5, cost
    assert cost["mb"] < 50, cost


def test_no_more_graphs_than_buckets() -> None:
    compiled = recompiles(200, DEVICE)
    assert compiled["graphs"] <= compiled["buckets"], compiled


def test_the_same_bits_in_every_run() -> None:
    """Triton flex and our sums are deterministic: two identical steps give identical gradients."""
    model = flexpatch.apply(tiny_model("llama", 0, dtype=torch.bfloat16).to(DEVICE))
    rows = build_rows([trees((200, 61, 33), (40, 5, 90))]).to(DEVICE)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        flexpatch.dpo_loss(flexpatch.answer_logprobs(model, rows).answers).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    embeddings = 1  # torch's kernel for their backward is not always deterministic: test_determinism.py
    assert all(torch.equal(a, b) for a, b in list(zip(*gradients, strict=True))[embeddings:])
