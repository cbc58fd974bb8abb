"""Sequences that ranks hold parts of, and what a row's attention must find: refused, never a number.

Context and sequence parallelism (ring attention, Ulysses) give each rank a part of every sequence and let attention
see all of it by a mask of their own, mostly the causal one. A row's rule would be dropped, and ranks would fold their
parts each in its own way. Ranks that hold whole sequences (DDP, FSDP, ZeRO, tensor parallelism) are not refused.
"""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import BuiltinFunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.errors import UnsupportedModelError

# Names that such schemes give to their functions and modules.
SCHEMES = re.compile(r"(context|sequence)_?parallel|ulysses|ring_?(flash_?)?att", re.IGNORECASE)
# Tensor parallelism splits what acts on single tokens by sequence; attention gets whole ones.
WHOLE = ("torch.distributed.tensor.parallel.", "transformers.")
# Dimensions of a device mesh, and global variables that hold a process group.
_KINDS = r"(ulysses_)?(cp|sp|seq|sequence|context|ulysses|ring)"
MESH = re.compile(rf"{_KINDS}(_?(parallel|attn|attention))?", re.IGNORECASE)
GROUP = re.compile(rf"_*{_KINDS}_(parallel_|attn_|attention_|sp_)?(process_)?group(_override)?", re.IGNORECASE)

_called: WeakSet[nn.Module] = WeakSet()


def check_parallelism(model: nn.Module, functions: Mapping[str, Callable[..., Any]], *, thorough: bool = True) -> None:
    """Refuse a model whose ranks hold parts of sequences.

    Args:
        model: Any module.
        functions: Attention functions by name, as transformers looks them up.
        thorough: Look for meshes and process groups anew, which takes a tenth of a second.

    Raises:
        UnsupportedModelError: If context or sequence parallelism is on.
    """
    found = next(_signs(model, functions, thorough), None)
    if found is not None:
        raise UnsupportedModelError(
            f"ranks hold parts of sequences here ({found}), and flexpatch shares prefixes among whole ones: the rule "
            "of a row would be dropped. Train with context or sequence parallelism off (its size set to 1), or "
            "without flexpatch: flexpatch.remove(model). DDP, FSDP, ZeRO and tensor parallelism work"
        )


def check_call(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """:func:`check_parallelism` before a call: thorough at a model's first, since trainers set up after ``apply``."""
    thorough = model not in _called
    _called.add(model)
    check_parallelism(model, functions, thorough=thorough)


class Row:
    """What attention must find of a row, and whether it was asked. An argument of the call, which reaches all layers.

    Engines rebuild arguments that are containers, and move those with a method ``to``: this is neither.
    """

    def __init__(self, length: int, masks: Any) -> None:
        """Args: ``length``: tokens of the row; ``masks``: its mask, or a dict of masks by layer type."""
        self.length = length
        self.masks = tuple(masks.values()) if isinstance(masks, dict) else (masks,)
        self.reached = False

    def check_attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Any) -> None:
        """Refuse an attention call that is not the row's. Shapes: q (B, H, L, D), k (B, G, L, D).

        Raises:
            UnsupportedModelError: If the mask is gone or another, or the tokens are not the row's.
        """
        if not torch.compiler.is_compiling():  # compilers allow no side effects within a checkpointed layer
            self.reached = True
        if mask is None or not (isinstance(mask, BlockMask) or self._is_own(mask)):
            raise UnsupportedModelError(
                f"attention ({type(module).__name__}) got {'no mask' if mask is None else 'another mask'} in place of "
                f"a row's: something between the model and its attention {'drops' if mask is None else 'replaces'} "
                f"masks{_hooks_of(module)}, as context and sequence parallelism do. Take it off, or run the model "
                "without flexpatch: flexpatch.remove(model)"
            )
        if q.shape[2] != self.length or k.shape[2] != self.length:
            raise UnsupportedModelError(
                f"attention ({type(module).__name__}) got {q.shape[2]} queries and {k.shape[2]} keys for a row of "
                f"{self.length} tokens: something splits or gathers sequences{_hooks_of(module)}, as context and "
                "sequence parallelism do. Switch it off, or run the model without flexpatch: flexpatch.remove(model)"
            )

    def check_reached(self, backbone: nn.Module) -> None:
        """Refuse a call whose attention never asked for the row. Compiled layers cannot tell: they ask once, as they
        are compiled.

        Raises:
            UnsupportedModelError: If somebody's own attention ran instead of the registered one.
        """
        if not self.reached and not torch.compiler.is_compiling() and not any(map(_is_compiled, backbone.modules())):
            raise UnsupportedModelError(
                "a row's mask was not used: another library replaced the attention of this model's layers. Load the "
                "model without it, or run it without flexpatch: flexpatch.remove(model)"
            )

    def _is_own(self, mask: Tensor) -> bool:
        """Whether a dense mask is one of the row's, or a copy in another dtype (FSDP makes such)."""
        if any(mask is own for own in self.masks):
            return True
        owns = (own for own in self.masks if isinstance(own, Tensor) and own.shape == mask.shape)
        return any(torch.equal(own.to(mask.device, mask.dtype), mask) for own in owns)


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run compiled: by torch.compile, by its own ``compile()``, or by flexpatch."""
    has = module.__dict__
    ours = getattr(has.get("forward"), "func", None)
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or has.get("_compiled_call_impl") is not None
        or getattr(ours, "__module__", None) == "flexpatch.compiled"
    )


def _signs(model: nn.Module, functions: Mapping[str, Callable[..., Any]], thorough: bool) -> Iterator[str]:
    """What shows that ranks hold parts of sequences, the cheapest first."""
    yield from _accelerate()
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several:
        sdpa = F.scaled_dot_product_attention
        if not isinstance(sdpa, BuiltinFunctionType):
            yield f"torch's scaled_dot_product_attention is replaced by {_name(sdpa)}"
        own = _name(functions["sdpa"])
        if not own.startswith("transformers."):
            yield f"{own} stands in place of the attention function 'sdpa'"
        for name in functions:
            if _is_scheme(_name(functions[name])):
                yield f"{_name(functions[name])} stands in place of the attention function '{name}'"
        handlers = getattr(getattr(DTensor, "_op_dispatcher", None), "_custom_op_handlers", {})
        if any("scaled_dot_product" in str(operation) for operation in handlers):
            yield "torch's context parallel dispatcher is enabled"
        if thorough:
            _groups.cache_clear()
            yield from (f"a device mesh has {size} ranks in '{name}'" for name, size in _meshes())
        for space, name in _groups():
            group = space.get(name)
            if isinstance(group, distributed.ProcessGroup) and group.size() > 1:
                yield f"{space.get('__name__')}.{name} has {group.size()} ranks"
    yield from _hooks(model)


def _accelerate() -> Iterator[str]:
    """Sizes that accelerate was given, by a trainer's arguments or by its launcher."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    config = getattr(state, "_shared_state", {}).get("parallelism_config")
    used = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
    for name in ("cp_size", "sp_size"):
        if (size := getattr(config, name, None) or 1) > 1:
            yield f"accelerate's ParallelismConfig has {name}={size}"
        variable = f"PARALLELISM_CONFIG_{name.upper()}"
        if used and os.environ.get(variable, "1") not in ("", "0", "1"):
            yield f"accelerate's launcher set {variable}={os.environ[variable]}"


