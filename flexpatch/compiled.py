"""Compiled decoder layers: for rows alone, since generation would compile anew for every token.

A layer's ``forward`` is replaced on the object, inside its hooks: those of FSDP stay outside the graph.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.attention import many_recompiles
from flexpatch.errors import UnsupportedModelError


def check_forwards(layers: Iterable[nn.Module]) -> None:
    """Raises:
    UnsupportedModelError: If another library has replaced the forward of one of ``layers``.
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
    """Undo :func:`compile_layers` on any module."""
    if _is_ours(module):
        del module.forward


def _is_ours(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    rows = any(isinstance(argument, BlockMask) for argument in (*args, *kwargs.values()))
    if not rows or torch.compiler.is_compiling():
        return _plain(layer, *args, **kwargs)
    try:
        with many_recompiles():
            return _compiled()(layer, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UnsupportedModelError(
            f"a {type(layer).__name__} of this model does not compile; apply with compile=False. Known causes: experts "
            "run by a loop (set_experts_implementation('grouped_mm'), in 16 bits), and hooks of modules in the layer: "
            "DeepSpeed's ZeRO-3 gathers weights in them (FSDP2 does not), and transformers sets some when "
            "output_hidden_states or output_attentions is first asked for. Torch says: "
            + next((line for line in str(error).splitlines() if line), type(error).__name__)
        ) from None


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@cache
def _compiled() -> Any:
    """One function for all layers: those that do the same share a graph."""
    return torch.compile(_plain, fullgraph=True, dynamic=False)
