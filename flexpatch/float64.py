"""Float64 in all of a model: transformers' models compute some steps in float32, even if their weights are float64."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flexpatch.errors import FlexpatchError
from flexpatch.internals import dequantize, eager_experts

SOFTMAXES = (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax)
# Attention scores have four dimensions: batch, heads, queries, keys. Scores of a router have two.
SCORES = 4
FLOAT32 = torch.finfo(torch.float32).max
# Functions of two tensors that must be of one dtype.
PAIRS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, F.grid_sample)
CASTS = (Tensor.to, Tensor.new_zeros, torch.zeros_like)


class Float64(TorchFunctionMode):
    """Keep float64 tensors float64, where transformers' norms, ropes, routers and softmaxes convert them to float32.

    Within ``backward`` the mode is off, also for layers that are recomputed: torch suspends modes there.

    Args:
        attention_only: Widen the softmax of attention alone. FlexAttention computes it in float64, and a model's eager
            attention in float32.
    """

    def __init__(self, attention_only: bool = False) -> None:
        super().__init__()
        self.attention_only = attention_only

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        lifts = not self.attention_only
        if lifts and func in PAIRS and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args[:2]):
            # Ropes multiply by float32 positions, and towers sample and pool at them.
            args = (*(x.to(torch.float64) for x in args[:2]), *args[2:])
        if func is torch.full and len(args) > 1 and abs(args[1]) > FLOAT32 and "dtype" not in kwargs:
            return func(*args, dtype=torch.float64, **kwargs)  # XGLM fills one with a float64's least number
        if not (args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64):
            return func(*args, **kwargs)
        if lifts and (func is Tensor.float or (func is Tensor.type and torch.float32 in args[1:])):
            return args[0]
        if (func in SOFTMAXES and (lifts or args[0].ndim == SCORES)) or (lifts and func in CASTS):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def wide_copy(model: nn.Module) -> nn.Module:
    """Copy a model to float64, with checkpointing off. A 16-bit model is copied to float32 if memory is short.

    Args:
        model: A model of transformers. It stays as it is.

    Returns:
        The copy, on the model's device.

    Raises:
        FlexpatchError: If no copy fits into memory.
    """
    parameters = list(model.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    weights = sum(p.numel() * (2 if p.requires_grad else 1) for p in parameters)  # and gradients
    free = _free_memory(device)
    dtypes = [torch.float64] if dtype.itemsize > 2 else [torch.float64, torch.float32]
    wide = next((each for each in dtypes if each.itemsize * weights < free), None)
    if wide is None:
        need = dtypes[-1].itemsize * weights
        raise FlexpatchError(
            f"a copy of the model in {dtypes[-1]}, with gradients, needs {need / 1e9:.1f} GB on {device}; "
            f"{free / 1e9:.1f} are free: verify it with --lora, or a smaller model of the architecture"
        )
    # Some models keep tensors of their latest forward (RecurrentGemma), which have a history and cannot be copied.
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo = {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    copied = eager_experts(dequantize(copy.deepcopy(model, memo)).to(wide))
    if checkpoints(copied):
        copied.gradient_checkpointing_disable()  # type: ignore[operator]
    return copied


def checkpoints(model: nn.Module) -> bool:
    """Return whether any layer of ``model`` is recomputed in backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
