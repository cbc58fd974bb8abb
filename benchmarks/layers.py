"""Measures the speed-up of one layer by shared prompts: figures 3 to 5 of arXiv 2410.20305, in Mistral-7B's shape.

    python benchmarks/layers.py                    # on a GPU; writes layers.json, layers.png and table.md to --output
    python benchmarks/layers.py --check 200        # every attention kernel against float64; exit code 1 if one is wrong
    python benchmarks/layers.py --tune             # block sizes of the Triton kernels
    python benchmarks/layers.py --device cpu --dtype float32 --prompts 128 --ratios 1 --tokens 512    # a dry run

Forward and backward (on a CPU: forward) of the MLP, of attention alone and of the attention layer, for pairs of two
answers of c tokens to a prompt of p tokens: as two sequences of p + c each, or as one tree of p + 2c. Speed-ups are
over the fastest kernel for separate sequences; *share* is the speed-up of attention divided by the ideal one.

Attention alone gets q, k and v in the order that each kernel prefers: tokens first, for FlexAttention heads first.
Gathered kernels are ordinary variable-length kernels, with keys and values copied for every answer. The time includes
the copies.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm
from transformers.models.mistral import modeling_mistral as mistral

from flexpatch.attention import flex
from flexpatch.masks import BLOCK, block_mask, bucket, dense_mask
from flexpatch.rows import build_rows
from flexpatch.tree import Tree

SHAPE = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336)
SMALL = dict(hidden_size=512, num_attention_heads=4, num_key_value_heads=1, head_dim=128, intermediate_size=1792)
TOLERANCE = 2e-2  # relative norm; bfloat16 kernels err by a few thousandths
Kernel = Callable[..., Tensor]  # (q, k, v: (T, heads, D), row) -> (T, heads, D)
Pair = tuple[int, int, int]  # tokens of a prompt, of the chosen and of the rejected answer


class TimeUpError(Exception):
    """Raised when the budget of ``--seconds`` is spent."""


@dataclass
class Setup:
    device: torch.device
    dtype: torch.dtype
    shape: dict[str, int]
    tokens: int
    deadline: float
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def train(self) -> bool:
        return self.device.type == "cuda"  # flex has no backward on the CPU


@dataclass
class Row:
    """Pairs laid end to end (T tokens), with the arguments of the kernels. ``gather`` is for trees alone."""

    ends: Tensor
    positions: Tensor
    mask: BlockMask
    sequences: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    gather: list[Tensor]

    @property
    def tokens(self) -> int:
        return self.ends.shape[1]


def pairs_in_batch(prompt: int, completion: int, tokens: int) -> int:
    """Count pairs that make at least ``tokens`` tokens of separate sequences.

    The count is chosen whose rows, of trees above all, have the least padding for the pairs of tokens that attention
    visits.
    """
    lengths = 2 * (prompt + completion), prompt + 2 * completion
    separate_area = (prompt + completion) * (prompt + completion + BLOCK)
    areas = separate_area, separate_area - prompt**2 / 2
    least = -(-tokens // lengths[0])

    def padding(pairs: int) -> float:
        paired, shared = (bucket(pairs * n) / pairs - n for n in lengths)
        return paired / areas[0] + 3 * shared / areas[1]

    return min(range(least, max(least, 3 * tokens // (2 * lengths[0])) + 1), key=padding)


def make_row(setup: Setup, pairs: Sequence[Pair], shared: bool) -> Row:
    if shared:
        trees = [Tree.of([1] * p, [2] * c, [3] * r) for p, c, r in pairs]
        queries, keys = [n for pair in pairs for n in pair], [n for p, c, r in pairs for n in (p, p + c, p + r)]
    else:
        queries = keys = [p + n for p, c, r in pairs for n in (c, r)]
        trees = [Tree([1] * n) for n in queries]
    rows = build_rows([trees]).to(setup.device)
    # Padding up to a common length is single tokens that see themselves, which cost the kernel almost nothing.
    padded = bucket(rows.tokens)
    ends = torch.arange(1, padded + 1, device=setup.device)[None].contiguous()
    ends[:, : rows.tokens] = rows.ends
    mask = block_mask(ends, F.pad(rows.position_ids, (0, padded - rows.tokens)), None)
    cu_q, cu_k = (torch.tensor([0, *n], device=setup.device).cumsum(0, dtype=torch.int32) for n in (queries, keys))
    gather = [index.to(setup.device) for index in gather_indices(pairs)] if shared else []
    return Row(rows.ends, rows.position_ids, mask, len(queries), cu_q, cu_k, max(queries), max(keys), gather)


def gather_indices(pairs: Sequence[Pair]) -> list[Tensor]:
    """Index the gathered order [prompt | prompt, chosen | prompt, rejected] of every pair, both ways.

    Returns:
        Row index of each gathered key; first gathered index of each token of the row; row indices of prompts; and
        (3, prompt tokens) gathered indices of prompts.
    """
    index, own, prompts, copies = [], [], [], []
    at = start = 0
    for p, c, r in pairs:
        prompt, chosen, rejected = torch.arange(start, start + p + c + r).split((p, c, r))
        index += [prompt, prompt, chosen, prompt, rejected]
        own += [torch.arange(p) + at, torch.arange(c) + at + 2 * p, torch.arange(r) + at + 3 * p + c]
        prompts.append(prompt)
        copies.append(torch.arange(p) + torch.tensor([[at], [at + p], [at + 2 * p + c]]))
        start += p + c + r
        at += 3 * p + c + r
    return [torch.cat(index), torch.cat(own), torch.cat(prompts), torch.cat(copies, dim=1)]


class Gather(torch.autograd.Function):
    """Select rows of ``x`` by index. The gradient sums a prompt's three copies in float32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, own: Tensor, prompts: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(own, prompts, copies)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, prompts, copies = ctx.saved_tensors
        first, second, third = (grads[0].index_select(0, copy).float() for copy in copies)
        total = (first + second + third).to(grads[0].dtype)
        return grads[0].index_select(0, own).index_copy_(0, prompts, total), None, None, None, None


