"""The LoRA DPO example on real preference data, shared against paired: the same losses, and how much faster.

    python benchmarks/hh.py DATA.jsonl.gz [--steps 50] [options of examples/lora_dpo.py]

Runs examples/lora_dpo.py twice with the same seed, prints one table, and writes hh.json and hh.png (both loss curves).
Exit code 1 if any step's losses differ by more than --tolerance.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    print("\n" + table(runs))
    differences = [
        abs(a["loss"] - b["loss"]) for a, b in zip(runs["shared"]["steps"], runs["paired"]["steps"], strict=True)
    ]
    print(f"\nlargest difference of a step's loss: {max(differences):.1e} (over {len(differences)} steps)")
    plot(runs, options.output / "hh.png")
    return 1 if max(differences) > options.tolerance else 0


def table(runs: dict[str, Any]) -> str:
    lines = ["| layout | tokens computed | seconds | pairs/s |", "|---|---|---|---|"]
    for layout, run in runs.items():
        tokens = run["tokens"]["shared" if layout == "shared" else "paired_with_padding"]
        seconds = sum(step["seconds"] for step in run["steps"])
        pairs = len(run["steps"]) * run["settings"]["batch_size"]
        lines.append(f"| {layout} | {tokens:,} | {seconds:.0f} | {pairs / seconds:.2f} |")
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
