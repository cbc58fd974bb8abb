"""Runs a program as one of several CPU ranks, which then leave at once.

    torchrun --nproc_per_node 2 tests/cpu_ranks.py PROGRAM ...
    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file FILE --num_processes 2 tests/cpu_ranks.py PROGRAM ...

The second is for FSDP2 and ZeRO-3, which accelerate has for GPUs alone. All that is told to accelerate is that gloo is
the backend; what it does with engines is the same code on every device.
"""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from transformers import training_args

ROOT = Path(__file__).resolve().parent.parent


def torchrun(ranks: int = 2) -> list[str]:
    """Python's arguments that start the program whose name follows them on so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__]


def start_python(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    *,
    fails: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, without GPUs and hub; it must succeed, or fail."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **more, **(environment or {})}, cwd=folder,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr[-8000:]
    return done


def pretend() -> None:
    """Let accelerate take the ranks for GPUs whose backend is gloo; their device is in ACCELERATE_TORCH_DEVICE."""

    def backend(*_: Any) -> tuple[str | None, DistributedType]:
        return ("gloo", DistributedType.MULTI_GPU) if "LOCAL_RANK" in os.environ else (None, DistributedType.NO)

    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    PartialState._prepare_backend = backend
    training_args.is_torch_bf16_gpu_available = lambda: True
    if find_spec("deepspeed"):
        from deepspeed import ops  # gloo does without its shared memory, which it would compile for most of a minute

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave() -> NoReturn:
    """End a rank that has done its work.

    Not as Python does: gloo's thread may still hold the latest collective's tensors, asks for the interpreter's lock to
    free them, and Python, once it is finalizing, ends a thread that does; C++ then aborts ("terminate called without an
    active exception"). One run in about 50 did so.
    """
    if distributed.is_initialized():
        distributed.barrier()  # a peer may still need this rank's connections
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    if "ACCELERATE_TORCH_DEVICE" in os.environ:
        pretend()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    leave()
