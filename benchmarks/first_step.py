"""Measures the first step that a user waits for: with empty caches of kernels, in a second run, over a run's lengths.

    python benchmarks/first_step.py                  # on a GPU, about three minutes
    python benchmarks/first_step.py --device cpu     # small, forward alone

Each line is a process of its own. *Cold* begins with empty folders TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, *warm*
is the same program again, with what the first left in them. Packed rows: forward and backward through frozen layers
over full rows of one budget (deep rows: one document each). One line: batches of eight pairs as a stock trainer makes
them, of a set's lengths, folded; their rows differ in length from step to step. *Extra* is the time of all steps over
that of as many median ones.

Prints results as they come; writes first_step.json and table.md to --output. Exit code 1 if kernels of a warm run took
longer than --most seconds, or a packed run met more than two padded lengths.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lengths import add_lengths


def main() -> int:
    options = read_options()
    if options.child:
        print("RESULT " + json.dumps(run(options)), flush=True)
        return 0
    results: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                results.append(child(case, folder, options) | dict(case=case, state=state))
                (options.output / "first_step.json").write_text(json.dumps(results, indent=1))
                (options.output / "table.md").write_text(table(results))
    print("\n" + table(results))
    slow = [r for r in results if r["state"] == "warm" and r.get("extra", 0.0) > options.most]
    many = [r for r in results if r["case"].startswith("packed") and r.get("lengths", 0) > 2]
    failed = [r for r in results if "error" in r]
    return int(bool(slow or many or failed))


CASES = {
    "packed": dict(),
    "packed, compiled": dict(compile=True),
    "packed, deep rows": dict(document=True),
    "one line": dict(folds=True),
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--device", default="cuda")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--set", default="hh", help="lengths of pairs (%(default)s)")
    add("--layers", type=int, default=8, help="layers of Mistral-7B's shape (%(default)s)")
    add("--tokens", type=int, default=16384, help="tokens of a packed row (%(default)s)")
    add("--steps", type=int, default=20, help="steps of a run (%(default)s)")
    add("--most", type=float, default=5.0, help="seconds that a warm run may take for kernels (%(default)s)")
    add("--child", help=argparse.SUPPRESS)
    add("--output", type=Path, default=Path("runs/first_step"))
    options = parser.parse_args()
    if options.device == "cpu":
        vars(options).update(layers=2, tokens=512, steps=4)
    return options


def child(case: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a process with these caches. Returns what it found."""
    command = [sys.executable, __file__, str(options.lengths), "--child", case, "--device", options.device]
    command += ["--set", options.set, "--layers", str(options.layers), "--tokens", str(options.tokens)]
    command += ["--steps", str(options.steps)]
    caches = {name: str(Path(folder) / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"error": done.stderr[-1500:]}
    found["process"] = time.perf_counter() - start
    found["told"] = [line for line in done.stderr.splitlines() if line.startswith("flexpatch: compil")]
    print(case, json.dumps(found), flush=True)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps, in a child. Returns seconds, compiled graphs and hits of the caches."""
    import random

    import torch
    from train import SHAPES, draw_pairs
    from transformers import AutoConfig, AutoModelForCausalLM

    import flexpatch
    from flexpatch.masks import bucket
    from flexpatch.rows import build_rows
    from flexpatch.tree import Tree

    case: dict[str, Any] = CASES[options.child]
    cuda = options.device == "cuda"
    torch.manual_seed(0)
    name = "Mistral-7B" if cuda else "tiny"
    settings = SHAPES[name][1] | dict(num_hidden_layers=options.layers)
    with torch.device(options.device):
        config = AutoConfig.for_model(SHAPES[name][0], **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32).train()
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    flexpatch.apply(model, backend="auto" if cuda else "flex", compile=case.get("compile", False))
    lengths = json.loads(options.lengths.read_text())[options.set]
    vocabulary = settings["vocab_size"]
    generator = random.Random(0)
    met: set[int] = set()

    def packed() -> Any:
        size = options.tokens - generator.randrange(options.tokens // 32)
        chosen = [[size - 2 * (size // 8), size // 8, size // 8]] if case.get("document") else lengths
        pairs = draw_pairs(chosen, size, vocabulary)
        rows = build_rows([[Tree.of(*pair) for pair in pairs]]).to(options.device)
        met.add(bucket(rows.input_ids.shape[1]))
        return flexpatch.answer_logprobs(model, rows).answers.sum()

    def folded() -> Any:
        pairs = generator.choices(lengths, k=8 if cuda else 4)
        pairs = [[[generator.randrange(5, vocabulary) for _ in range(n)] for n in pair] for pair in pairs]
        pairs = [pair for pair in pairs if sum(map(len, pair)) <= options.tokens] or [[[5] * 60, [6] * 20, [7] * 20]]
        met.add(bucket(sum(sum(map(len, pair)) for pair in pairs), few=True))
        sequences = [torch.tensor(pair[0] + answer) for pair in pairs for answer in pair[1:]]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(options.device)
        return model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False, logits_to_keep=1).logits.sum()

    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        with torch.set_grad_enabled(cuda):  # flex has no backward on a CPU
            loss = folded() if case.get("folds") else packed()
        if cuda:
            loss.backward()
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    counters = torch._dynamo.utils.counters
    hits = {name: counters["inductor"].get(f"fxgraph_cache_{name}", 0) for name in ("hit", "miss", "bypass")}
    hits |= {f"autograd {n}": counters["aot_autograd"].get(f"autograd_cache_{n}", 0) for n in ("hit", "miss", "bypass")}
    median = statistics.median(times)
    return dict(
        first=times[0], median=median, extra=sum(times) - median * len(times), steps=len(times), lengths=len(met),
        graphs=counters["stats"].get("unique_graphs", 0), caches=hits, device=options.device,
        about=f"torch {torch.__version__}, " + (torch.cuda.get_device_name() if cuda else "CPU, forward alone"),
    )  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| run | caches | first step, s | median step, s | extra of all steps, s | padded lengths | graphs "
        "| of them cached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['state']} | failed | – | – | – | – | – |")
            continue
        numbers = [f"{r['first']:.1f}", f"{r['median']:.2f}", f"{r['extra']:.1f}"]
        cells = [r["case"], r["state"], *numbers, r["lengths"], r["graphs"], r["caches"]["autograd hit"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    about = next((r["about"] for r in results if "about" in r), "")
    return "\n".join([*lines, "", f"{about}; `python benchmarks/first_step.py`"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
