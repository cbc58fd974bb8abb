"""Choose how many layers to recompute in backward: as many as memory demands, measured.

Sizes are in bytes.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flexpatch.compiled import run_compiled
from flexpatch.errors import FlexpatchError, FlexpatchWarning
from flexpatch.internals import layers_of
from flexpatch.meters import Memory, Meter, cuda_memory, kind_of
from flexpatch.row_calls import plan_in
from flexpatch.segments import NO_LOAD, Load
from flexpatch.selective import can_keep_products, keep_nothing, keep_products, mixture, watch_products

# Of the memory that the process could have: allocators lose some to fragments, kernels take workspaces.
USABLE = 0.9

# The value of a layer's ``gradient_checkpointing`` for one call that keeps its activations. It counts as False and can
# be told from a user's False, which stays after a call that was interrupted.
KEPT = 0
GATHERS = (
    "flexpatch: under ZeRO-3 recompute_layers='auto' recomputes all layers: ranks gather weights together, so none "
    "may decide by its own memory; a number, apply(model, recompute_layers=8), is the same on all"
)
WHOLE = (
    "flexpatch: recompute_layers='partly' recomputes whole layers here: it needs torch's own checkpointing, "
    "model.gradient_checkpointing_enable({'use_reentrant': False}), no mixers that carry a state, no kernels that "
    "write over what they are given (Liger's rope), and no ZeRO-3"
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


class Choice(NamedTuple):
    """Layers of a call by what they keep.

    Attributes:
        everything: Layers that keep all their activations.
        products: Layers that keep those of matrix products and attention. All others keep their inputs alone.
    """

    everything: Sequence[nn.Module] = ()
    products: Sequence[nn.Module] = ()


class Recomputation:
    """Choose what a model's checkpointed layers compute again in a call's backward: a stage of calls.

    With ``"auto"`` all are recomputed until the optimizer has made its first step: only then gradients and its state
    exist. The first calls measure the bytes that a layer would keep for a token, of all its activations and of its
    products alone, one kind of layer and one of these a call: layers of a hybrid keep unlike much. A row of a hybrid
    with more states or separate sequences a token than these is taken to keep more in proportion, which is the most it
    can. Every call measures those that a step holds. From then on a call of T tokens keeps as much as fits between that
    and ``USABLE`` of the memory: the products of all layers first, then everything of the last ones.

    Args:
        setting: The number of layers to recompute, from the first; ``"partly"``: all but the products of all layers; or
            ``"auto"``.
        memory: Measures a device.

    Raises:
        FlexpatchError: For anything else.
    """

    def __init__(self, setting: int | str, memory: Callable[[torch.device], Memory] = cuda_memory) -> None:
        if setting not in ("auto", "partly") and (type(setting) is not int or setting < 0):
            raise FlexpatchError(f"recompute_layers={setting!r}; expected a number of layers, 'partly', 'auto' or None")
        self.setting = setting
        self.memory = memory
        self.kept: list[Any] = []  # layers whose checkpointing is off for the call that runs
        self.partly: list[Any] = []  # layers that keep their products in it
        self.survives: dict[str, bool] = {}  # by kind: whether products still have their numbers after a forward
        # By kind, kept by a layer for one token, beyond its bytes when checkpointed: everything, and products alone.
        self.layer_bytes: dict[str, float] = {}
        self.product_bytes: dict[str, float] = {}
        self.load = NO_LOAD  # the lightest of the rows that were measured
        self.tokens = 0  # of the longest row before the first step
        self.held = 0  # by steps that checkpoint all layers
        self.idle = 0  # allocated between steps
        self.weights: Tensor | None = None
        self.stepped = False

    def __call__(
        self, backbone: PreTrainedModel, call: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], None] | None]:
        """Switch checkpointing off, or to products, for layers whose activations this call keeps.

        Args:
            backbone: The backbone that is called.
            call: Its arguments by name.

        Returns:
            The arguments as they are, and what switches checkpointing on again; ``None`` if nothing was checkpointed.
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
        able, untried = self._able(layers, call) if plan is None else ([], {})
        choice, measured = self.plan(layers, call["input_ids"], backbone, load, able)
        self.kept, self.partly = list(choice.everything), list(choice.products)
        for layer in self.kept:
            layer.gradient_checkpointing = KEPT
        for layer in self.partly:
            keep_products(layer)
        for kind, layer in untried.items():
            watch_products(layer, partial(self.survives.setdefault, kind))
        self.partly += untried.values()
        if self.setting == "partly" and len(able) < len(layers) and not untried:
            warnings.warn(WHOLE, FlexpatchWarning, 2)

        def leave(output: Any) -> None:
            self.restore()
            if measured is not None:
                measured(output is not None)

        return call, leave

    def _able(self, layers: Sequence[Any], call: Mapping[str, Any]) -> tuple[list[nn.Module], dict[str, nn.Module]]:
        """List the layers of a call that may keep their products alone; and, by kind, one to find it out with.

        A graph has no operations that write over what they are given. Mixers that take separate sequences, or branch,
        wrap the checkpointing functions of their layers themselves: none of these is asked for.
        """
        if isinstance(self.setting, int) or _gathers(layers):
            return [], {}
        able = [layer for layer in layers if can_keep_products(layer)]
        if run_compiled(able, call):
            return able, {}
        pairs = [(kind_of(layer), layer) for layer in able]
        untried = {kind: layer for kind, layer in reversed(pairs) if kind not in self.survives}
        return [layer for kind, layer in pairs if self.survives.get(kind)], untried

    def restore(self) -> None:
        """Switch checkpointing of kept layers on again, unless somebody has set it since."""
        while self.kept:
            layer = self.kept.pop()
            if type(layer.gradient_checkpointing) is int:
                layer.gradient_checkpointing = True
        while self.partly:
            keep_nothing(self.partly.pop())

    def plan(
        self,
        layers: Sequence[nn.Module],
        ids: Tensor,
        model: nn.Module,
        load: Load = NO_LOAD,
        able: Sequence[nn.Module] = (),
    ) -> tuple[Choice, Callable[[bool], None] | None]:
        """Choose which layers of a call not to recompute, or not wholly.

        Args:
            layers: The checkpointed layers.
            ids: (B, L) token ids.
            model: The backbone.
            load: Of the row.
            able: Those of the layers that can keep their products alone.

        Returns:
            The layers, the last ones unless one is measured, and a function to call after the forward with whether it
            ended; ``None`` if nothing is measured.
        """
        if isinstance(self.setting, int):
            return Choice(layers[self.setting :]), None
        if self.setting == "partly":
            return Choice((), able), None
        if _gathers(layers):
            warnings.warn(GATHERS, FlexpatchWarning, 2)
            return Choice(), None
        device = next(model.parameters()).device
        memory, tokens = self.memory(device), ids.numel()
        kinds = [kind_of(layer) for layer in layers]
        unable = {id(layer) for layer in layers} - {id(layer) for layer in able}
        # Layers of a kind are measured in both ways if they can, the last one of each.
        unknown = {kinds[i]: (i, self.layer_bytes) for i in range(len(layers)) if kinds[i] not in self.layer_bytes}
        if not unknown:
            those = [i for i in range(len(layers)) if id(layers[i]) not in unable]
            unknown = {kinds[i]: (i, self.product_bytes) for i in those if kinds[i] not in self.product_bytes}
        if not self.stepped:
            self._watch(memory, model, not unknown)
            if self.stepped:
                for what, sizes in (("all activations", self.layer_bytes), ("products alone", self.product_bytes)):
                    each = ", ".join(f"{size / 1e3:.1f}" for size in sizes.values())
                    log.info("flexpatch: kB a token that layers of each kind keep, %s: %s", what, each or "-")
        if self.stepped:
            choice = self._choose(memory, tokens, load, layers, kinds, unable)
            counts = len(layers), len(choice.everything), len(choice.products), tokens
            log.debug("flexpatch: of %d layers, %d keep everything and %d products for %d tokens", *counts)
            return choice, None
        self.tokens = max(self.tokens, tokens)
        if not unknown or len(layers) < 2:
            return Choice(), None
        last, sizes = max(unknown.values(), key=lambda found: found[0])
        others = [i for i in range(len(layers)) if i != last]
        # One of another kind, if there is none of its own: layers that are recomputed keep their inputs alone.
        other = max(others, key=lambda i: (kinds[i] == kinds[last], i))
        meter = Meter([layers[other], layers[last]], self.memory, device)
        measured = partial(self._measured, meter, sizes, kinds[last], tokens, load)
        return Choice(*([[layers[last]]] if sizes is self.layer_bytes else [[], [layers[last]]])), measured

    def _watch(self, memory: Memory, model: nn.Module, measured: bool) -> None:
        """Note whether an optimizer has changed the weights, and the memory held until then."""
        weights = _some_weights(model)
        # By value: fused optimizers do not count up the version of a tensor.
        self.stepped = measured and self.weights is not None and not torch.equal(weights, self.weights)
        self.weights = None if self.stepped else weights
        self.held = max(memory.allocated, memory.held)
        self.idle = memory.allocated

    def _measured(
        self, meter: Meter, sizes: dict[str, float], kind: str, tokens: int, load: Load, complete: bool
    ) -> None:
        read = meter.read()
        if complete:
            checkpointed, kept = read
            self.load = Load(*map(min, self.load, load)) if self.layer_bytes else load
            sizes[kind] = max(kept - checkpointed, 1) / tokens

    def _choose(
        self,
        memory: Memory,
        tokens: int,
        load: Load,
        layers: Sequence[nn.Module],
        kinds: Sequence[str],
        unable: set[int],
    ) -> Choice:
        """Choose the layers, from the last, whose activations fit."""
        longer = max(0, tokens - self.tokens) * (self.held - self.idle) / self.tokens
        pending = max(0, memory.allocated - self.idle)  # forwards whose backward is still to come
        room = USABLE * memory.limit - self.held - longer - pending
        more = (now / then if then else math.inf for now, then in zip(load, self.load, strict=True) if now > then)
        weight = tokens * max([1.0, *more])
        kept = [weight * _size(self.layer_bytes, kind) for kind in kinds]
        products = [
            0.0 if id(layer) in unable or not self.product_bytes else weight * _size(self.product_bytes, kind)
            for layer, kind in zip(layers, kinds, strict=True)
        ]
        everything, some = mixture(kept, products, room)
        split, first = len(layers) - everything, len(layers) - some
        return Choice(layers[split:], [layers[i] for i in range(first, split) if products[i]])


def _size(sizes: Mapping[str, float], kind: str) -> float:
    """Look a kind up; the largest stands for kinds that came later, such as layers with new adapters."""
    return sizes.get(kind, max(sizes.values()))


def _gathers(layers: Sequence[nn.Module]) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 gathers a layer's weights at each call, in recomputation too."""
    return any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters())


def _some_weights(model: nn.Module) -> Tensor:
    """Take a few hundred values of each trained parameter."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    parts = [p.flatten()[:: p.numel() // 256 + 1].float() for p in local]
    return torch.cat(parts) if parts else torch.empty(0)
