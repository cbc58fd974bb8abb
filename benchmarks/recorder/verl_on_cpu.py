"""Runs verl's SFT trainer on the CPU, which none of verl's platforms is; frameworks.py starts it with torchrun."""

import os
from typing import Any

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer import sft_trainer
from verl.utils import distributed


class PlatformCPU(PlatformCUDA):
    """CPU and gloo in place of CUDA and NCCL."""

    device_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def empty_cache(self) -> None: ...

    def communication_backend_name(self) -> str:
        return "gloo"


for name in ("memory_reserved", "memory_allocated", "max_memory_reserved", "max_memory_allocated", "empty_cache"):
    setattr(torch.cpu, name, lambda *_: 0)
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engine is chosen as for CUDA
set_platform(PlatformCPU())
distributed.initialize_global_process_group = lambda: torch.distributed.init_process_group("gloo")
sft_trainer.main()
