"""Compile decoder layers for rows alone: generation would compile anew for every token.

A layer's ``forward`` is replaced on the object, inside its hooks: FSDP's hooks stay outside the graph. Rows are padded
to a few lengths, each of which has a graph.

Shapes: L tokens of a row, P = bucket(L).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from flexpatch.attention import many_recompiles
from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.internals import COLLECTOR, change_tokens
from flexpatch.masks import bucket
from flexpatch.progress import compiling
from flexpatch.row_calls import a_mask

ROUTERS = "router_logits"


def pad_row(backbone: PreTrainedModel, call: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], None] | None]:
    """Pad a row to the length of its mask: the stage of calls with compiled layers.

    Args:
        backbone: The backbone that is called.
        call: Its arguments by name.

    Returns:
        The arguments, with ids and positions (B, P) in place of (B, L), and what cuts hidden states back to L tokens;
        the arguments as they are and ``None`` for calls without a block mask.

    Raises:
        FlexpatchError: If the mask is for rows of another length.
    """
    mask, ids = a_mask(call), call.get("input_ids")
    if ids is None or not isinstance(mask, BlockMask):
        if isinstance(mask, Tensor) and mask.ndim == 4:
            warnings.warn("flexpatch: compile=True has no effect on the dense backend", FlexpatchWarning, 2)
        return call, None
    length, padded = ids.shape[1], mask.seq_lengths[0]
    if padded != bucket(length):
        raise FlexpatchError(f"the block mask is for rows of up to {padded} tokens, but these have {length}")
    # The mask has this length already; tokens past the row's end see only themselves.
    wider = {name: F.pad(call[name], (0, padded - length)) for name in ("input_ids", "position_ids")}

    def leave(output: Any) -> None:
        if output is not None:
            change_tokens(output, lambda hidden_BPD: hidden_BPD[:, :length])

    return call | wider, leave


def check_forwards(layers: Iterable[nn.Module]) -> None:
    """Refuse layers whose forward another library has replaced.

    Raises:
        UnsupportedModelError: If there is one.
    """
    if any("forward" in vars(layer) and not _is_ours(layer) for layer in layers):
        raise UnsupportedModelError(
            "another library replaced the forward of this model's decoder layers; apply with compile=False"
        )


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let ``layers`` run compiled where they get a block mask."""
    for layer in layers:
        layer.forward = partial(_forward, layer)


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`compile_layers` on a module, whatever it is."""
    if _is_ours(module):
        del module.forward


def run_compiled(layers: Iterable[nn.Module], call: Mapping[str, Any]) -> bool:
    """Tell whether a call runs layers compiled.

    Args:
        layers: Decoder layers.
        call: Arguments of their backbone by name.

    Returns:
        Whether all of them are, and the call is a row's.
    """
    return isinstance(a_mask(call), BlockMask) and all(map(_is_ours, layers))


def _is_ours(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    mask = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, BlockMask)), None)
    if mask is None or torch.compiler.is_compiling():
        return _plain(layer, *args, **kwargs)
    try:
        rule = getattr(mask.mask_mod, "__name__", "")
        kind = type(layer).__qualname__, rule, torch.is_grad_enabled()
        with many_recompiles(), compiling("layers", mask.seq_lengths[0], *kind):
            return _recording(layer, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        said = next((line for line in str(error).splitlines() if line), type(error).__name__)
    # Torch keeps an error that it met in the layer's code, such as a refusal of ours, in its trace alone.
    _plain(layer, *args, **kwargs)
    raise UnsupportedModelError(
        f"a {type(layer).__name__} of this model does not compile; apply with compile=False. Known causes: experts "
        "run by a loop (set_experts_implementation('grouped_mm'), in 16 bits), peft's code of DoRA, LoHa and LoKr, "
        "and hooks of modules in the layer: DeepSpeed's ZeRO-3 gathers weights in them (FSDP2 does not). Torch says: "
        + said
    )


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _recording(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a compiled layer, and collect the router logits that transformers' hooks in it record.

    transformers reads its collector from a context variable, which does not compile, unless it is told that it runs
    compiled: then from an attribute. Recomputation in backward, when nobody collects, must run the same graph: so the
    attribute is set always.
    """
    if COLLECTOR is None:
        return _compiled()(layer, *args, **kwargs)
    collected = COLLECTOR.get()
    recorded: dict[str, list[Tensor]] = {ROUTERS: []}
    before = COLLECTOR.compiling, COLLECTOR.global_var
    COLLECTOR.compiling, COLLECTOR.global_var = True, recorded
    try:
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            output = _compiled()(layer, *args, **kwargs)
    finally:
        COLLECTOR.compiling, COLLECTOR.global_var = before
    if collected is not None and ROUTERS in collected:
        collected[ROUTERS].extend(recorded[ROUTERS])
    return output


@cache
def _compiled() -> Any:
    """Compile one function for all layers: equal layers share a graph."""
    return torch.compile(_plain, fullgraph=True, dynamic=False)
