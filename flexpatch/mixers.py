"""Find a model's mixers that no mask can cut, and look at how they treat padding and engines.

:mod:`flexpatch.unshare` runs them on separate sequences.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from flexpatch.devices import card_of
from flexpatch.errors import UnsupportedModelError
from flexpatch.registry import DELTA_RULE, FULL, SLIDING, Adapter, Visible

# Engines whose modules gather their weights at each call.
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
# The function of transformers' modeling files that sets hidden states of padding to zero.
MASKING = "apply_mask_to_padding_states"
# Names of modules that attend to an encoder's output: a decoder that runs alone calls none of them.
CROSS = {"encoder_attn"}
# Releases of Triton that compile flash-linear-attention's gated delta rule wrongly on Hopper GPUs.
WRONG_FROM, RIGHT_FROM = Version("3.4"), Version("3.7.1")


def names_of(module: nn.Module) -> list[str]:
    """Return the names of a module's class and its bases: FSDP2 and others swap the class for a subclass.

    Args:
        module: Any module.

    Returns:
        The names, the class's own first.
    """
    return [base.__name__ for base in type(module).__mro__]


def mixers_of(module: nn.Module, rules: Mapping[str, Any]) -> Iterator[nn.Module]:
    """Find the outermost modules of the classes that ``rules`` name.

    Args:
        module: The module to search.
        rules: By class name.

    Returns:
        An iterator of them, without those for cross-attention.
    """
    for name, child in module.named_children():
        if name in CROSS:
            continue
        if any(each in rules for each in names_of(child)):
            yield child
        else:
            yield from mixers_of(child, rules)


def check_mixers(backbone: nn.Module, config: Any, adapter: Adapter, *, compile: bool) -> None:
    """Refuse a model whose record names mixers that it does not have, and compiled layers around mixers.

    Args:
        backbone: Its backbone.
        config: The configuration of its text stack.
        adapter: The record of its architecture.
        compile: Whether its layers are to be compiled.

    Raises:
        UnsupportedModelError: With the way out.
    """
    found = any(True for _ in mixers_of(backbone, adapter.unshared))
    attention_alone = set(getattr(config, "layer_types", None) or ("others",)) <= {FULL, SLIDING}
    if adapter.unshared and not found and not attention_alone:
        raise UnsupportedModelError(
            f"this model has no {' or '.join(adapter.unshared)}, which its adapter names: this release of transformers "
            "has another layout, or another library replaced them"
        )
    _check_fla(backbone, adapter, next(backbone.parameters()).device)
    if compile and not adapter.marks:
        raise UnsupportedModelError(
            "layers of this architecture keep arguments from their attention by which compiled ones are checked. Apply "
            "with compile=False"
        )
    if found and compile:
        raise UnsupportedModelError(
            "mixers of this model run on separate sequences, whose number and lengths differ in every row: each would "
            "compile anew. Apply with compile=False"
        )


def _check_fla(backbone: nn.Module, adapter: Adapter, device: torch.device) -> None:
    """Refuse to train with kernels whose gradients are known to be wrong: patched or not, the model would use them.

    flash-linear-attention itself refuses them, in the first backward pass.
    """
    delta_rules = any(DELTA_RULE in kinds for kinds in adapter.branched.values())
    if not delta_rules or find_spec("fla") is None or find_spec("tilelang") is not None:
        return
    trains = any(parameter.requires_grad for parameter in backbone.parameters())
    card = card_of(device)
    hopper = card.kind == "cuda" and card.capability[0] == 9
    if trains and hopper and WRONG_FROM <= Version(metadata.version("triton")) < RIGHT_FROM:
        raise UnsupportedModelError(
            f"flash-linear-attention on Hopper GPUs gets wrong gradients of the gated delta rule with Triton "
            f"{metadata.version('triton')} (its issue 640): install Triton {RIGHT_FROM} or later (parity was checked "
            "with it under torch 2.11), or tilelang, or uninstall flash-linear-attention, without which transformers "
            "runs torch's own operations, slowly"
        )


def visible_in(mixer: nn.Module, rules: Mapping[str, Callable[[Any], Visible | None]]) -> Visible | None:
    """Find what attention in a mixer sees.

    Args:
        mixer: One of the modules that ``rules`` name.
        rules: By class name.

    Returns:
        ``None`` for a mixer that takes no mask.
    """
    return next(rules[name] for name in names_of(mixer) if name in rules)(mixer)


def skip_padding(mixers: Sequence[nn.Module], rules: Mapping[str, Callable[[Any], Visible | None]]) -> bool:
    """Tell whether mixers of the unpatched model set the hidden states of padding to zero.

    A state then is still empty at a sequence's first token, wherever that stands. Other states run over padding.

    Args:
        mixers: Mixers of one model.
        rules: By class name.

    Returns:
        Whether all of them do.
    """
    return all(
        visible_in(mixer, rules) is None
        and "attention_mask" in signature(type(mixer).forward).parameters
        and any(hasattr(sys.modules.get(base.__module__), MASKING) for base in type(mixer).__mro__)
        for mixer in mixers
    )


def look_over(
    backbone: nn.Module, rules: Mapping[str, Any], names: Collection[str]
) -> tuple[list[tuple[nn.Module, str]], bool]:
    """Find in one walk what each row's forward must know of a model, which an engine may have changed since the last.

    An engine that gathers weights at each call of a layer within mixers needs ranks to make equally many. DeepSpeed's
    ZeRO-3 does so, and FSDP where it wraps parts of layers.

    Args:
        backbone: The backbone.
        rules: By class name: the mixers that run on separate sequences.
        names: Names of attributes.

    Returns:
        Modules that have such an attribute of their own, each with its name; and whether an engine gathers within
        mixers.
    """
    found: dict[tuple[nn.Module, str], None] = {}  # layers may share a module
    gathers = False
    kinds: dict[type, tuple[bool, bool]] = {}  # whether modules of a class are mixers, and gather their weights
    todo = [(backbone, False)]
    # Before every call, so it must cost little: most modules are parts of adapters, and have neither.
    while todo:
        module, within = todo.pop()
        has, kind = module.__dict__, type(module)
        if kind not in kinds:
            bases = {base.__name__ for base in kind.__mro__}
            kinds[kind] = not bases.isdisjoint(rules), not bases.isdisjoint(SHARDED)
        for name in names:
            if name in has:
                found[module, name] = None
        if within and not gathers:
            gathers = kinds[kind][1] or any("ds_id" in vars(own) for own in module.parameters(recurse=False))
        inside = within or kinds[kind][0]
        todo += [(child, inside) for child in has["_modules"].values() if child is not None]
    return list(found), gathers
