"""Measures the cost of block masks, and counts kernels compiled over rows of varying lengths.

    python benchmarks/masks.py                     # on a GPU; writes masks.json and masks.png to --output
    python benchmarks/masks.py --device cpu --steps 8

Two tables. The first has time and peak memory of building one row's block mask, with and without a window, for 4k to
128k tokens (beside create_block_mask if it fits into memory). The second has the number of compiled graphs after
--steps training steps of one attention layer over rows of random length, and the number of length buckets of these
rows. Exit code 1 if more graphs than buckets were compiled, or the mask of 65,536 tokens takes over 5 ms or 50 MB on a
GPU.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm

from flexpatch.attention import flex
from flexpatch.masks import block_mask, bucket, mask_mod
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/masks"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}\n")
    masks = [mask_cost(length, device) for length in tqdm((4096, 8192, 16384, 32768, 65536, 131072), disable=None)]
    print("| tokens | block mask, ms | with a window, ms | peak MB | create_block_mask, ms | its peak MB |")
    print("|---|---|---|---|---|---|")
    for m in masks:
        cells = (m["tokens"], m["ms"], m["window_ms"], m["mb"], m["torch_ms"], m["torch_mb"])
        print(
            "| "
            + " | ".join("–" if c is None else f"{c:,}" if isinstance(c, int) else f"{c:.2f}" for c in cells)
            + " |"
        )
    compiled = recompiles(options.steps, device)
    print(f"\n{compiled['graphs']} graphs compiled over {options.steps} steps of {compiled['lengths']} lengths in "
          f"{compiled['buckets']} buckets")  # fmt: skip
    result = {"torch": torch.__version__, "device": name, "masks": masks, "recompiles": compiled}
    (options.output / "masks.json").write_text(json.dumps(result, indent=1))
    plot(masks, options.output / "masks.png")
    at_64k = next(m for m in masks if m["tokens"] == 65536)
    slow = device.type == "cuda" and (at_64k["window_ms"] > 5 or at_64k["ms"] > 5 or at_64k["mb"] > 50)
    return 1 if slow or compiled["graphs"] > compiled["buckets"] else 0


def preference_row(tokens: int, generator: random.Random) -> Rows:
    """Make a packed row of about ``tokens`` tokens of prompts with two answers each."""
    trees: list[Tree] = []
    left = tokens
    while left > 3:
        prompt, chosen, rejected = (generator.randint(1, max(1, min(800, left // 4))) for _ in range(3))
        trees.append(Tree.of([1] * prompt, [2] * chosen, [3] * rejected))
        left -= prompt + chosen + rejected
    return build_rows([[*trees, Tree([1] * left)] if left else trees])


def mask_cost(tokens: int, device: torch.device) -> dict[str, Any]:
    rows = preference_row(tokens, random.Random(tokens)).to(device)
    ms, mb = measure(lambda: block_mask(rows.ends, rows.position_ids, None), device)
    window_ms, window_mb = measure(lambda: block_mask(rows.ends, rows.position_ids, 512), device)
    torch_ms = torch_mb = None
    if tokens <= 16384:
        rule = mask_mod(rows.ends.int(), rows.position_ids.int(), None)
        torch_ms, torch_mb = measure(
            lambda: create_block_mask(rule, 1, 1, tokens, tokens, device=device), device, repeats=3
        )
    return dict(tokens=tokens, ms=ms, window_ms=window_ms, mb=max(mb, window_mb), torch_ms=torch_ms, torch_mb=torch_mb)


def measure(build: Callable[[], Any], device: torch.device, repeats: int = 30) -> tuple[float, float]:
    """Return median milliseconds, and peak megabytes beyond those allocated before (0 on the CPU)."""
    for _ in range(3):
        build()
    times = []
    peak = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        kept = build()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak = max(peak, (torch.cuda.max_memory_allocated(device) - before) / 1e6)
        times.append(1e3 * (time.perf_counter() - start))
        del kept
    return statistics.median(times), peak


def recompiles(steps: int, device: torch.device) -> dict[str, int]:
    """Count graphs compiled for one attention layer, forward and (on a GPU) backward, over rows of random lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = random.Random(0)
    lengths = set()
    train = device.type == "cuda"  # flex has no backward on the CPU
    dtype = torch.bfloat16 if train else torch.float32
    for _ in tqdm(range(steps), desc="steps", disable=None):
        rows = preference_row(generator.randint(500, 4000 if train else 1500), generator).to(device)
        length = rows.input_ids.shape[1]
        lengths.add(length)
        mask = block_mask(rows.ends, rows.position_ids, None)
        q, k, v = (
            torch.randn(1, heads, length, 64, device=device, dtype=dtype, requires_grad=train) for heads in (8, 2, 2)
        )
        out = flex(q, k, v, mask)
        if train:
            out.sum().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"graphs": graphs, "buckets": len(set(map(bucket, lengths))), "lengths": len(lengths), "steps": steps}


def plot(masks: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    tokens = [m["tokens"] for m in masks]
    axes.plot(tokens, [m["ms"] for m in masks], "o-", label="flexpatch")
    axes.plot(tokens, [m["window_ms"] for m in masks], "s-", label="flexpatch, window 512")
    known = [m for m in masks if m["torch_ms"] is not None]
    axes.plot([m["tokens"] for m in known], [m["torch_ms"] for m in known], "^--", label="create_block_mask")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the row", ylabel="ms", title="Building a block mask")
    axes.set_xticks(tokens, [f"{t // 1024}k" for t in tokens])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
