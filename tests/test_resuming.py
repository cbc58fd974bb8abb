"""Killed with SIGKILL and resumed: the weights of a run that was never killed, bit for bit."""

from pathlib import Path

import pytest
import torch
from helpers.engines import needs_engines
from helpers.processes import PROGRAMS, start_python
from programs.killed_runs import STEPS

RANKS = [1, pytest.param(2, marks=needs_engines)]
FEW = [1, pytest.param(2, marks=[needs_engines, pytest.mark.slow])]


def killed(tmp_path: Path, ranks: int, kinds: list[str], engine: str = "ddp") -> None:
    script = str(PROGRAMS / "killed_runs.py")
    done = start_python([script, str(tmp_path), str(ranks), engine, *kinds], tmp_path, timeout=1200)
    for kind in kinds:
        assert f"{kind}: half a checkpoint was noticed" in done.stdout
        missing = tmp_path / kind / "checkpoint-10" / "trainer_state.json"
        assert f"No such file or directory: '{missing}'" in done.stderr, "transformers' own error says which checkpoint"
        whole, resumed, other = (torch.load(tmp_path / f"{kind}, {x}.pt") for x in ("whole", "resumed", "other pairs"))
        assert torch.equal(resumed["weights"], whole["weights"]), kind
        assert resumed["logs"] == whole["logs"] and len(whole["logs"]) == STEPS, kind
        assert not torch.equal(other["weights"], whole["weights"]), "resuming anywhere would pass"


@pytest.mark.parametrize("ranks", FEW)
def test_packed(tmp_path: Path, ranks: int) -> None:
    """Through the middle of several epochs, each with bins of its own, and of their last, shorter steps."""
    killed(tmp_path, ranks, ["packed"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_stock_trainers(tmp_path: Path, ranks: int) -> None:
    killed(tmp_path, ranks, ["stock", "one line"])


@needs_engines
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.heavy("deepspeed"))])
def test_sharded(tmp_path: Path, engine: str) -> None:
    """Checkpoints of several files from each rank, full fine-tuning with a reference that is sharded too."""
    killed(tmp_path, 2, ["stock", "one line", "packed"], engine)