def dense(q: Tensor, k: Tensor, v: Tensor, row: Row, backend: SDPBackend) -> Tensor:
    q, k, v = (x.reshape(row.sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if backend is SDPBackend.CUDNN_ATTENTION:
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
        if not torch.backends.cuda.can_use_cudnn_attention(
            parameters
        ):  # otherwise heads are repeated, as in transformers
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def dense_fa4(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
    q, k, v = (x.reshape(row.sequences, -1, *x.shape[1:]) for x in (q, k, v))
    return importlib.import_module("flash_attn.cute").flash_attn_func(q, k, v, causal=True)[0].flatten(0, 1)


def varlen(q: Tensor, k: Tensor, v: Tensor, row: Row, version: int) -> Tensor:
    """Run a variable-length kernel. Its causal mask is aligned at the bottom right, so answers see the whole prompt."""
    if row.gather:
        k, v = (Gather.apply(x, *row.gather) for x in (k, v))
    if version == 2:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        return attend(q, k, v, row.cu_q, row.cu_k, row.max_q, row.max_k, window_size=(-1, 0))
    lengths = dict(cu_seqlens_q=row.cu_q, cu_seqlens_k=row.cu_k, max_seqlen_q=row.max_q, max_seqlen_k=row.max_k)
    return importlib.import_module("flash_attn.cute").flash_attn_varlen_func(q, k, v, **lengths, causal=True)[0]


def heads_first(row: Row, x: Tensor) -> Tensor:
    """Reshape (T, H, D) to (1, H, padded, D)."""
    extra = row.mask.seq_lengths[0] - row.tokens
    heads = x.transpose(0, 1)[None]
    return (F.pad(heads, (0, 0, 0, extra)) if extra else heads).contiguous()


def product_flex(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
    return flex(heads_first(row, q), heads_first(row, k), heads_first(row, v), row.mask)[0, : row.tokens]


def flex_with(options: dict[str, Any]) -> Kernel:
    """Run FlexAttention with kernel options."""

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def compiled(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)  # type: ignore[call-overload]

    def attend(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        if options.get("BACKEND") == "FLASH":
            importlib.import_module("flash_attn.cute")  # on a CPU torch would ignore the option
        out = compiled(heads_first(row, q), heads_first(row, k), heads_first(row, v), row.mask)
        return out[0, :, : row.tokens].transpose(0, 1).contiguous()

    return attend


PAIRED: dict[str, Kernel] = {
    "paired, SDPA flash": partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "paired, SDPA cuDNN": partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "paired, FA4": dense_fa4,
    "paired, FA4 varlen": partial(varlen, version=4),
    "paired, FA2 varlen": partial(varlen, version=2),
    "paired, flex": product_flex,
}
SHARED: dict[str, Kernel] = {
    "shared, flex": product_flex,
    "shared, flex FLASH": flex_with({"BACKEND": "FLASH"}),
    "shared, gathered FA4": partial(varlen, version=4),
    "shared, gathered FA2": partial(varlen, version=2),
}
KERNELS = PAIRED | SHARED
EQUAL_LENGTHS = ("paired, SDPA flash", "paired, SDPA cuDNN", "paired, FA4")


def qkv(setup: Setup, row: Row, name: str) -> list[Tensor]:
    """Draw random (T, heads, D) tensors, in the memory order that the kernel prefers."""
    tensors = []
    for heads in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads"):
        sizes = (row.tokens, setup.shape[heads])
        x = torch.randn(*(sizes[::-1] if "flex" in name else sizes), setup.shape["head_dim"], device=setup.device)
        tensors.append((x.transpose(0, 1) if "flex" in name else x).to(setup.dtype).requires_grad_(setup.train))
    return tensors


def milliseconds(setup: Setup, forward: Callable[[], Tensor], inputs: Sequence[Tensor], backward: bool = True) -> float:
    """Time a call: median of 5 to 15 runs, after two warm-ups."""
    if time.monotonic() > setup.deadline:
        raise TimeUpError
    grads: list[Tensor] = []

    def run() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(setup.train):
            out = forward()
            if setup.train and backward:
                grads[:] = grads or [torch.randn_like(out)]
                torch.autograd.grad(out, inputs, grads[0])
        return 1e3 * (time.perf_counter() - start)

    if not setup.train:
        return statistics.median([run() for _ in range(6)][1:])
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(15, max(5, int(0.2 / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(20_000_000)  # the host runs ahead, so that its launches are not timed
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def attempt(setup: Setup, name: str, measure: Callable[[], float]) -> float | None:
    """Try a call; ``None`` if it fails. The reason is kept, and later points skip the call unless memory was short."""
    if not setup.unavailable.get(name, "OutOfMemoryError").startswith("OutOfMemoryError"):
        return None
    try:
        start = time.monotonic()
        result = measure()
        if (seconds := time.monotonic() - start) > 5:
            tqdm.write(f"{name}: compiled in {seconds:.0f} s")
        return result
    except TimeUpError:
        raise
    except Exception as error:
        setup.unavailable[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        tqdm.write(f"unavailable: {name}: {setup.unavailable[name]}")
        return None


def attention_ms(setup: Setup, row: Row, name: str, kernel: Kernel, backward: bool = True) -> float:
    q, k, v = qkv(setup, row, name)
    return milliseconds(setup, lambda: kernel(q, k, v, row), (q, k, v), backward)


def module_ms(setup: Setup, row: Row, module: torch.nn.Module, *arguments: Any) -> float:
    x = torch.randn(1, row.tokens, setup.shape["hidden_size"], device=setup.device, dtype=setup.dtype)
    x.requires_grad_(setup.train)

    def forward() -> Tensor:
        out = module(x, *arguments)
        return out[0] if isinstance(out, tuple) else out

    return milliseconds(setup, forward, (x, *module.parameters()))


def layer_ms(setup: Setup, row: Row, layer: torch.nn.Module, rope: torch.nn.Module, name: str) -> float:
    """Attention layer of transformers, with one of the kernels in it."""

    def attend(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        return KERNELS[name](*(x[0].transpose(0, 1) for x in (q, k, v)), row)[None], None

    transformers.AttentionInterface.register("benchmarked", attend)
    angles = rope(torch.empty(0, device=setup.device, dtype=setup.dtype), row.positions)
    return module_ms(setup, row, layer, angles, None)


def ideals(shape: dict[str, int], prompt: int, completion: int) -> dict[str, float]:
    """Ratios of work: of tokens, of visible pairs of tokens, and of both weighted by FLOPs."""
    tokens = 2 * (prompt + completion), prompt + 2 * completion
    areas = (prompt + completion) ** 2, (prompt + completion) ** 2 - prompt**2 / 2
    width = shape["num_attention_heads"] * shape["head_dim"]
    linear = 4 * shape["hidden_size"] * (width + shape["num_key_value_heads"] * shape["head_dim"])
    separate, shared = (linear * n + 4 * width * area for n, area in zip(tokens, areas, strict=True))
    return dict(mlp=tokens[0] / tokens[1], attention=areas[0] / areas[1], layer=separate / shared)


def measure_point(setup: Setup, prompt: int, ratio: float, modules: Sequence[torch.nn.Module]) -> dict[str, Any]:
    began = time.monotonic()
    completion = max(1, round(prompt / ratio))
    pairs = pairs_in_batch(prompt, completion, setup.tokens)
    paired, shared = (make_row(setup, [(prompt, completion, completion)] * pairs, tree) for tree in (False, True))
    mlp, layer, rope = modules
    mlps = [attempt(setup, "MLP", partial(module_ms, setup, row, mlp)) for row in (paired, shared)]
    times: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        ms = attempt(setup, name, partial(attention_ms, setup, paired if name in PAIRED else shared, name, kernel))
        times |= {} if ms is None else {name: ms}
    best_paired, best_shared = (min((times[n], n) for n in times if n in of)[1] for of in (PAIRED, SHARED))
    layers: dict[str, float | None] = {}
    for name in {best_paired: 0, "paired, flex": 0, "shared, flex": 0, best_shared: 0}:
        if name not in times:
            continue
        row = paired if name in PAIRED else shared
        layers[name] = attempt(setup, f"layer, {name}", partial(layer_ms, setup, row, layer, rope, name))
    ideal = ideals(setup.shape, prompt, completion)
    speedups = {name: times[best_paired] / times[name] for name in SHARED if name in times}
    return dict(
        prompt=prompt, completion=completion, ratio=ratio, pairs=pairs, ideal=ideal,
        tokens=[paired.tokens, shared.tokens], padded=[paired.mask.seq_lengths[0], shared.mask.seq_lengths[0]],
        best_paired=best_paired, best_shared=best_shared, mlp_ms=mlps, attention_ms=times, layer_ms=layers,
        mlp=over(*mlps), attention=speedups, layer=over(layers[best_paired], layers.get("shared, flex")),
        layer_best=over(layers[best_paired], layers[best_shared]), attention_best=speedups[best_shared],
        share={name: speedup / ideal["attention"] for name, speedup in speedups.items()},
        seconds=time.monotonic() - began,
    )  # fmt: skip


def over(separate: float | None, shared: float | None) -> float | None:
    return separate / shared if separate and shared else None


def line(*cells: Any) -> str:
    return "| " + " | ".join("–" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"


COLUMNS = ["p", "c", "pairs", "MLP (ideal)", *(f"{n}, ms" for n in KERNELS), *(f"{n}: times, share" for n in SHARED),
           "ideal", "layer, flex (ideal)", "layer, best"]  # fmt: skip
HEAD = line(*COLUMNS) + "\n" + "|---" * len(COLUMNS) + "|"


def table_line(point: dict[str, Any]) -> str:
    ideal, speedups, times = point["ideal"], point["attention"], point["attention_ms"]
    mlp, layer = (f"{point[key] or float('nan'):.2f} ({ideal[key]:.2f})" for key in ("mlp", "layer"))
    shares = [f"{speedups[n]:.2f}×, {point['share'][n]:.2f}" if n in speedups else None for n in SHARED]
    milliseconds = [times.get(name) for name in KERNELS]
    return line(point["prompt"], point["completion"], point["pairs"], mlp, *milliseconds, *shares, ideal["attention"],
                layer, point["layer_best"])  # fmt: skip


def summary(points: list[dict[str, Any]], about: str) -> str:
    """Table of both kernels of FlexAttention on shared rows, against the fastest kernel on separate sequences."""
    lines = [
        "| prompt + 2 × answer | fastest unshared, ms | shared: Triton, ms | FA4, ms | of the ideal: Triton, FA4 "
        "| whole attention layer: Triton, fastest shared (ideal) |",
        "|---|---|---|---|---|---|",
    ]
    tokens = [point["tokens"][0] for point in points]
    for point in points:
        ms, share = point["attention_ms"], point["share"]
        names = "shared, flex", "shared, flex FLASH"
        given = [f"{ms[name]:.2f}" if name in ms else "–" for name in names]
        ideal = ", ".join(f"{share[name]:.2f}" if name in share else "–" for name in names)
        layer = [f"{gain:.2f}×" if gain else "–" for gain in (point["layer"], point["layer_best"])]
        cells = [
            f"{point['prompt']:,} + 2 × {point['completion']:,}",
            f"{ms[point['best_paired']]:.2f} ({point['best_paired'].removeprefix('paired, ')})",
            *given, ideal, f"{', '.join(layer)} ({point['ideal']['layer']:.2f}×)",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Forward and backward of attention alone, Mistral-7B's heads, batches of {min(tokens):,} to "
         f"{max(tokens):,} unshared tokens; ideal: the ratio of visible pairs of tokens; {about}. "
         "`python benchmarks/layers.py`"]
    )  # fmt: skip


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for key, title, panel in zip(("mlp", "attention", "layer"), ("MLP", "attention", "layer"), panels, strict=True):
        for i, ratio in enumerate(sorted({p["ratio"] for p in points})):
            of = sorted((p for p in points if p["ratio"] == ratio), key=lambda p: p["prompt"])
            prompts = [p["prompt"] for p in of]
            flexes = [p[key].get("shared, flex") if key == "attention" else p[key] for p in of]
            panel.plot(prompts, [x or float("nan") for x in flexes], "o-", color=f"C{i}", label=f"p / c = {ratio:g}")
            panel.plot(prompts, [p.get(f"{key}_best") or float("nan") for p in of], "x", color=f"C{i}")
            panel.plot(prompts, [p["ideal"][key] for p in of], "--", color=f"C{i}", alpha=0.5)
        panel.set(xscale="log", xlabel="tokens of the prompt, p", ylabel="times faster", title=title)
        panel.set_xticks(ticks := sorted({p["prompt"] for p in points}), [str(p) for p in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(title="dots: flex; crosses: best kernel; dashed: ideal", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)


def check(setup: Setup, repeats: int) -> int:
    """Compare every kernel with float64, on inputs and lengths that fill no block."""
    setup = replace(setup, shape=setup.shape | dict(num_attention_heads=8, num_key_value_heads=2), tokens=1024)
    equal, uneven = [(300, 77, 77)] * 3, [(300, 77, 154), (1, 300, 5), (129, 1, 128), (260, 33, 64)]
    rows = {"equal": make_row(setup, equal, False)}
    rows |= {kind: make_row(setup, uneven, kind == "shared") for kind in ("paired", "shared")}
    errors: dict[str, list[float]] = {name: [] for name in KERNELS}
    for i in tqdm(range(repeats), desc="checks", disable=None):
        for kind, row in rows.items():
            inputs = qkv(setup, row, kind)
            grad = torch.randn_like(inputs[0])
            truth = outputs(reference, [x.double() for x in inputs], row, grad.double())
            for name, kernel in KERNELS.items():
                # Repeats, because fast kernels have had races in one launch of a thousand.
                if kind == ("equal" if name in EQUAL_LENGTHS else name[:6]) and (i < 3 or "F" in name):
                    error = attempt(setup, name, partial(worst, kernel, inputs, row, grad, truth))
                    errors[name] += [] if error is None else [error]
    print(f"\n| kernel | runs | worst error | not finite | over {TOLERANCE} |\n|---|---|---|---|---|")
    for name, found in errors.items():
        if name in setup.unavailable:
            print(line(name, len(found), f"unavailable: {setup.unavailable[name]}", None, None))
        else:
            counts = sum(e == float("inf") for e in found), sum(e > TOLERANCE for e in found)
            print(line(name, len(found), f"{max(found):.1e}", *counts))
    return int(any(e > TOLERANCE for found in errors.values() for e in found))


def worst(kernel: Kernel, inputs: list[Tensor], row: Row, grad: Tensor, truth: list[Tensor]) -> float:
    """Return the largest relative error, in norm, of output and gradients; infinite if a value is not finite."""
    pairs = zip(outputs(kernel, inputs, row, grad), truth, strict=True)
    errors = torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])
    return float(errors.nan_to_num(nan=float("inf")).max())


def outputs(kernel: Kernel, inputs: list[Tensor], row: Row, grad: Tensor) -> list[Tensor]:
    """Compute attention and, if it has a backward, the gradients of q, k and v."""
    train = inputs[0].requires_grad
    leaves = [x.detach().requires_grad_(train) for x in inputs]
    with torch.set_grad_enabled(train):
        out = kernel(*leaves, row)
    return [out.detach(), *(torch.autograd.grad(out, leaves, grad) if train else ())]


def reference(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
    q, k, v = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(row.ends, row.positions, None))
    return out[0].transpose(0, 1)


FORWARD = [(128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
           (64, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3)]  # fmt: skip
BACKWARD = [(64, 128, 128, 64, 8, 3), (64, 128, 128, 64, 8, 2), (64, 128, 128, 64, 4, 2), (64, 64, 64, 64, 4, 2),
            (64, 64, 64, 64, 4, 3), (64, 64, 64, 64, 8, 2), (32, 128, 128, 32, 8, 2), (32, 64, 64, 32, 4, 3),
            (128, 128, 128, 128, 8, 2)]  # fmt: skip
TRIALS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    *((dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), f, strict=True)),
       dict(zip(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages"), b, strict=True)))
      for f, b in zip(FORWARD, BACKWARD, strict=True)),
    ({"ROWS_GUARANTEED_SAFE": True}, {"ROWS_GUARANTEED_SAFE": True}),
    ({"USE_TMA": True}, {"num_stages": 1}),
]  # fmt: skip


def tune(setup: Setup, trials: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Compare block sizes. Forward and backward options of a trial are compiled together, but are independent."""
    points = [(512, 512), (2048, 512)]
    rows = [make_row(setup, [(p, c, c)] * max(1, setup.tokens // (p + 2 * c)), True) for p, c in points]
    print(line("pass", "options", *(f"p = {p}, c = {c}: ms" for p, c in points)) + "\n" + "|---" * 4 + "|", flush=True)
    for forward, backward in tqdm(trials, desc="trials", disable=None):
        options = {f"fwd_{k}": v for k, v in forward.items()} | {f"bwd_{k}": v for k, v in backward.items()}
        kernel = flex_with(options)
        # Forward alone first, because a trial whose backward does not compile still has a forward.
        steps = [[attempt(setup, f"{both} of {options}", partial(attention_ms, setup, row, "flex", kernel, both))
                  for row in rows] for both in (False, True)]  # fmt: skip
        backwards = [None if a is None or b is None else b - a for a, b in zip(*steps, strict=True)]
        tqdm.write(line("forward", forward or "default", *steps[0]))
        tqdm.write(line("backward", backward or "default", *backwards))
        sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of a prompt (default: 128 512 2048 8192)")
    parser.add_argument("--ratios", type=float, nargs="+", help="prompt to answer (default: 0.5 1 4 16)")
    parser.add_argument("--full", action="store_true", help="also prompts of 256, 1024, 4096 and ratios of 2 and 8")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a batch of separate sequences, at least")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so many seconds, and write the results so far"
    )
    parser.add_argument("--tune", action="store_true", help="only compare block sizes of the Triton kernels")
    parser.add_argument(
        "--trials",
        type=int,
        nargs=2,
        metavar=("I", "N"),
        default=(0, 1),
        help="with --tune, run every Nth trial from the Ith",
    )
    parser.add_argument("--check", type=int, metavar="N", help="only compare all kernels with float64, N times")
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="attention kernels (default: all)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/layers"))
    options = parser.parse_args()
    prompts = options.prompts or ([2**n for n in range(7, 14)] if options.full else [128, 512, 2048, 8192])
    ratios = options.ratios or ([0.5, 1, 2, 4, 8, 16] if options.full else [0.5, 1, 4, 16])
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    cuda = device.type == "cuda"
    setup = Setup(device, dtype, SHAPE if cuda else SMALL, options.tokens, time.monotonic() + options.seconds)
    setup.unavailable.update((kernel, "left out by --kernels") for kernel in KERNELS if kernel not in options.kernels)
    # FA4's compiler warns of every kernel without auxiliary tensors.
    warnings.filterwarnings("ignore", message="Argument aux_data")
    # Torch's limit of 8 lengths would be an error here.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
    torch.manual_seed(0)
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {name: found.get(name) for name in ("torch", "transformers", "triton", "flash-attn-4")}
    name = torch.cuda.get_device_name(device) if cuda else "CPU, forward only, a small shape"
    about = ", ".join([*(f"{k} {v}" for k, v in versions.items()), name, options.dtype])
    print(about + "\n", flush=True)
    if options.check is not None:
        return check(setup, options.check)
    if options.tune:
        with contextlib.suppress(TimeUpError):
            first, every = options.trials
            tune(setup, TRIALS[first::every])
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    config = transformers.MistralConfig(**setup.shape, sliding_window=None)
    config._attn_implementation = "benchmarked"
    with device:
        parts = mistral.MistralMLP(config), mistral.MistralAttention(config, 0), mistral.MistralRotaryEmbedding(config)
    modules = [part.to(dtype).eval() for part in parts]
    points: list[dict[str, Any]] = []
    print(HEAD, flush=True)
    try:
        for prompt, ratio in tqdm(list(itertools.product(prompts, ratios)), desc="points", disable=None):
            points.append(measure_point(setup, prompt, ratio, modules))
            tqdm.write(table_line(points[-1]))
            sys.stdout.flush()
            reasons = [f"- unavailable: {name}: {reason}" for name, reason in setup.unavailable.items()]
            (options.output / "table.md").write_text(
                "\n".join([about, "", HEAD, *map(table_line, points), "", *reasons])
            )
            (options.output / "summary.md").write_text(summary(points, about))
            result = dict(versions=versions, device=name, dtype=options.dtype, shape=setup.shape, points=points)
            (options.output / "layers.json").write_text(
                json.dumps(result | {"unavailable": setup.unavailable}, indent=1)
            )
    except TimeUpError:
        print(f"stopped after {options.seconds:g} seconds, with {len(points)} points", flush=True)
    if points:
        plot(points, options.output / "layers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
