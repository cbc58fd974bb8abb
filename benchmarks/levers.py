"""Measures levers of a step's speed, one after the other: full fine-tuning of layers as wide as a 7B model's.

    python benchmarks/levers.py                                              # on a GPU
    python benchmarks/levers.py --device cpu --shape tiny --shared-tokens 512 --dtype float32

Forward and backward of a DPO loss over one shared row (reference log-probs given, no optimizer step), with and without
recomputation, compiled layers and Liger's kernels. Useful TFLOP/s count 6 x the layers' weights x tokens of the row,
without attention, logits and recomputation. Shares are of the rate of an 8192^3 bfloat16 product of random matrices,
measured in the same run. Kernels of every variant are profiled by class.

Prints two tables and writes them with levers.json and levers.png to --output.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from lengths import add_lengths
from tqdm import tqdm
from train import CLASSES, SHAPES, draw_pairs, free_memory, make_job, matmul_rate, measure_layout

VARIANTS: dict[str, dict[str, Any]] = {
    "all layers recomputed": dict(checkpointing="all"),
    "no recomputation": dict(),
    "compiled, all layers recomputed": dict(checkpointing="all", compile=True),
    "compiled": dict(compile=True),
    "Liger": dict(liger=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--set", default="ultrafeedback")
    add("--shape", choices=SHAPES, default="8 layers of Mistral-7B")
    add("--mode", choices=("full", "lora"), default="full")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--shared-tokens", type=int, default=16384, help="tokens of the row, at most (%(default)s)")
    add("--repeats", type=int, default=5)
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/levers"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.profile, options.tokens = True, options.shared_tokens
    lengths = json.loads(options.lengths.read_text())[options.set]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    pairs = draw_pairs(lengths, options.shared_tokens, SHAPES[options.shape][1]["vocab_size"])
    rate = matmul_rate(options.device, getattr(torch, options.dtype))
    conditions = (
        f"{options.shape}, {options.mode} fine-tuning, forward and backward, random weights, {options.dtype}, a shared "
        f"row of {len(pairs)} pairs with lengths like {options.set}; {device}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; a matrix product: {rate:.0f} TFLOP/s. *GPU idle* is a median step less the "
        "kernels of one profiled step: it may be negative. `python benchmarks/levers.py`"
    )
    results: dict[str, Any] = {"conditions": conditions, "matmul_tflops": rate, "variants": {}}
    print(conditions, flush=True)
    losses = []
    for name in tqdm(options.variants, disable=None):
        given = dict(checkpointing="none", compile=False, liger=False, backend="auto") | VARIANTS[name]
        torch._dynamo.reset()
        try:
            job = make_job(options.shape, options.mode, "none", argparse.Namespace(**(vars(options) | given)))
            record, _ = measure_layout(job, "shared packed", pairs, argparse.Namespace(**(vars(options) | given)))
            losses.append(record["loss"])
        except torch.OutOfMemoryError:
            record = None
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
            continue
        results["variants"][name] = record
        print(name, record, flush=True)
        job = None
        free_memory()
        (options.output / "levers.json").write_text(json.dumps(results, indent=1))
        (options.output / "table.md").write_text(table(results))
    print("\n" + table(results), flush=True)
    plot(results, options.output / "levers.png")
    differ = max(losses) - min(losses) > 2e-2 * abs(losses[0])
    if differ:
        print(f"the variants' losses differ: {losses}", file=sys.stderr)
    return int(differ)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | step, ms | useful TFLOP/s | of a matrix product | peak GB | first step, s |",
        "|---|---|---|---|---|---|",
    ]
    profiles = [f"| ms (share) | {' | '.join([*CLASSES, 'GPU idle'])} |", "|---|---|---|---|---|---|---|"]
    for name, record in results["variants"].items():
        if record is None:
            lines.append(f"| {name} | out of memory | | | | |")
            continue
        share, peak = record["tflops"] / results["matmul_tflops"], record["peak_gb"] or math.nan
        lines.append(
            f"| {name} | {record['ms']:.0f} | {record['tflops']:.0f} | **{share:.0%}** | {peak:.1f} "
            f"| {record['warm_up_s']:.0f} |"
        )
        if spent := record.get("kernels_ms"):
            cells = [f"{ms:.0f} ({ms / record['ms']:.0%})" for ms in spent.values()]
            profiles.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *profiles, "", results["conditions"]])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = {name: record for name, record in results["variants"].items() if record and "kernels_ms" in record}
    if not records:
        return
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    left = [0.0] * len(records)
    for kind in [*CLASSES, "GPU idle"]:
        widths = [max(record["kernels_ms"][kind], 0.0) for record in records.values()]
        axes.barh(list(records), widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms", title="Where a step's time goes")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
