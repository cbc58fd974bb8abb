"""Keep the matrix products of a layer, and compute everything else again in backward: between all of it and nothing.

Norms, rope, activations, casts and the narrow products of adapters hold most of what an uncompiled layer keeps, and a
third of what a compiled one keeps, but take little of its time. Torch's selective checkpointing tells operations apart
as they run, and the compiler knows it too: there the products are chosen once, as the graph is made.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# A product of fewer terms, such as that of a LoRA adapter's second matrix, moves numbers for longer than it computes.
INNER = 256
# Products of weights and tokens. Batched ones are left out: those of queries and keys have as many numbers as a mask.
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
ATTENTION = ("scaled_dot_product", "flex_attention", "flash_attn")


def choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Tell whether the output of an operation is kept.

    Args:
        context: Of torch.
        operation: That runs.
        args, kwargs: Its arguments.

    Returns:
        Torch's word for it.
    """
    place = PRODUCTS.get(operation)
    if place is not None and args[place].shape[-1] >= INNER:
        return CheckpointPolicy.MUST_SAVE
    return choose_attention(context, operation)


def choose_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Tell whether an operation is attention, whose output alone is kept.

    Args:
        context: Of torch.
        operation: That runs.
        args, kwargs: Its arguments.

    Returns:
        Torch's word for it.
    """
    keeps = any(name in str(operation) for name in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> Any:
    """Make the two contexts in which a layer runs and is computed again but for its products."""
    return create_selective_checkpoint_contexts(choose)


def attention_contexts() -> Any:
    """Make the two contexts in which a layer runs and is computed again but for attention."""
    return create_selective_checkpoint_contexts(choose_attention)


# Torch stores compiled graphs under these names, and makes them anew where there is none.
contexts.cache_hash = f"flexpatch: products of {INNER} terms, attention"  # type: ignore[attr-defined]
attention_contexts.cache_hash = "flexpatch: attention"  # type: ignore[attr-defined]


def can_keep_products(layer: nn.Module) -> bool:
    """Tell whether a layer's checkpointing function is torch's own, not reentrant, and has no contexts yet.

    Others, such as reentrant ones or those that move activations to the host, take no contexts or have a job that these
    would undo. Torch's debugging of checkpoints has contexts of its own.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if not isinstance(function, partial) or function.func is not checkpoint:
        return False
    given, everywhere = function.keywords, getattr(checkpointing, "_checkpoint_debug_enabled", None)
    debugs = given.get("debug", False) if everywhere is None else everywhere
    return given.get("use_reentrant") is False and "context_fn" not in given and not debugs


def keep_products(layer: Any, made: Callable[[], Any] = contexts) -> None:
    """Let a checkpointed layer keep its products until :func:`keep_nothing`.

    Args:
        layer: A layer that :func:`can_keep_products`.
        made: Makes the contexts in which it runs.
    """
    before = layer._gradient_checkpointing_func
    now = partial(checkpoint, **before.keywords, context_fn=made)
    now.before = before  # type: ignore[attr-defined]  # a partial takes attributes
    layer._gradient_checkpointing_func = now


def keep_nothing(layer: Any) -> None:
    """Undo :func:`keep_products`, unless somebody has set another function since."""
    now = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = getattr(now, "before", now)


def way_of(layer: Any) -> str:
    """Tell what a layer keeps of the call that runs.

    Args:
        layer: A layer that may be checkpointed, by torch's own function.

    Returns:
        A name of ``flexpatch.keeping.WAYS``, or ``"nothing"`` if it is recomputed wholly.
    """
    if not layer.gradient_checkpointing:
        return "everything"
    made = layer._gradient_checkpointing_func.keywords.get("context_fn")
    return {contexts: "products", attention_contexts: "attention"}.get(made, "nothing")


def watch_products(layer: nn.Module, note: Callable[[bool], Any]) -> None:
    """Let a checkpointed layer tell whether its products may be kept; undo it with :func:`keep_nothing`.

    Args:
        layer: A layer that :func:`can_keep_products`. It is recomputed wholly.
        note: Called after its next forward with whether all of them still had their numbers.
    """
    keep_products(layer, lambda: (_Watch(note), nullcontext()))


class _Watch(TorchDispatchMode):
    """Compares the outputs that would be kept at the end of a forward with what they were.

    Kernels may write over what they are given, and some leave no trace of it (Liger's rope). Gradients computed from
    such outputs would be wrong in silence.
    """

    supports_higher_order_operators = True

    def __init__(self, note: Callable[[bool], Any]) -> None:
        super().__init__()
        self.note = note
        self.outputs: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if choose(None, func, *args, **(kwargs or {})) == CheckpointPolicy.MUST_SAVE:
            several = output if isinstance(output, tuple) else (output,)
            self.outputs += [(x.detach(), x.clone()) for x in several if isinstance(x, Tensor)]
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self.note(all(torch.equal(now.nan_to_num(), then.nan_to_num()) for now, then in self.outputs))
        self.outputs.clear()
