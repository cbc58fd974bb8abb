"""Memory of a device, and what layers keep of it. Sizes are in bytes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.distributed.tensor import DTensor

from flexpatch.errors import FlexpatchError


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


def hooks_take_activations() -> bool:
    """Tell whether hooks take the tensors that are saved for backward, perhaps to the host. Torch tells by an error."""
    try:
        with disable_saved_tensors_hooks("flexpatch asks whether there are any"):
            return False
    except RuntimeError:
        return True


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


class Meter:
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
        """Take the hooks off and return the bytes of each layer."""
        for handle in self.handles:
            handle.remove()
        return [self.after[layer] - self.before[layer] for layer in self.layers if layer in self.after]


def some_weights(model: nn.Module) -> Tensor:
    """Take a few hundred values of each trained parameter, by which an optimizer's step shows.

    Args:
        model: Any module.

    Returns:
        (n,) float32, of this rank's parts.
    """
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    parts = [p.flatten()[:: p.numel() // 256 + 1].float() for p in local]
    return torch.cat(parts) if parts else torch.empty(0)
