"""Same seed, same bits: twice in a process, and in processes that hash strings differently. On a GPU:
gpu/test_bits.py."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import PATH, PROGRAMS
from helpers.trl_runs import Packed, Stock, train, weights
from parameterized import parameterized

import flexpatch

SCRIPT = PROGRAMS / "determinism_runs.py"
Hashes = dict[str, list[str]]


@cache
def processes() -> dict[tuple[int, int], Hashes]:
    """The hashes of every case, by number of threads and PYTHONHASHSEED. All run at once."""
    started = {}
    for threads, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        command = [sys.executable, str(SCRIPT), "cpu", "--threads", str(threads)]
        # What is too small for two threads would only be computed once more.
        command += ["--only", "long"] if threads > 1 else []
        env = os.environ | dict(
            PYTHONHASHSEED=str(seed), PYTHONPATH=PATH, HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive"
        )
        started[threads, seed] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    results = {}
    for key, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-8000:]
        records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        results[key] = {record["case"]: record["hashes"] for record in records}
    return results


@parameterized.expand([1, 2])
@pytest.mark.slow
def test_the_same_bits_in_two_runs_and_two_processes(threads: int) -> None:
    """Weights and losses after three steps; and of a data set its trees, bins of two epochs, and rows."""
    one, other = processes()[threads, 0], processes()[threads, 1]
    assert len(one) == (15 if threads == 1 else 2)
    for case, (first, second, another_seed) in one.items():
        assert first == second, case
        assert another_seed != first, f"{case}: the hash says nothing"
    assert one == other


@pytest.mark.slow
def test_checkpointing_keeps_the_bits() -> None:
    """Recomputation in backward gives the bits of the forward."""
    hashes = processes()[1, 0]
    for kind in ("packed", "folded"):
        plain = hashes[f"llama 0, float32, {kind}, short"]
        assert hashes[f"llama 0, float32, {kind}, short, reentrant"] == plain
        assert hashes[f"llama 0, float32, {kind}, short, non-reentrant"] == plain


@pytest.mark.parametrize("kind", [Stock, Packed])
def test_trainers(kind: Any, tmp_path: Path) -> None:
    """TRL's DPOTrainer, on folded and on packed batches."""

    def run(seed: int) -> tuple[torch.Tensor, list[float]]:
        settings = dict(max_steps=3, seed=seed, per_device_train_batch_size=8)
        arguments = dict(token_budget=400) if kind is Packed else {}
        trainer = train(kind, tmp_path, settings=settings, **arguments)
        assert flexpatch.savings(trainer.model).factor > 1.2
        return weights(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    first, second, another_seed = run(0), run(0), run(1)
    assert len(first[1]) == 3
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert not torch.equal(first[0], another_seed[0])
