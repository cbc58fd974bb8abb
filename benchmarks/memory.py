"""Peak memory of a training step at equal batches, and the largest batch that fits, paired as trainers do and shared.

    python benchmarks/memory.py LENGTHS.json                          # on a GPU
    python benchmarks/memory.py LENGTHS.json --modes lora --checkpointing none --compile --sets hh

Forward and backward of a DPO loss (with --modes lora: and the reference's forward), no optimizer. *At equal batches*:
the peak beyond what is allocated before the step, for --pairs pairs. *Largest batch*: pairs of one call and one
backward; from the peaks of two batches follows what should fit, which is then run, and made smaller until it does.

Prints a table, and writes it with memory.json to --output.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from train import SHAPES, Job, free_memory, make_job, measure_layout

LAYOUTS = ("padded pairs", "shared packed")
Pairs = list[list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lengths", type=Path)
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--modes", nargs="+", choices=("full", "lora"), default=["lora"])
    add("--sets", nargs="+", help="default: all")
    add("--pairs", type=int, default=8, help="of the equal batches (%(default)s)")
    add("--checkpointing", default="all", help="decoder layers computed again in backward: all, none or a number")
    add("--compile", action="store_true", help="layers of shared rows")
    add("--output", type=Path, default=Path("runs/memory"))
    options = parser.parse_args()
    vars(options).update(
        device="cuda", dtype="bfloat16", backend="auto", liger=False, profile=False, repeats=1, tokens=math.inf
    )
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    results: dict[str, Any] = {
        "conditions": f"{options.shape}, random weights, bfloat16, layers checkpointed: {options.checkpointing}"
        f"{', compiled' if options.compile else ''}; {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; `python benchmarks/memory.py`",
        "runs": [],
    }
    for mode in options.modes:
        job = make_job(options.shape, mode, "none", options)
        for name in tqdm(options.sets or lengths, desc=mode, disable=None):
            pairs = draw(lengths[name], 20_000, job.causal.config.vocab_size)
            results["runs"].append(dict(mode=mode, set=name, **compare(job, pairs, options)))
            print(results["runs"][-1], flush=True)
            (options.output / "memory.json").write_text(json.dumps(results, indent=1))
            (options.output / "table.md").write_text(table(results))
        del job
        free_memory()
    print("\n" + table(results))


def draw(lengths: list[list[int]], count: int, vocabulary: int) -> Pairs:
    """Pairs with lengths of a set, drawn with replacement. Equal ids will do: trees share by construction."""
    drawn = random.Random(0).choices(lengths, k=count)
    return [[[5 + i % (vocabulary - 5)] * length for i, length in enumerate(triple)] for triple in drawn]


def compare(job: Job, pairs: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    at_equal = {layout: peak(job, layout, pairs[: options.pairs], options) for layout in LAYOUTS}
    largest = {layout: fit(job, layout, pairs, options) for layout in LAYOUTS}
    padded, shared = tokens(pairs[: options.pairs])
    return dict(
        token_ratio=padded / shared,
        at_equal=at_equal,
        largest={layout: dict(pairs=n, tokens=tokens(pairs[:n])[i]) for i, (layout, n) in enumerate(largest.items())},
    )


def tokens(pairs: Pairs) -> tuple[int, int]:
    """Tokens of the padded batch, and of the shared row."""
    if not pairs:
        return 0, 0
    longest = max(len(prompt) + len(answer) for prompt, *answers in pairs for answer in answers)
    return 2 * len(pairs) * longest, sum(len(part) for pair in pairs for part in pair)


def peak(job: Job, layout: str, pairs: Pairs, options: argparse.Namespace) -> int | None:
    """Bytes a step allocates beyond what there is; ``None`` if they do not fit."""
    job.causal.zero_grad(set_to_none=True)
    free_memory()
    before = torch.cuda.memory_allocated()
    try:
        record, _ = measure_layout(job, layout, pairs, options)
    except torch.OutOfMemoryError:
        return None
    return round(1e9 * record["peak_gb"]) - before


def fit(job: Job, layout: str, pairs: Pairs, options: argparse.Namespace) -> int:
    """The most pairs that fit, to a twentieth."""
    small, large = options.pairs // 2, options.pairs
    peaks = [peak(job, layout, pairs[:n], options) for n in (small, large)]
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
    """How many of the first pairs have at most ``budget`` tokens."""
    low, high = 0, len(pairs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(pairs[:middle])[kind] <= budget else (low, middle - 1)
    return low


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | lengths like | tokens ÷ | step's GB at equal batches: padded, shared | ÷ "
        "| largest batch, pairs: padded, shared | × | tokens: padded, shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        given: Sequence[int | None] = [run["at_equal"][layout] for layout in LAYOUTS]
        gb = ", ".join("–" if g is None else f"{g / 1e9:.1f}" for g in given)
        less = f"{given[0] / given[1]:.2f}" if given[0] and given[1] else "–"
        most = [run["largest"][layout] for layout in LAYOUTS]
        more = f"{most[1]['pairs'] / most[0]['pairs']:.2f}" if most[0]["pairs"] else "–"
        cells = [run["mode"], run["set"], f"{run['token_ratio']:.2f}", gb, less]
        cells += [", ".join(f"{m['pairs']:,}" for m in most), more, ", ".join(f"{m['tokens']:,}" for m in most)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", results["conditions"]])


if __name__ == "__main__":
    main()
