"""How much of a forward to compute again in backward: as much as memory demands, measured.

Sizes are in bytes.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexpatch.errors import FlexpatchError, FlexpatchWarning

# Of the memory that the process could have: allocators lose some to fragments, kernels take workspaces.
USABLE = 0.9

GATHERS = (
    "flexpatch: under ZeRO-3 checkpointing='auto' computes all layers again: ranks gather weights together, so none "
    "may decide by its own memory; a number, apply(model, checkpointing=8), is the same on all"
)

log = logging.getLogger(__name__)


class Memory(NamedTuple):
    """Of one device: tensors now, what this process holds for them (a peak that nobody resets), what it could hold."""

    allocated: int
    held: int
    limit: int


def cuda_memory(device: torch.device) -> Memory:
    """Raises:
    FlexpatchError: If ``device`` is not a CUDA device.
    """
    if device.type != "cuda":
        raise FlexpatchError(
            f"checkpointing='auto' measures the memory of a CUDA device, and this model is on {device}: say how many "
            "layers to compute again, flexpatch.apply(model, checkpointing=8)"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    held = torch.cuda.memory_reserved(index)
    limit = min(free + held, total * torch.cuda.get_per_process_memory_fraction(index))
    return Memory(torch.cuda.memory_allocated(index), held, int(limit))


class Recomputation:
    """How many of a model's checkpointed layers to compute again in backward.

    With ``"auto"`` all are, until the optimizer has made its first step: only then gradients and its state exist. The
    first call measures what one layer would keep for a token, and all of them what a step holds. From then on a call of
    T tokens keeps the activations of as many layers as fit between that and ``USABLE`` of the memory.

    Args:
        setting: That number, or ``"auto"``.

    Raises:
        FlexpatchError: For anything else.
    """

    def __init__(self, setting: int | str, memory: Callable[[torch.device], Memory] = cuda_memory) -> None:
        if setting != "auto" and (type(setting) is not int or setting < 0):
            raise FlexpatchError(f"checkpointing={setting!r}; expected a number of layers, 'auto' or None")
        self.setting = setting
        self.memory = memory
        self.layer_bytes = 0.0  # what a layer keeps for one token, beyond what it keeps when checkpointed
        self.tokens = 0  # of the longest row before the first step
        self.held = 0  # by steps that checkpoint all layers
        self.idle = 0  # allocated between steps
        self.weights: Tensor | None = None
        self.stepped = False

    def plan(
        self, layers: Sequence[nn.Module], ids: Tensor, model: nn.Module
    ) -> tuple[int, Callable[[bool], None] | None]:
        """How many layers of this call to compute again, and what to do after its forward, complete or not."""
        if isinstance(self.setting, int):
            return self.setting, None
        if _gathers(layers):
            warnings.warn(GATHERS, FlexpatchWarning, 2)
            return len(layers), None
        device = next(model.parameters()).device
        memory, tokens = self.memory(device), ids.numel()
        if not self.stepped:
            self._watch(memory, model)
            if self.stepped:
                log.info("flexpatch: a layer keeps %.1f kB a token", self.layer_bytes / 1e3)
        if self.stepped:
            count = len(layers) - self._kept(memory, tokens, len(layers))
            log.debug("flexpatch: of %d layers, %d are computed again for %d tokens", len(layers), count, tokens)
            return count, None
        self.tokens = max(self.tokens, tokens)
        if self.layer_bytes or len(layers) < 2:
            return len(layers), None
        return len(layers) - 1, partial(self._measured, _Meter(layers[-2:], self.memory, device), tokens)

    def _watch(self, memory: Memory, model: nn.Module) -> None:
        """Whether an optimizer has changed the weights; the memory held until then."""
        weights = _some_weights(model)
        # By value: fused optimizers do not count up the version of a tensor.
        self.stepped = bool(self.layer_bytes) and self.weights is not None and not torch.equal(weights, self.weights)
        self.weights = None if self.stepped else weights
        self.held = max(memory.allocated, memory.held)
        self.idle = memory.allocated

    def _measured(self, meter: "_Meter", tokens: int, complete: bool) -> None:
        sizes = meter.read()
        if complete:
            checkpointed, kept = sizes
            self.layer_bytes = max(kept - checkpointed, 1) / tokens

    def _kept(self, memory: Memory, tokens: int, layers: int) -> int:
        """Layers whose activations fit."""
        longer = max(0, tokens - self.tokens) * (self.held - self.idle) / self.tokens
        pending = max(0, memory.allocated - self.idle)  # forwards whose backward is still to come
        room = USABLE * memory.limit - self.held - longer - pending
        return min(layers, max(0, int(room / (self.layer_bytes * tokens))))


def _gathers(layers: Sequence[nn.Module]) -> bool:
    """Whether DeepSpeed's ZeRO-3 gathers a layer's weights at each call, those of recomputation too."""
    return any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters())


def _some_weights(model: nn.Module) -> Tensor:
    """A few hundred values of each trained parameter."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    parts = [p.flatten()[:: p.numel() // 256 + 1].float() for p in local]
    return torch.cat(parts) if parts else torch.empty(0)


class _Meter:
    """What each of some layers keeps allocated after its forward."""

    def __init__(self, layers: Sequence[nn.Module], memory: Callable[[torch.device], Memory], device: Any) -> None:
        self.now = lambda: memory(device).allocated
        self.before: list[int] = []
        self.after: list[int] = []
        self.handles: list[Any] = []
        for layer in layers:
            self.handles.append(layer.register_forward_pre_hook(lambda *_: self.before.append(self.now())))
            self.handles.append(layer.register_forward_hook(lambda *_: self.after.append(self.now())))

    def read(self) -> list[int]:
        for handle in self.handles:
            handle.remove()
        return [after - before for before, after in zip(self.before, self.after, strict=False)]
