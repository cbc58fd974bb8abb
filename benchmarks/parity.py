"""Parity of every registered architecture, as the table in README.

    python benchmarks/parity.py                                # CPU, float64
    python benchmarks/parity.py --device cuda --dtype float32
    python benchmarks/parity.py --device cuda --dtype bfloat16 --jobs 14

Each row is the worst of an architecture's tiny random models (one per mask, window and rope variant). Exit code 1 if
any fails.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from flexpatch.models import tiny_model, tiny_types
from flexpatch.parity import Report, check_parity
from flexpatch.registry import adapters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32", "bfloat16"])
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "dense"])
    parser.add_argument("--types", nargs="+", choices=tiny_types(), default=tiny_types(), metavar="TYPE")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, help="also write the full reports as JSON")
    options = parser.parse_args()
    cases = [(t, v) for t in options.types for v in range(len(adapters()[t].tiny[t]))]
    reports: dict[str, list[Report]] = {}
    # Processes of their own: each compiles its kernels, which is what takes time on a GPU.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(verify, *case, options.device, options.dtype, options.backend) for case in cases]
        for (model_type, _), result in tqdm(list(zip(cases, results, strict=True)), disable=None):
            reports.setdefault(model_type, []).append(result.result())
    settings = next(iter(reports.values()))[0].settings
    print(" · ".join(f"{key} {value}" for key, value in settings.items()), end="\n\n")
    print("| `model_type` | variants | leaking tokens | log-probs: error (bound), nats | gradients: error (bound) | "
          "controls off by |\n|---|---|---|---|---|---|")  # fmt: skip
    for model_type, variants in reports.items():
        print(row(model_type, variants))
    if options.output:
        options.output.write_text(json.dumps([r.as_dict() for some in reports.values() for r in some], indent=1))
    return 0 if all(report.passed for some in reports.values() for report in some) else 1


def verify(model_type: str, variant: int, device: str, dtype: str, backend: str) -> Report:
    """One tiny model's report."""
    torch.set_num_threads(1)
    model = tiny_model(model_type, variant, dtype=getattr(torch, dtype)).to(device)
    return check_parity(model, name=model_type, backend=backend)


def row(model_type: str, variants: list[Report]) -> str:
    """The worst of an architecture's variants: each error by its share of its bound."""
    checks = [check for report in variants for check in report.checks]
    cells = [f"`{model_type}`", str(len(variants))]
    leak = max(check.error for check in checks if check.margin is None and check.name.startswith("leak"))
    cells.append(f"{leak:.0f}")
    for kind in ("log-probs", "gradients"):
        some = [check for check in checks if check.margin is None and check.name.startswith(kind)]
        worst = max(some, key=lambda check: check.error / check.bound)
        cells.append(f"{worst.error:.0e} ({worst.bound:.0e})")
    cells.append(f"≥ {min(c.error / c.bound for c in checks if c.margin and c.bound):.0e} × bound")
    if not all(report.passed for report in variants):
        cells[0] += " **FAILS**"
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