def _meshes() -> list[tuple[str, int]]:
    """Dimensions of more than one rank, named for sequences, of all device meshes. Torch keeps no list of meshes."""
    found = _living_meshes()
    if found:  # some may wait to be collected
        gc.collect()
        found = _living_meshes()
    return found


def _living_meshes() -> list[tuple[str, int]]:
    meshes = [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]  # isinstance is a hundred times slower
    names = [(mesh, dim, name) for mesh in meshes for dim, name in enumerate(mesh.mesh_dim_names or ())]
    return [(name, mesh.size(dim)) for mesh, dim, name in names if MESH.fullmatch(name) and mesh.size(dim) > 1]


@cache
def _groups() -> list[tuple[dict[str, Any], str]]:
    """Global variables of all modules that are named for a group of ranks which share sequences."""
    spaces = [vars(module) for module in list(sys.modules.values()) if isinstance(module, type(sys))]
    return [(space, name) for space in spaces for name in space if name[-5:].lower() in ("group", "rride")
            and GROUP.fullmatch(name)]  # fmt: skip


def _hooks(model: nn.Module) -> Iterator[str]:
    """Hooks and replaced forwards of ``model`` that bear the name of a scheme."""
    todo = [model]
    while todo:  # before every call: names of modules are slow to ask for
        has = (module := todo.pop()).__dict__
        todo += [child for child in has["_modules"].values() if child is not None]
        if has["_forward_pre_hooks"] or has["_forward_hooks"] or "forward" in has:
            hooks = (*has["_forward_pre_hooks"].values(), *has["_forward_hooks"].values(), has.get("forward"))
            yield from (
                f"{type(module).__name__} has the hook {name}" for name in map(_name, hooks) if _is_scheme(name)
            )


def _hooks_of(module: nn.Module) -> str:
    names = ", ".join(dict.fromkeys(map(_name, module.__dict__["_forward_pre_hooks"].values())))
    return f" (hooks of this layer: {names})" if names else ""


def _name(function: Any) -> str:
    """Where a function comes from, in words: its module and its name."""
    while isinstance(function, partial):
        function = function.func
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', None)}"


@cache
def _is_scheme(name: str) -> bool:
    return SCHEMES.search(name) is not None and not name.startswith(WHOLE)
