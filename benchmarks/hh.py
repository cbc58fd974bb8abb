"""Runs the LoRA DPO example on real preference data, shared against paired, and compares losses and speed.

    python benchmarks/hh.py DATA.jsonl.gz [--steps 50] [options of examples/lora_dpo.py]

Runs examples/lora_dpo.py twice with the same seed, prints one table, and writes table.md and hh.png (both loss curves).
Exit code 1 if any step's losses differ by more than --tolerance.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "lora_dpo.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="JSONL file, plain or gzipped")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/hh"))
    options, passed_on = parser.parse_known_args()
    runs = {}
    for layout in ("shared", "paired"):
        folder = options.output / layout
        command = [sys.executable, str(EXAMPLE), f"--{layout}", "--data", options.data, "--steps", str(options.steps)]
        subprocess.run([*command, "--output", str(folder), *passed_on], check=True)
        runs[layout] = json.loads((folder / "losses.json").read_text())
    (options.output / "table.md").write_text(report(runs))
    print("\n" + report(runs))
    plot(runs, options.output / "hh.png")
    return 1 if largest_difference(runs) > options.tolerance else 0


def largest_difference(runs: dict[str, Any]) -> float:
    """Largest difference between the two runs in any step's loss."""
    both = zip(runs["shared"]["steps"], runs["paired"]["steps"], strict=True)
    return max(abs(shared["loss"] - paired["loss"]) for shared, paired in both)


def report(runs: dict[str, Any]) -> str:
    """Write the table, and the conditions under which it holds, as Markdown."""
    seconds = {layout: sum(step["seconds"] for step in run["steps"]) for layout, run in runs.items()}
    tokens = {"shared": runs["shared"]["tokens"]["shared"], "paired": runs["paired"]["tokens"]["paired_with_padding"]}
    settings, versions = runs["shared"]["settings"], runs["shared"]["versions"]
    steps = len(runs["shared"]["steps"])
    lines = ["| LoRA DPO | tokens computed | seconds | pairs/s | speed-up |", "|---|---|---|---|---|"]
    for layout, name in (("paired", "unpatched, padded pairs"), ("shared", "flexpatch, packed rows")):
        pairs = steps * settings["batch_size"] / seconds[layout]
        speed_up = seconds["paired"] / seconds[layout]
        lines.append(f"| {name} | {tokens[layout]:,} | {seconds[layout]:.0f} | {pairs:.2f} | {speed_up:.2f}× |")
    threads = torch.get_num_threads()
    cpu = f"CPU with {threads} thread{'s' * (threads > 1)}"
    device = torch.cuda.get_device_name() if settings["device"] == "cuda" else cpu
    lines += [
        "",
        f"Losses agree: no step of {steps} differs by more than {largest_difference(runs):.0e}. Conditions: "
        f"{settings['model'] or 'SmolLM2-135M-Instruct (dequantized)'}, {settings['dtype']}, {settings['batch_size']} "
        f"pairs a step of `{Path(settings['data']).name}`, {device}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if name != "flexpatch")
        + f"; `python benchmarks/hh.py {Path(settings['data']).name} --steps {steps}`.",
    ]
    return "\n".join(lines)


def plot(runs: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (layout, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes.plot([step["loss"] for step in run["steps"]], style, label=layout)
    axes.set(xlabel="step", ylabel="DPO loss", title="The same training, shared and paired")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
