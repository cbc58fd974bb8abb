"""Starts programs as processes, alone or on several CPU ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"
# Of a process: where flexpatch and the tests' own packages, helpers and programs, are found.
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


def torchrun(ranks: int = 2) -> list[str]:
    """Python's arguments that start the program whose name follows them on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(PROGRAMS / "cpu_ranks.py")]


def start_python(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    *,
    fails: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, without GPUs and hub; it must succeed, or fail."""
    more = {"PYTHONPATH": PATH, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **more, **(environment or {})}, cwd=folder,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr[-8000:]
    return done
