"""Runs a program under FSDP2 or ZeRO-3 on CPU ranks, which accelerate has for GPUs alone.

    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file FILE --num_processes 2 tests/cpu_ranks.py PROGRAM ...

All that is told to accelerate is that gloo is the backend; what it does with engines is the same code on every device.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
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


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
