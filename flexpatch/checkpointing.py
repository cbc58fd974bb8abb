"""Choose how many layers to recompute in backward: as many as memory demands, measured.

Sizes are in bytes.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flexpatch.errors import FlexpatchError, FlexpatchWarning
from flexpatch.internals import layers_of
from flexpatch.row_calls import plan_in
from flexpatch.segments import NO_LOAD, Load

# Of the memory that the process could have: allocators lose some to fragments, kernels take workspaces.
USABLE = 0.9

# The value of a layer's ``gradient_checkpointing`` for one call that keeps its activations. It counts as False and can
# be told from a user's False, which stays after a call that was interrupted.
KEPT = 0
GATHERS = (
    "flexpatch: under ZeRO-3 recompute_layers='auto' recomputes all layers: ranks gather weights together, so none "
    "may decide by its own memory; a number, apply(model, recompute_layers=8), is the same on all"
)

log = logging.getLogger(__name__)


def renamed(recompute_layers: int | str | None, checkpointing: int | str) -> int | str:
    """Take a setting by its former name, with a warning.

    Args:
        recompute_layers: The same by its name.
        checkpointing: As given by the former name.

    Returns:
        The setting.

    Raises:
        FlexpatchError: If both were given.
    """
    warnings.warn("apply(checkpointing=...) is now called recompute_layers", DeprecationWarning, 3)
    if recompute_layers is not None:
        raise FlexpatchError("checkpointing is the former name of recompute_layers: give one of them")
    return checkpointing


class Memory(NamedTuple):
    """Memory of one device.

    Attributes:
        allocated: In tensors now.
        held: By this process for its tensors, a peak that nobody resets.
        limit: As much as this process could hold.
    """

    allocated: int
    held: int
    limit: int


def cuda_memory(device: torch.device) -> Memory:
    """Measure a CUDA device.

    Raises:
        FlexpatchError: If ``device`` is another.
    """
    if device.type != "cuda":
        raise FlexpatchError(
            f"recompute_layers='auto' measures the memory of a CUDA device, and this model is on {device}: give a "
            "number, flexpatch.apply(model, recompute_layers=8)"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    held = torch.cuda.memory_reserved(index)
    limit = min(free + held, total * torch.cuda.get_per_process_memory_fraction(index))
    return Memory(torch.cuda.memory_allocated(index), held, int(limit))


class Recomputation:
    """Choose which of a model's checkpointed layers a call recomputes in backward: a stage of calls.

    With ``"auto"`` all are recomputed until the optimizer has made its first step: only then gradients and its state
    exist. The first calls measure the bytes that a layer would keep for a token, one kind of layer a call: layers of a
    hybrid keep unlike much. A row of a hybrid with more states or separate sequences a token than these is taken to
    keep more in proportion, which is the most it can. Every call measures those that a step holds. From then on a call
    of T tokens keeps the activations of as many layers as fit between that and ``USABLE`` of the memory.

    Args:
        setting: The number of layers to recompute, from the first, or ``"auto"``.
        memory: Measures a device.

    Raises:
        FlexpatchError: For anything else.
    """

    def __init__(self, setting: int | str, memory: Callable[[torch.device], Memory] = cuda_memory) -> None:
        if setting != "auto" and (type(setting) is not int or setting < 0):
            raise FlexpatchError(f"recompute_layers={setting!r}; expected a number of layers, 'auto' or None")
        self.setting = setting
        self.memory = memory
        self.kept: list[Any] = []  # layers whose checkpointing is off for the call that runs
        # By kind, kept by a layer for one token, beyond its bytes when checkpointed.
        self.layer_bytes: dict[str, float] = {}
        self.load = NO_LOAD  # the lightest of the rows that were measured
        self.tokens = 0  # of the longest row before the first step
        self.held = 0  # by steps that checkpoint all layers
        self.idle = 0  # allocated between steps
        self.weights: Tensor | None = None
        self.stepped = False

    def __call__(
        self, backbone: PreTrainedModel, call: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], None] | None]:
        """Switch checkpointing off for layers whose activations this call keeps.

        Args:
            backbone: The backbone that is called.
            call: Its arguments by name.

        Returns:
            The arguments as they are, and what switches checkpointing on again; ``None`` if nothing was switched off.
        """
        self.restore()  # an interrupted call may have left some
        if call.get("input_ids") is None or not (backbone.training and torch.is_grad_enabled()):
            return call, None
        layers = layers_of(backbone)
        if not layers:
            message = "flexpatch: recompute_layers has no effect: this model's layers were wrapped or replaced"
            warnings.warn(message, FlexpatchWarning, 2)
        layers = [layer for layer in layers if layer.gradient_checkpointing]
        if not layers:
            return call, None
        plan = plan_in(call)
        load = NO_LOAD if plan is None else plan.segments.load
        kept, measured = self.plan(layers, call["input_ids"], backbone, load)
        self.kept = list(kept)
        for layer in self.kept:
            layer.gradient_checkpointing = KEPT

        def leave(output: Any) -> None:
            self.restore()
            if measured is not None:
                measured(output is not None)

        return call, leave

    def restore(self) -> None:
        """Switch checkpointing of kept layers on again, unless somebody has set it since."""
        while self.kept:
            layer = self.kept.pop()
            if type(layer.gradient_checkpointing) is int:
                layer.gradient_checkpointing = True

    def plan(
        self, layers: Sequence[nn.Module], ids: Tensor, model: nn.Module, load: Load = NO_LOAD
    ) -> tuple[Sequence[nn.Module], Callable[[bool], None] | None]:
        """Choose which layers of a call not to recompute.

        Args:
            layers: The checkpointed layers.
            ids: (B, L) token ids.
            model: The backbone.
            load: Of the row.

        Returns:
            The layers, the last ones unless one is measured, and a function to call after the forward with whether it
            ended; ``None`` if nothing is measured.
        """
        if isinstance(self.setting, int):
            return layers[self.setting :], None
        if _gathers(layers):
            warnings.warn(GATHERS, FlexpatchWarning, 2)
            return [], None
        device = next(model.parameters()).device
        memory, tokens = self.memory(device), ids.numel()
        kinds = [kind_of(layer) for layer in layers]
        if not self.stepped:
            self._watch(memory, model, all(kind in self.layer_bytes for kind in kinds))
            if self.stepped:
                sizes = ", ".join(f"{size / 1e3:.1f}" for size in self.layer_bytes.values())
                log.info("flexpatch: layers of each kind keep %s kB a token", sizes)
        if self.stepped:
            kept = layers[len(layers) - self._kept(memory, tokens, load, kinds) :]
            log.debug("flexpatch: of %d layers, %d are kept for %d tokens", len(layers), len(kept), tokens)
            return kept, None
        self.tokens = max(self.tokens, tokens)
        unknown = [i for i, kind in enumerate(kinds) if kind not in self.layer_bytes]
        if not unknown or len(layers) < 2:
            return [], None
        last = unknown[-1]
        others = [i for i in range(len(layers)) if i != last]
        # One of another kind, if there is none of its own: layers that are recomputed keep their inputs alone.
        other = max(others, key=lambda i: (kinds[i] == kinds[last], i))
        meter = _Meter([layers[other], layers[last]], self.memory, device)
        return [layers[last]], partial(self._measured, meter, kinds[last], tokens, load)

    def _watch(self, memory: Memory, model: nn.Module, measured: bool) -> None:
        """Note whether an optimizer has changed the weights, and the memory held until then."""
        weights = _some_weights(model)
        # By value: fused optimizers do not count up the version of a tensor.
        self.stepped = measured and self.weights is not None and not torch.equal(weights, self.weights)
        self.weights = None if self.stepped else weights
        self.held = max(memory.allocated, memory.held)
        self.idle = memory.allocated

    def _measured(self, meter: "_Meter", kind: str, tokens: int, load: Load, complete: bool) -> None:
        sizes = meter.read()
        if complete:
            checkpointed, kept = sizes
            self.load = Load(*map(min, self.load, load)) if self.layer_bytes else load
            self.layer_bytes[kind] = max(kept - checkpointed, 1) / tokens

    def _kept(self, memory: Memory, tokens: int, load: Load, kinds: Sequence[str]) -> int:
        """Count the layers, from the last, whose activations fit."""
        longer = max(0, tokens - self.tokens) * (self.held - self.idle) / self.tokens
        pending = max(0, memory.allocated - self.idle)  # forwards whose backward is still to come
        room = USABLE * memory.limit - self.held - longer - pending
        more = (now / then if then else math.inf for now, then in zip(load, self.load, strict=True) if now > then)
        weight = tokens * max([1.0, *more])
        largest = max(self.layer_bytes.values())  # stands for kinds that came later, such as layers with new adapters
        needs = accumulate(self.layer_bytes.get(kind, largest) * weight for kind in reversed(kinds))
        return sum(need <= room for need in needs)


def kind_of(layer: nn.Module) -> str:
    """Describe a layer by all that decides how much it keeps: layers of one kind keep equally much for a token.

    Args:
        layer: The layer.

    Returns:
        The classes of its modules, and the shapes of its weights, trained or frozen.
    """
    names = [type(module).__name__ for module in layer.modules()]
    weights = [f"{'trained' * p.requires_grad}{tuple(p.shape)}" for p in layer.parameters()]
    return " ".join(names + weights)


def _gathers(layers: Sequence[nn.Module]) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 gathers a layer's weights at each call, in recomputation too."""
    return any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters())


def _some_weights(model: nn.Module) -> Tensor:
    """Take a few hundred values of each trained parameter."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    parts = [p.flatten()[:: p.numel() // 256 + 1].float() for p in local]
    return torch.cat(parts) if parts else torch.empty(0)


class _Meter:
    """Measures the bytes that each of some layers keeps allocated after its forward."""

    def __init__(self, layers: Sequence[nn.Module], memory: Callable[[torch.device], Memory], device: Any) -> None:
        self.now = lambda: memory(device).allocated
        self.layers = layers
        self.before: dict[nn.Module, int] = {}
        self.after: dict[nn.Module, int] = {}
        self.handles: list[Any] = []
        for layer in layers:
            self.handles.append(layer.register_forward_pre_hook(lambda layer, _: self._note(self.before, layer)))
            self.handles.append(layer.register_forward_hook(lambda layer, *_: self._note(self.after, layer)))

    def _note(self, when: dict[nn.Module, int], layer: nn.Module) -> None:
        when[layer] = self.now()

    def read(self) -> list[int]:
        for handle in self.handles:
            handle.remove()
        return [self.after[layer] - self.before[layer] for layer in self.layers if layer in self.after]
