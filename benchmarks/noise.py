"""Tells noise from mistakes when a bound fails in low precision: several seeds, each against its float64 truth.

    python benchmarks/noise.py minimax_m2 --device cuda --seeds 8 --jobs 16
    python benchmarks/noise.py minimax_m2                      # CPU, dense

Errors are measured for every seed (of weights, tokens and the loss) and dtype: of the unpatched model one sequence at a
time and in batches, of packed rows and of folded batches. All run the same weights. A router that sends a token to
another expert makes a large error, unpatched or patched, so single ratios scatter. Two things tell noise:

- the geometric mean over seeds of patched / unpatched is near 1, like unpatched in batches / unpatched;
- float32 errors are a thousand times smaller. A wrong mask, position or gradient would be as wrong as in 16 bits.
"""

import argparse
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from flexpatch.logprobs import sum_answers
from flexpatch.models import tiny_model, tiny_types
from flexpatch.patch import apply
from flexpatch.report import Report
from flexpatch.trials import distance
from flexpatch.verification import FACTOR, Verification

# A larger mean ratio over eight seeds is no scatter of equal errors. A smaller one is within the bounds anyway.
MEAN = 1.5
LAYOUTS = ("stock", "stock in batches", "rows", "folded")
Errors = dict[str, tuple[float, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("type", choices=tiny_types(), metavar="TYPE")
    parser.add_argument("--variant", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "dense"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    start, found = time.time(), {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        results = {
            pool.submit(measure, options.type, options.variant, dtype, seed, options.device, options.backend): (
                dtype,
                seed,
            )
            for dtype in options.dtypes
            for seed in range(options.seeds)
        }
        for result in as_completed(results):
            found[results[result]] = result.result()
            print(f"{len(found)}/{len(results)} {time.time() - start:4.0f} s", file=sys.stderr, flush=True)
    good = True
    for which, kind in enumerate(("log-probs, mean error in nats", "gradients, relative error")):
        for dtype in options.dtypes:
            good &= show(kind, dtype, [found[dtype, seed] for seed in range(options.seeds)], which)
    print("\nours is as close to the truth as the unpatched model" if good else "\nOURS IS WORSE")
    return 0 if good else 1


def measure(model_type: str, variant: int, dtype: str, seed: int, device: str, backend: str) -> Errors:
    """Measure the mean log-prob error and the gradient error of each layout."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    model = tiny_model(model_type, variant, dtype=getattr(torch, dtype), seed=seed).to(device)
    run = Verification(model, Report(model_type, {}), dict(backend=backend, compile=False), seed, progress=False)
    results = {"stock": run._separate(model)}
    stock = results["stock"][0]
    constants = sum_answers(stock, run.rows)
    truth, true_gradients = run._truth(stock)
    results["stock in batches"] = run._separate(model, constants, one_batch=True)
    apply(model, backend=backend)
    results["rows"] = run._logprobs(run.rows), run._gradients(run.rows, stock)
    results["folded"] = run._separate(model, constants, batch_size=None)
    return {
        layout: (float((logps.double() - truth).abs().mean()), distance(gradients, true_gradients)[0])
        for layout, (logps, gradients) in results.items()
    }


def show(kind: str, dtype: str, seeds: list[Errors], which: int) -> bool:
    """Print one table. Returns whether patched models are no worse."""
    print(f"\n{dtype}, {kind}\n\n| seed | {' | '.join(LAYOUTS)} |\n|---|{'---|' * len(LAYOUTS)}")
    for seed, errors in enumerate(seeds):
        print(f"| {seed} | {' | '.join(f'{errors[layout][which]:.2g}' for layout in LAYOUTS)} |")
    good, cells = True, []
    for layout in LAYOUTS:
        ratios = [errors[layout][which] / errors["stock"][which] for errors in seeds]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        cells.append(
            f"{mean:.2f} ({min(ratios):.2f}–{max(ratios):.2f}; {sum(r > FACTOR for r in ratios)} beyond {FACTOR:g})"
        )
        good &= mean <= MEAN
    print(f"| ratio to stock: mean (range) | {' | '.join(cells)} |")
    return good


if __name__ == "__main__":
    sys.exit(main())
