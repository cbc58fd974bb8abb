"""Under accelerate's engines on two GPUs, with NCCL and compiled FlexAttention kernels: the weights one GPU trains.

In float32 and in bfloat16, each against one GPU's float64. Results go to stdout as they come (pytest -s).
"""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import PATH, PROGRAMS, ROOT
from programs import tensor_ranks
from programs.engine_ranks import CASES, Weights, save_model, vector

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

NAMES = [
    "one line", "one line, lora", "packed", "packed, lora", "own rows", "recompute_layers=auto", "compile",
    "answers see each other",
]  # fmt: skip
# Twice the stock trainer's error, under the same engine and in the same precision, is allowed; a broken mask must be
# this many times further off.
CONTROLS = {"no": 100, "bf16": 1}


def run(
    launcher: list[str], dtype: str, out: Path, names: list[str], gpus: str, program: str = "engine_ranks.py"
) -> dict[str, Any]:
    """What a program saves of each case: of engine_ranks.py, weights before and after."""
    save_model(out, getattr(torch, dtype))
    command = [sys.executable, *launcher, str(PROGRAMS / program), dtype, str(out), str(out), *names]
    environment = {**os.environ, "PYTHONPATH": PATH, "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    print(f"{out.name}: {time.time() - start:.0f} s", flush=True)
    return {name: torch.load(out / f"{name}.pt", map_location="cpu") for name in names}


@cache
def truth(folder: Path) -> dict[str, tuple[Weights, Weights]]:
    """One GPU, unpatched, in float64."""
    return run([], "float64", folder / "truth", list(dict.fromkeys(CASES[name].truth_name() for name in NAMES)), "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@needs_two
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.heavy("deepspeed"))])
def test_two_gpus_train_what_one_trains(engine: str, precision: str, folder: Path) -> None:
    names = [name for name in NAMES if not (engine == "zero3" and "compile" in CASES[name].options)]
    yardsticks = [CASES[name].yardstick() for name in names]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"examples/accelerate/{engine}.yaml")]
    launcher += ["--main_process_port", "0", "--num_processes", "2", "--mixed_precision", precision]
    out = folder / f"{engine} {precision}"
    ours = run(launcher, "float32", out, list(dict.fromkeys(yardsticks + names)), "0,1")
    errors = {}
    for name, (_, after) in ours.items():
        before, true = truth(folder)[CASES[name].truth_name()]
        weights = list(true)
        change = vector(true, weights) - vector(before, weights)
        errors[name] = float((vector(after, weights) - vector(true, weights)).norm() / change.norm())
    print(engine, precision, {name: f"{error:.1e}" for name, error in errors.items()}, flush=True)
    for name, yardstick in zip(names, yardsticks, strict=True):
        bound = 2 * errors[yardstick]
        if CASES[name].broken:
            assert errors[name] > CONTROLS[precision] * bound, f"{name}, yet the weights are only {errors[name]} off"
        else:
            assert errors[name] <= bound, f"{name}: {errors[name]} off; {yardstick}: {errors[yardstick]}"


@needs_two
def test_tensor_parallelism(folder: Path) -> None:
    """Two GPUs that split every layer, in float32: as close to float64 on one as the unpatched model."""
    split = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (true,) = run([], "float64", folder / "tensor truth", ["stock"], "0", "tensor_ranks.py").values()
    ours = run(split, "float32", folder / "tensor", list(tensor_ranks.CASES), "0,1", "tensor_ranks.py")
    errors = {}
    for name, found in ours.items():
        for kind in ("gradients", "weights"):
            names = list(true[kind])
            difference = vector(found[kind], names) - vector(true[kind], names)
            errors[name, kind] = float(difference.norm() / vector(true[kind], names).norm())
    print({" ".join(key): f"{error:.1e}" for key, error in errors.items()}, flush=True)
    for (name, kind), error in errors.items():
        bound = 2 * errors["stock", kind]
        if name == "answers see each other":
            assert error > CONTROLS["no"] * bound, errors
        else:
            assert error <= bound, errors
