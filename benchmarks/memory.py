"""Measures peak memory of a step at equal batches, and the largest batch that fits: padded pairs and shared rows.

    python benchmarks/memory.py                          # on a GPU
    python benchmarks/memory.py --modes lora --checkpointing none all --compile --sets hh

A step is forward and backward of a DPO loss (with --modes lora also the reference's forward), without optimizer. *At
equal batches* is the peak beyond the memory allocated before the step, for --pairs pairs. *Largest batch* counts pairs
of one call and one backward. The peaks of two batches predict the largest one, which is run, and made smaller until it
fits.

Prints a table, and writes it with memory.json to --output.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lengths import add_lengths
from tqdm import tqdm
from train import SHAPES, Job, free_memory, make_batches, make_job, prepare, train_step

LAYOUTS = ("padded pairs", "shared packed")
Pairs = list[list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--modes", nargs="+", choices=("full", "lora"), default=["lora"])
    add("--sets", nargs="+", help="default: all")
    add("--largest", nargs="+", help="sets whose largest batch is measured, which takes minutes (default: all)")
    add("--pairs", type=int, default=8, help="pairs of the equal batches (%(default)s)")
    add("--checkpointing", nargs="+", default=["none", "all"], help="layers to recompute: all, none or a number")
    add("--compile", action="store_true", help="compile the layers of shared rows")
    add("--output", type=Path, default=Path("runs/memory"))
    options = parser.parse_args()
    vars(options).update(device="cuda", dtype="bfloat16", liger=False, tokens=sys.maxsize)  # one call
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    results: dict[str, Any] = {
        "conditions": f"{options.shape}, random weights, bfloat16{', compiled' if options.compile else ''}; "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        "`python benchmarks/memory.py`",
        "runs": [],
    }
    for mode, recomputed in itertools.product(options.modes, options.checkpointing):
        setting = f"{mode}, layers checkpointed: {recomputed}"
        job = make_job(options.shape, mode, "none", argparse.Namespace(**vars(options) | {"checkpointing": recomputed}))
        for name in tqdm(options.sets or lengths, desc=setting, disable=None):
            pairs = draw(lengths[name], 5_000, job.causal.config.vocab_size)
            run = dict(setting=setting, set=name, **at_equal(job, pairs[: options.pairs], options))
            if name in (options.largest or lengths):
                run["largest"] = largest(job, pairs, run["at_equal"], options)
            results["runs"].append(run)
            print(run, flush=True)
            (options.output / "memory.json").write_text(json.dumps(results, indent=1))
            (options.output / "table.md").write_text(table(results))
        del job
        free_memory()
    print("\n" + table(results))


def draw(lengths: list[list[int]], count: int, vocabulary: int) -> Pairs:
    """Draw pairs with lengths of a set, with replacement. The two answers begin differently, so share no token."""
    drawn = random.Random(0).choices(lengths, k=count)
    return [[[5 + i % (vocabulary - 5)] * length for i, length in enumerate(triple)] for triple in drawn]


def at_equal(job: Job, pairs: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    padded, shared = tokens(pairs)
    peaks = {layout: peak(job, layout, pairs, options) for layout in LAYOUTS}
    return dict(token_ratio=padded / shared, pairs=len(pairs), at_equal=peaks)


def largest(job: Job, pairs: Pairs, peaks: dict[str, int | None], options: argparse.Namespace) -> dict[str, Any]:
    found = {layout: fit(job, layout, pairs, peaks[layout], options) for layout in LAYOUTS}
    return {layout: dict(pairs=n, tokens=tokens(pairs[:n])[i]) for i, (layout, n) in enumerate(found.items())}


def tokens(pairs: Pairs) -> tuple[int, int]:
    """Count the tokens of the padded batch, and of the shared row."""
    if not pairs:
        return 0, 0
    longest = max(len(prompt) + len(answer) for prompt, *answers in pairs for answer in answers)
    return 2 * len(pairs) * longest, sum(len(part) for pair in pairs for part in pair)


def peak(job: Job, layout: str, pairs: Pairs, options: argparse.Namespace) -> int | None:
    """Measure the bytes that a step allocates beyond those allocated before; ``None`` if they do not fit."""
    job.causal.zero_grad(set_to_none=True)
    free_memory()
    prepare(job, layout, options.compile, "auto")
    batches = make_batches(job, layout, pairs, options)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        train_step(job, batches)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def fit(job: Job, layout: str, pairs: Pairs, equal: int | None, options: argparse.Namespace) -> int:
    """Find the most pairs that fit, to a twentieth; ``equal`` is the peak of the equal batches."""
    small, large = options.pairs // 2, options.pairs
    peaks = [peak(job, layout, pairs[:small], options), equal]
    sizes = [tokens(pairs[:n])[LAYOUTS.index(layout)] for n in (small, large)]
    if None in peaks:
        return 0
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])  # type: ignore[operator]
    job.causal.zero_grad(set_to_none=True)
    free_memory()
    room = torch.cuda.mem_get_info()[0] - peaks[1] + slope * sizes[1]  # type: ignore[operator]
    count = last(pairs, LAYOUTS.index(layout), room / slope)
    while count and peak(job, layout, pairs[:count], options) is None:
        count = int(count * 0.95)
    return count


def last(pairs: Pairs, kind: int, budget: float) -> int:
    """Count the first pairs that have at most ``budget`` tokens together."""
    low, high = 0, len(pairs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(pairs[:middle])[kind] <= budget else (low, middle - 1)
    return low


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| | lengths like | tokens ÷ | step's GB, {results['runs'][0]['pairs']} pairs: padded, shared | ÷ "
        "| largest batch, pairs: padded, shared | × | tokens: padded, shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        given: Sequence[int | None] = [run["at_equal"][layout] for layout in LAYOUTS]
        gb = ", ".join("–" if g is None else f"{g / 1e9:.1f}" for g in given)
        less = f"{given[0] / given[1]:.2f}" if given[0] and given[1] else "–"
        cells = [run["setting"], run["set"], f"{run['token_ratio']:.2f}", gb, less]
        if "largest" in run:
            most = [run["largest"][layout] for layout in LAYOUTS]
            more = f"{most[1]['pairs'] / most[0]['pairs']:.2f}" if most[0]["pairs"] else "–"
            cells += [", ".join(f"{m['pairs']:,}" for m in most), more, ", ".join(f"{m['tokens']:,}" for m in most)]
        else:
            cells += ["–"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", results["conditions"]])


if __name__ == "__main__":
    main()
