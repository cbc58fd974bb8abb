"""Checks parity of every registered architecture, rows and folded batches, and writes the tables of the documentation.

    python benchmarks/parity.py                                # CPU, float64
    python benchmarks/parity.py --images                       # prompts with images alone, of multimodal classes
    python benchmarks/parity.py --device cuda --dtype bfloat16 --jobs 14 --reports runs/parity.jsonl --minutes 8

Each row is the worst of an architecture's tiny random models (one per mask, window and rope variant). First variants
run first. With ``--reports`` each report is kept as it comes, and a later call continues an earlier one. Exit code 1 if
a model fails, 3 if some have not run.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from flexpatch.layouts import multimodal_types
from flexpatch.models import tiny_model, tiny_types, variants
from flexpatch.parity import Check, Report, check_parity

HEAD = (
    "| `model_type` | variants | leaking tokens | log-probs, rows: error (bound), nats | folded | gradients, rows: "
    "error (bound) | folded | controls off by |\n|---|---|---|---|---|---|---|---|"
)

IMAGES_HEAD = (
    "| `model_type` | variants | leaking tokens | log-probs, rows: error, nats | folded | gradients of text, rows: "
    "error | folded | of the tower, rows | folded | images taken as equal, nats | weakest control |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32", "bfloat16"])
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "dense"])
    parser.add_argument("--types", nargs="+", choices=tiny_types(), metavar="TYPE", help="default: all")
    parser.add_argument("--images", action="store_true", help="print the checks on prompts with images")
    parser.add_argument("--variants", type=int, help="most variants of each type")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--minutes", type=float, help="start no model after so many minutes, and print the results so far"
    )
    parser.add_argument("--reports", type=Path, help="JSON Lines file: read its reports, and append the missing ones")
    parser.add_argument("--table", type=Path, help="write settings and table to this file too")
    options = parser.parse_args()
    options.types = options.types or [t for t in tiny_types() if not options.images or t in multimodal_types()]
    how = dict(device=options.device, dtype=options.dtype, backend=options.backend)
    cases = [(t, v) for t in options.types for v in range(len(variants(t)))[: options.variants]]
    cases.sort(key=lambda case: case[1])
    done = kept(options.reports, how)
    missing = [case for case in cases if case not in done]
    failed = {}
    start = time.time()
    # Several processes, because each compiles its own kernels, which takes most of the time on a GPU.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        results = {pool.submit(verify, *case, **how): case for case in missing}
        for count, result in enumerate(as_completed(results), 1):
            case = results[result]
            if result.cancelled():
                continue
            if error := result.exception():
                failed[case], verdict = error, f"{type(error).__name__}: {error}".split("\n")[0]
            else:
                done[case] = report = result.result()
                verdict = "ok" if report.passed else f"FAILS\n{report}"
                if options.reports:
                    keep(options.reports, how, case, report)
            seconds = time.time() - start
            print(
                f"{count}/{len(missing)} {seconds:4.0f} s {case[0]} {case[1]}: {verdict}", file=sys.stderr, flush=True
            )
            if options.minutes and seconds > 60 * options.minutes:
                pool.shutdown(wait=False, cancel_futures=True)
    done = {case: done[case] for case in cases if case in done}
    text = table(options.types, done, images=options.images)
    print(text)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text + "\n", encoding="utf-8")
    for case, error in failed.items():
        print(f"{case[0]} {case[1]} could not be verified: {type(error).__name__}: {error}", file=sys.stderr)
    if failed or not all(report.passed for report in done.values()):
        return 1
    if left := [f"{t} {v}" for t, v in cases if (t, v) not in done]:
        print(f"{len(left)} still to come: {', '.join(left)}", file=sys.stderr)
        return 3
    return 0


def verify(model_type: str, variant: int, device: str, dtype: str, backend: str) -> Report:
    """Verify one tiny model."""
    torch.set_num_threads(1)
    model = tiny_model(model_type, variant, dtype=getattr(torch, dtype)).to(device)
    return check_parity(model, name=model_type, backend=backend)


def kept(path: Path | None, how: dict[str, Any]) -> dict[tuple[str, int], Report]:
    """Read the reports of earlier calls with equal options and libraries."""
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    for entry in map(json.loads, lines):
        versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
        if entry["how"] == how and versions.items() <= entry["report"]["settings"].items():
            checks = [Check(**{k: v for k, v in check.items() if k != "passed"}) for check in entry["report"]["checks"]]
            report = Report(entry["report"]["model"], entry["report"]["settings"], checks)
            found[entry["type"], entry["variant"]] = report
    return found


def keep(path: Path, how: dict[str, Any], case: tuple[str, int], report: Report) -> None:
    """Append one report to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(dict(how=how, type=case[0], variant=case[1], report=report.as_dict())), file=file)


def table(types: list[str], done: dict[tuple[str, int], Report], images: bool = False) -> str:
    """Write settings, and a row for each type, as Markdown for the documentation."""
    if not done:
        return "nothing was verified"
    settings = next(iter(done.values())).settings
    lines = [" · ".join(f"{key} {value}" for key, value in settings.items()), "", IMAGES_HEAD if images else HEAD]
    for model_type in types:
        if reports := [report for (name, _), report in done.items() if name == model_type]:
            lines.append((images_row if images else row)(model_type, reports))
    return "\n".join(lines)


def row(model_type: str, variants: list[Report]) -> str:
    """Find the worst of an architecture's variants: each error divided by its bound."""
    checks = [check for report in variants for check in report.checks]
    cells = [f"`{model_type}`", str(len(variants))]
    leak = max(check.error for check in checks if check.margin is None and check.name.startswith("leak"))
    cells.append(f"{leak:.0f}")
    for kind in ("log-probs", "gradients"):
        some = [check for check in checks if check.margin is None and check.name.startswith(kind)]
        for folded in (False, True):
            worst = max(
                (check for check in some if ("folded" in check.name) == folded),
                key=lambda check: check.error / check.bound,
            )
            cells.append(f"{worst.error:.0e} ({worst.bound:.0e})")
    cells.append(f"≥ {min(c.error / c.bound for c in checks if c.margin and c.bound):.0e} × bound")
    if not all(report.passed for report in variants):
        cells[0] += " **FAILS**"
    return f"| {' | '.join(cells)} |"


def images_row(model_type: str, variants: list[Report]) -> str:
    """Find the worst of a multimodal class's variants on prompts with images."""
    checks = [check for report in variants for check in report.checks if ", images" in check.name]
    parity, controls = ([c for c in checks if (c.margin is None) == right] for right in (True, False))
    cells = [f"`{model_type}`", str(len(variants))]
    cells.append(f"{max(check.error for check in parity if check.name.startswith('leak')):.0f}")
    for kind, tower in (("log-probs", False), ("gradients", False), ("gradients", True)):
        some = [c for c in parity if c.name.startswith(kind) and ("tower" in c.name) == tower]
        for folded in (False, True):
            cells.append(f"{max(c.error for c in some if ('folded' in c.name) == folded):.0e}")
    equal = [check.error for check in controls if "taken as equal" in check.name]
    cells.append(f"{min(equal):.1f}")
    cells.append(f"≥ {min(c.error / c.bound for c in controls if c.bound):.0e} × bound")
    if not all(report.passed for report in variants):
        cells[0] += " **FAILS**"
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
