"""Times packed LoRA DPO on several GPUs against one: weak scaling under DDP and FSDP2.

    python benchmarks/scaling.py                          # on two GPUs, about four minutes
    python benchmarks/scaling.py --ranks 8 --engines ddp
    python benchmarks/scaling.py --device cpu --shape tiny --dtype float32 --budget 2048

Runs PackedDPOTrainer as benchmarks/trainers.py does, with compiled layers and recompute_layers="auto": first alone,
then on --ranks under each engine, as accelerate launches it with the files of examples/accelerate. Every rank takes
--bins rows of --budget tokens an epoch, and the median step of the second epoch counts, as the first rank's GPU sees
it: ranks wait for each other in every step. A GPU's share is the pairs a second of all ranks, over as many times those
of one alone. With fsdp2-whole, which is FSDP2 with fsdp_reshard_after_forward: false, layers are gathered once a step,
and stay so until their backward: for models that fit.

With --watch a step of another training in the same process is watched on the first rank, as benchmarks/waits.py does:
kernels by class, the time in which NCCL's run alone (they also wait for other ranks), and the time without any.

Prints a table, and writes scaling.json and table.md to --output.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lengths import add_lengths
from trainers import SHAPES, conditions_of, measure, settings_of
from waits import LEAST_MS, Waits, cells_of

ROOT = Path(__file__).resolve().parent.parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ALONE = "one GPU"
WHOLE = "fsdp2-whole"
TITLES = {ALONE: ALONE, "ddp": "DDP", "fsdp2": "FSDP2", WHOLE: "FSDP2, layers stay whole behind their forward"}
FILES = {"ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml", WHOLE: "fsdp2.yaml"}  # of examples/accelerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--sets", nargs="+", default=["gsm8k_4shot"])
    add("--engines", nargs="+", choices=FILES, default=["ddp", "fsdp2"])
    add("--ranks", type=int, default=2)
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--bins", type=int, default=4, help="packed batches of each rank an epoch (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a packed batch (%(default)s)")
    add("--watch", nargs="*", default=[], metavar="SET", help="sets whose steps are watched")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/scaling"))
    add("--worker", metavar="ENGINE", help="of the launcher: train as one of its ranks")
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for engine in (ALONE, *options.engines):
        start = time.perf_counter()
        subprocess.run(command(engine, options), env={**os.environ, **environment(engine, options)}, check=True)
        print(f"{TITLES[engine]}: {time.perf_counter() - start:.0f} s", flush=True)
        text = table(options)
        (options.output / "table.md").write_text(text)
    print(f"\n{text}", flush=True)


def command(engine: str, options: argparse.Namespace) -> list[str]:
    """Write the command that starts this file on the ranks of an engine."""
    words = [str(Path(__file__).resolve()), *sys.argv[1:], "--worker", engine]
    launcher: list[str] = []
    if engine != ALONE:
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(options.dtype, "no")
        file = f"{ROOT}/examples/accelerate/{FILES[engine]}"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", file]
        launcher += ["--main_process_port", "0", "--num_processes", str(options.ranks), "--mixed_precision", precision]
        launcher += [f"{ROOT}/tests/programs/cpu_ranks.py"] if options.device == "cpu" else []
    return [sys.executable, *launcher, *words]


def environment(engine: str, options: argparse.Namespace) -> dict[str, str]:
    """Name the devices that an engine sees. Accelerate has FSDP2 for GPUs alone: cpu_ranks.py pretends."""
    if options.device == "cuda":
        return {"CUDA_VISIBLE_DEVICES": "0"} if engine == ALONE else {}
    pretends = FILES.get(engine) == "fsdp2.yaml"
    return {"ACCELERATE_TORCH_DEVICE": "cpu"} if pretends else {"ACCELERATE_USE_CPU": "true"}


def work(options: argparse.Namespace) -> None:
    """Train as one rank. The first writes what it measured."""
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if options.worker == WHOLE:
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"  # the launcher takes it from the file alone
    lengths = json.loads(options.lengths.read_text())
    options.bins *= RANKS
    settings = settings_of(options)
    records = {name: measure(settings, "packed", lengths[name], 1) for name in options.sets}
    for name in options.watch:
        waits = Waits(LEAST_MS, options.device)
        measure(settings, "packed", lengths[name], 1, callbacks=[waits] if RANK == 0 else [])
        records[name] |= waits.found
    if RANK == 0:
        found = dict(ranks=RANKS, conditions=conditions_of(settings), sets=records)
        file_of(options, options.worker).write_text(json.dumps(found, indent=1))


def file_of(options: argparse.Namespace, engine: str) -> Path:
    return Path(options.output / f"{engine.replace(' ', '_')}.json")


def table(options: argparse.Namespace) -> str:
    """Write a line for each set and engine, from the files of the ranks."""
    files = {engine: file_of(options, engine) for engine in (ALONE, *options.engines)}
    results: dict[str, Any] = {engine: json.loads(path.read_text()) for engine, path in files.items() if path.exists()}
    (options.output / "scaling.json").write_text(json.dumps(results, indent=1))
    lines = ["| lengths like | | GPUs | pairs/s | ms a step | a GPU's share | peak GB |", "|---" * 7 + "|"]
    for name in options.sets:
        alone = results[ALONE]["sets"][name]
        for engine, found in results.items():
            record, ranks = found["sets"][name], found["ranks"]
            share = record["pairs_per_s"] / (ranks * alone["pairs_per_s"])
            cells = [name, TITLES[engine], str(ranks), f"{record['pairs_per_s']:.1f}", f"{record['ms_per_step']:.0f}"]
            cells += ["" if engine == ALONE else f"**{share:.2f}**"]
            cells += ["–" if record["peak_gb"] is None else f"{record['peak_gb']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += watched(results, options.watch)
    text = (
        f"PackedDPOTrainer, LoRA on all linear layers, {options.bins} rows of {options.budget:,} tokens an epoch on "
        f'each rank, compiled layers, recompute_layers="auto"; the median step of a warm epoch. '
        f"Conditions: {results[ALONE]['conditions']}. `python benchmarks/scaling.py`"
    )
    return "\n".join([*lines, "", text]) + "\n"


def watched(results: dict[str, Any], names: list[str]) -> list[str]:
    """Write where watched steps go."""
    if not names:
        return []
    kinds = dict.fromkeys(
        kind for found in results.values() for name in names for kind in found["sets"][name]["kernels"]
    )
    lines = ["", f"| ms of a step | | {' | '.join(kinds)} | GPU idle | all |", "|---" * (len(kinds) + 4) + "|"]
    for name in names:
        for engine, found in results.items():
            cells = cells_of(found["sets"][name], kinds)
            lines.append(f"| {name} | {TITLES[engine]} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
