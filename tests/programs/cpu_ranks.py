r"""Runs a program as one of several CPU ranks, which then leave at once.

    torchrun --nproc_per_node 2 tests/programs/cpu_ranks.py PROGRAM ...
    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file FILE --num_processes 2 tests/programs/cpu_ranks.py \
        PROGRAM ...

The second is for FSDP2 and ZeRO-3, which accelerate has for GPUs alone. All that is told to accelerate is that gloo is
the backend; what it does with engines is the same code on every device.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from transformers import training_args


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
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does for a program
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    leave()
