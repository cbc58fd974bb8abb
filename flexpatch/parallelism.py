"""Refuses context and sequence parallelism, whichever library switched it on.

Under context and sequence parallelism (ring attention, Ulysses) each rank holds a part of every sequence. Attention
then sees whole sequences through a mask of the scheme, mostly the causal one, which would drop a row's rule. And each
rank would fold its parts in its own way. Ranks with whole sequences (DDP, FSDP, ZeRO, tensor parallelism) may share.
"""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import BuiltinFunctionType, ModuleType
from typing import Any
from weakref import WeakSet

from torch import distributed, nn
from torch.nn import functional as F

from flexpatch.errors import UnsupportedModelError

# Names that such schemes give to functions and modules.
SCHEMES = re.compile(r"(context|sequence)_?parallel|ulysses|ring_?(flash_?)?att", re.IGNORECASE)
# Modules with such names that are harmless: tensor parallelism splits layers that act on single tokens by sequence,
# but its attention gets whole sequences.
WHOLE = ("torch.distributed.tensor.parallel.", "transformers.")
# Names of a device mesh's dimensions, and of global variables that hold a process group.
_KINDS = r"(ulysses_)?(cp|sp|seq|sequence|context|ulysses|ring)"
MESH = re.compile(rf"{_KINDS}(_?(parallel|attn|attention))?", re.IGNORECASE)
GROUP = re.compile(rf"_*{_KINDS}_(parallel_|attn_|attention_|sp_)?(process_)?group(_override)?", re.IGNORECASE)

_called: WeakSet[nn.Module] = WeakSet()


def check_parallelism(model: nn.Module, functions: Mapping[str, Callable[..., Any]], *, thorough: bool = True) -> None:
    """Refuse a model whose ranks hold parts of sequences.

    Args:
        model: Any module.
        functions: Attention functions by name, as transformers registers them.
        thorough: Search for device meshes and process groups anew, which takes a tenth of a second.

    Raises:
        UnsupportedModelError: If context or sequence parallelism is on.
    """
    found = next(_signs(model, functions, thorough), None)
    if found is not None:
        raise UnsupportedModelError(
            f"ranks hold parts of sequences here ({found}), and flexpatch shares prefixes among whole ones: the mask "
            "of a row would be dropped. Train with context or sequence parallelism off (its size set to 1), or "
            "without flexpatch: flexpatch.remove(model). DDP, FSDP, ZeRO and tensor parallelism work"
        )


def check_call(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse parallelism before a call. The check is thorough at a model's first call, since trainers set up late.

    Args:
        model: Any module.
        functions: Attention functions by name, as transformers registers them.

    Raises:
        UnsupportedModelError: If context or sequence parallelism is on.
    """
    thorough = model not in _called
    _called.add(model)
    check_parallelism(model, functions, thorough=thorough)


def _signs(model: nn.Module, functions: Mapping[str, Callable[..., Any]], thorough: bool) -> Iterator[str]:
    """Find signs that ranks hold parts of sequences, the cheapest first."""
    yield from _accelerate()
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several:
        sdpa = F.scaled_dot_product_attention
        if not isinstance(sdpa, BuiltinFunctionType):
            yield f"torch's scaled_dot_product_attention is replaced by {name_of(sdpa)}"
        own = name_of(functions["sdpa"])
        if not own.startswith("transformers."):
            yield f"{own} stands in place of the attention function 'sdpa'"
        for name in functions:
            if _is_scheme(name_of(functions[name])):
                yield f"{name_of(functions[name])} stands in place of the attention function '{name}'"
        dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
        handlers = getattr(getattr(dtensor, "_op_dispatcher", None), "_custom_op_handlers", {})
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
    """Find sizes of parallelism that a trainer's arguments or accelerate's launcher set."""
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
    """Find dimensions of device meshes that are named for sequences and have several ranks.

    Torch keeps no list of meshes, so the garbage collector's objects are searched.
    """
    kind = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", None)

    def living() -> list[tuple[str, int]]:
        meshes = [thing for thing in gc.get_objects() if type(thing) is kind]  # isinstance is a hundred times slower
        sizes = [(name, mesh.size(i)) for mesh in meshes for i, name in enumerate(mesh.mesh_dim_names or ())]
        return [(name, size) for name, size in sizes if MESH.fullmatch(name) and size > 1]

    # A mesh may be garbage, so a find counts only if it outlives a collection.
    return living() and (gc.collect(), living())[1]


@cache
def _groups() -> list[tuple[dict[str, Any], str]]:
    """Find global variables of all modules that are named for a group of ranks which split sequences."""
    spaces = [vars(module) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    names = ((space, name) for space in spaces for name in list(space) if name[-5:].lower() in ("group", "rride"))
    return [(space, name) for space, name in names if GROUP.fullmatch(name)]


def _hooks(model: nn.Module) -> Iterator[str]:
    """Find hooks and replaced forwards of ``model`` that bear the name of a scheme."""
    todo = [model]
    while todo:  # not named_modules(), which is too slow before every call
        has = (module := todo.pop()).__dict__
        if "base_layer" not in has["_modules"]:  # peft has a dozen modules around each linear layer
            todo += [child for child in has["_modules"].values() if child is not None]
        if has["_forward_pre_hooks"] or has["_forward_hooks"] or "forward" in has:
            hooks = (*has["_forward_pre_hooks"].values(), *has["_forward_hooks"].values(), has.get("forward"))
            yield from (
                f"{type(module).__name__} has the hook {name}" for name in map(name_of, hooks) if _is_scheme(name)
            )


def hooks_of(module: nn.Module) -> str:
    """List the hooks that run before ``module``, for the end of an error message."""
    names = ", ".join(dict.fromkeys(map(name_of, module.__dict__["_forward_pre_hooks"].values())))
    return f" (hooks of this layer: {names})" if names else ""


def name_of(function: Any) -> str:
    """Return the module and the name of a function, in dots."""
    while isinstance(function, partial):
        function = function.func
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', None)}"


@cache
def _is_scheme(name: str) -> bool:
    return SCHEMES.search(name) is not None and not name.startswith(WHOLE)
