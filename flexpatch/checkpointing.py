"""Choose how many layers to recompute in backward: as many as memory demands, measured.

Sizes are in bytes.
"""

import logging
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpatch.compiled import run_compiled
from flexpatch.errors import FlexpatchError, FlexpatchWarning
from flexpatch.internals import layers_of, text_config
from flexpatch.keeping import WAYS, Choice, Sizes, choose, mixture, moved
from flexpatch.meters import Memory, Meter, cuda_memory, hooks_take_activations, kind_of, some_weights
from flexpatch.refusals import check_routers
from flexpatch.row_calls import plan_in
from flexpatch.segments import NO_LOAD, Load
from flexpatch.selective import (
    attention_contexts,
    can_keep_products,
    keep_nothing,
    keep_products,
    watch_products,
)
from flexpatch.settings import asked

# Of the memory that the process could have: allocators lose some to fragments, kernels take workspaces.
USABLE = 0.9

# The value of a layer's ``gradient_checkpointing`` for one call that keeps its activations. It counts as False and can
# be told from a user's False, which stays after a call that was interrupted.
KEPT = 0
GATHERS = (
    "flexpatch: under ZeRO-3 recompute_layers='auto' recomputes all layers: ranks gather weights together, so none "
    "may decide by its own memory; a number, apply(model, recompute_layers=8), is the same on all"
)
OFFLOADS = (
    "flexpatch: where hooks take what backward needs, as with TRL's activation_offloading, recompute_layers='auto' "
    "recomputes all layers: it cannot see what they would keep elsewhere; a number, apply(model, recompute_layers=8), "
    "is taken as it is"
)
WHOLE = (
    "flexpatch: recompute_layers='partly' recomputes whole layers here: it needs torch's own checkpointing, "
    "model.gradient_checkpointing_enable({'use_reentrant': False}), without debug=True, no mixers that carry a state, "
    "no kernels that write over what they are given (Liger's rope), and no ZeRO-3"
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


class Recomputation:
    """Choose what a model's checkpointed layers compute again in a call's backward: a stage of calls.

    With ``"auto"`` all are recomputed until the optimizer has made its first step: only then gradients and its state
    exist. The first calls measure the bytes that a layer would keep for a token, of all its activations and of its
    products alone, one kind of layer and one of these a call: layers of a hybrid keep unlike much. A row of a hybrid
    with more states or separate sequences a token than these is taken to keep more in proportion, which is the most it
    can. Every call measures those that a step holds. From then on a call of T tokens keeps as much as fits between that
    and ``USABLE`` of the memory: the products of all layers first, then everything of the last ones. Where the products
    of half the compiled layers do not fit, as in long rows, all keep the output of attention first; what that takes is
    measured in one more call.

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
        self.partly: list[Any] = []  # layers that keep their products or attention in it
        self.survives: dict[str, bool] = {}  # by kind: whether products still have their numbers after a forward
        self.sizes = Sizes(NO_LOAD)
        self.described: tuple[list[Any], list[str]] | None = None
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
        load = NO_LOAD if (plan := plan_in(call)) is None else plan.segments.load
        routers = asked(text_config(backbone), call, "output_router_logits") and not run_compiled(layers, call)
        if routers and (self.setting in range(1, len(layers)) or (self.setting == "auto" and not _gathers(layers))):
            check_routers(layers)
        able, untried = self._able(layers, call) if plan is None else ([], {})
        graphs = bool(able) and run_compiled(able, call)
        choice, measured = self.plan(layers, call["input_ids"], backbone, load, able, graphs)
        self.kept = list(choice.everything)
        self.partly = [*choice.products, *choice.attention, *untried.values()]
        for layer in self.kept:
            layer.gradient_checkpointing = KEPT
        for layer in choice.products:
            keep_products(layer)
        for layer in choice.attention:
            keep_products(layer, attention_contexts)
        for kind, layer in untried.items():
            watch_products(layer, partial(self.survives.setdefault, kind))
        if self.setting == "partly" and len(able) < len(layers) and not untried:
            warnings.warn(WHOLE, FlexpatchWarning, 2)

        def leave(output: Any) -> None:
            self.restore()
            if measured is not None:
                measured(output is not None)
            if self.described is not None and output is not None:
                self._describe(layers, anew=True)  # for the next call: a GPU still works on this one

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
        pairs = [pair for pair in zip(self._describe(layers), layers, strict=True) if pair[1] in able]
        untried = {kind: layer for kind, layer in reversed(pairs) if kind not in self.survives}
        return [layer for kind, layer in pairs if self.survives.get(kind)], untried

    def _describe(self, layers: Sequence[nn.Module], anew: bool = False) -> list[str]:
        """List the kinds of layers. They are looked up once a call, after it: a GPU would wait 10 ms for them.

        Changes of layers that stay, such as of the weights that are trained, count from the call after the next on.
        """
        known = self.described
        if anew or known is None or len(known[0]) != len(layers) or any(map(operator.is_not, known[0], layers)):
            self.described = known = list(layers), list(map(kind_of, layers))
        return known[1]

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
        graphs: bool = False,
    ) -> tuple[Choice, Callable[[bool], None] | None]:
        """Choose which layers of a call not to recompute, or not wholly.

        Args:
            layers: The checkpointed layers.
            ids: (B, L) token ids.
            model: The backbone.
            load: Of the row.
            able: Those of the layers that can keep their products alone.
            graphs: Whether these run compiled, and so can keep attention alone.

        Returns:
            The layers, the last ones unless one is measured, and a function to call after the forward with whether it
            ended; ``None`` if nothing is measured.
        """
        if isinstance(self.setting, int):
            return Choice(layers[self.setting :]), None
        if self.setting == "partly":
            return Choice((), able), None
        blind = GATHERS if _gathers(layers) else OFFLOADS if hooks_take_activations() else None
        if blind is not None:
            warnings.warn(blind, FlexpatchWarning, 2)
            return Choice(), None
        device = next(model.parameters()).device
        memory, tokens, kinds = self.memory(device), ids.numel(), self._describe(layers)
        those = {id(layer) for layer in able}
        places = [i for i, layer in enumerate(layers) if id(layer) in those]
        usable = dict(attention=places if graphs else [], products=places, everything=range(len(layers)))

        def unknown(way: str) -> dict[str, int]:
            """Find the last layer of each kind that was not measured in a way."""
            return {kinds[i]: i for i in usable[way] if kinds[i] not in self.sizes.of[way]}

        way = next((way for way in ("everything", "products") if unknown(way)), None)
        if not self.stepped:
            self._watch(memory, model, way is None)
        choice = Choice()
        if self.stepped:
            known = usable | dict(attention=[] if unknown("attention") else usable["attention"])
            counts = self._counts(memory, tokens, load, kinds, known)
            choice = choose(layers, known, counts)
            counted = *map(len, choice), len(layers), tokens
            log.debug("flexpatch: %d layers keep everything, %d products, %d attention, of %d, for %d tokens", *counted)
            way = "attention" if unknown("attention") and counts[1] < len(layers) / 2 else None
        else:
            self.tokens = max(self.tokens, tokens)
        if way is None or len(layers) < 2:
            return choice, None
        last = max(unknown(way).values())
        # One of another kind, if there is none of its own: layers that are recomputed keep their inputs alone.
        held = {id(layer) for some in choice for layer in some}
        others = [i for i in range(len(layers)) if i != last and id(layers[i]) not in held]
        if not others:
            return choice, None
        other = max(others, key=lambda i: (kinds[i] == kinds[last], i))
        meter = Meter([layers[other], layers[last]], self.memory, device)
        measured = partial(self._measured, meter, way, kinds[last], tokens, load)
        return moved(choice, layers[last], way), measured

    def _watch(self, memory: Memory, model: nn.Module, measured: bool) -> None:
        """Note whether an optimizer has changed the weights, and the memory held until then."""
        weights = some_weights(model)
        # By value: fused optimizers do not count up the version of a tensor.
        self.stepped = measured and self.weights is not None and not torch.equal(weights, self.weights)
        self.weights = None if self.stepped else weights
        self.held = max(memory.allocated, memory.held)
        self.idle = memory.allocated

    def _measured(self, meter: Meter, way: str, kind: str, tokens: int, load: Load, complete: bool) -> None:
        read = meter.read()
        if complete:
            checkpointed, kept = read
            self.sizes.note(way, kind, max(kept - checkpointed, 1) / tokens, load)
            log.info("flexpatch: a layer that keeps %s: %.1f kB a token", way, self.sizes.of[way][kind] / 1e3)

    def _counts(
        self, memory: Memory, tokens: int, load: Load, kinds: Sequence[str], usable: Mapping[str, Sequence[int]]
    ) -> list[int]:
        """Count the layers, from the last, whose activations fit, by way."""
        longer = max(0, tokens - self.tokens) * (self.held - self.idle) / self.tokens
        pending = max(0, memory.allocated - self.idle)  # forwards whose backward is still to come
        room = USABLE * memory.limit - self.held - longer - pending
        weight = tokens * self.sizes.weight(load)
        sizes = []
        for way in WAYS:
            able = [i in usable[way] for i in range(len(kinds))]
            sizes.append([weight * size for size in self.sizes.of_layers(way, kinds, able)])
        return mixture(sizes, room)


def _gathers(layers: Sequence[nn.Module]) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 gathers a layer's weights at each call, in recomputation too."""
    firsts = (next(layer.parameters(), None) for layer in layers)  # ZeRO-3 marks all weights
    return any(hasattr(parameter, "ds_id") for parameter in firsts)
