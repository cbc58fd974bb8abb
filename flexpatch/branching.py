"""Let the functions of modeling files branch the calls of rows.

Each function that branches is wrapped while rows need it. A call that carries a :class:`Row` with segments is branched;
every other call reaches the original with its own arguments. The row travels with the call, so that recomputation in
backward gets the same one.
"""

import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn

from flexpatch.arrival import CALL, Row
from flexpatch.errors import UnsupportedModelError
from flexpatch.mixers import mixers_of
from flexpatch.registry import CONVOLUTION, DELTA_RULE, STATE_SPACE, Adapter
from flexpatch.states import convolve, delta_rule, kept_by, state_space
from flexpatch.unshare import Unsharing

# The release of transformers from which mixers hand their keyword arguments on to these functions.
SINCE: dict[tuple[str, ...], str] = {(CONVOLUTION,): "5.23"}
SINCE_OTHERS = "5.16"
# How mixers that no mask can cut may run. "auto": branched where that was found exact, with transformers' own functions
# and with flash-linear-attention's kernels, and unshared elsewhere.
WAYS = ("auto", "branched", "unshared")


def not_fused(*call: Any, **kwargs: Any) -> None:
    """Decline a kernel that is convolution and scan in one: the layer then calls the two."""


# By the name of a function in modeling files: what it is, and what branches it.
HANDLERS: dict[str, tuple[str | None, Callable[..., Any]]] = {
    "causal_conv1d_fn": (CONVOLUTION, convolve),
    "torch_chunk_gated_delta_rule": (DELTA_RULE, delta_rule),
    "chunk_gated_delta_rule": (DELTA_RULE, delta_rule),
    "chunk_kimi_delta_attention": (DELTA_RULE, delta_rule),
    "mamba2_chunk_scan": (STATE_SPACE, state_space),
    "mamba2_split_conv1d_scan_combined": (None, not_fused),
}


class Branches:
    """The hooks of a model's mixers that are branched on the row. They are pickled with the model.

    Args:
        branched: Class name -> the functions of its modeling file that it calls.
        unsharing: Knows the row of the forward that runs, for mixers that are given none.
    """

    def __init__(self, branched: Mapping[str, tuple[str, ...]], unsharing: Unsharing) -> None:
        self.branched = branched
        self.unsharing = unsharing
        self.kinds: Counter[str] = Counter()  # calls of a forward
        self.modules: set[str] = set()  # names of modeling files

    def register(self, mixers: Iterable[nn.Module]) -> None:
        """Put a hook on each mixer that is branched.

        Args:
            mixers: Mixers of one model.
        """
        for mixer in mixers:
            name, module = own_class(mixer, self.branched)
            if name not in self.branched:
                continue
            self.kinds.update(self.branched[name])
            self.modules.add(module)
            mixer.register_forward_pre_hook(self.carry, with_kwargs=True)

    def carry(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give a mixer its row where the model gives it none. Torch calls this before it.

        Args:
            module: The mixer.
            args, kwargs: Its arguments.

        Returns:
            Its arguments; ``None`` for a call that is not a row's.

        Raises:
            UnsupportedModelError: If it got other tokens than the row's.
        """
        row = kwargs.get(CALL, self.unsharing.now.row)
        if not isinstance(row, Row):
            return None
        row.check_mixer(module, (args, kwargs))
        if CALL not in kwargs:
            self.unsharing.now.check_recomputation(module)
        if (seen := row.plan.seen) is not None:
            # Unpatched mixers set the hidden states of padding to zero, in some releases not in calls of a single row.
            args = tuple(_blank(x, seen) for x in args)
            kwargs = {name: _blank(x, seen) if name == "hidden_states" else x for name, x in kwargs.items()}
            if "attention_mask" in kwargs:  # Mamba-2 sets its convolution's output to zero too
                kwargs["attention_mask"] = seen
        return args, kwargs | {CALL: row}


def _blank(x: Any, seen: Tensor) -> Any:
    """Set the hidden states (B, L, D) of tokens that nobody sees to zero."""
    hidden = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 and x.shape[:2] == seen.shape
    return x * seen.to(x.device)[..., None] if hidden else x


def own_class(mixer: nn.Module, named: Mapping[str, Any]) -> tuple[str, str]:
    """Find the class by which a record names a mixer: engines may have put a subclass in its place.

    Args:
        mixer: The mixer.
        named: By class name.

    Returns:
        The name of the class, and that of its modeling file; those of its own class if the record does not name it.
    """
    bases = [(base.__name__, base.__module__) for base in type(mixer).__mro__]
    return next((base for base in bases if base[0] in named), bases[0])


def choose(backbone: nn.Module, adapter: Adapter, way: str) -> dict[str, tuple[str, ...]]:
    """Choose the mixers that are branched; all others run on separate sequences.

    Args:
        backbone: The backbone.
        adapter: The record of its architecture.
        way: One of :data:`WAYS`.

    Returns:
        Class name -> the functions of its modeling file that it calls.

    Raises:
        UnsupportedModelError: If all mixers were to be branched, and one cannot be.
    """
    branched = {}
    for mixer in mixers_of(backbone, adapter.unshared) if way != "unshared" else ():
        name, module = own_class(mixer, adapter.unshared)
        kinds = adapter.branched.get(name, ())
        reason = obstacle(sys.modules[module], kinds) if kinds else "its record does not say how"
        if reason is None:
            branched[name] = kinds
        elif way == "branched":
            raise UnsupportedModelError(f'{name} cannot be branched: {reason}. Apply with mixers="auto"')
    return branched


def _functions_of(module: ModuleType, kind: str) -> list[str]:
    """List the names of a modeling file's functions of one kind."""
    return [name for name, (each, _) in HANDLERS.items() if each == kind and hasattr(module, name)]


def obstacle(module: ModuleType, kinds: tuple[str, ...]) -> str | None:
    """Find a reason why functions of a modeling file cannot be branched.

    Args:
        module: The modeling file.
        kinds: What its mixer calls.

    Returns:
        The reason, as the end of a sentence; ``None``: they can.
    """
    since = SINCE.get(kinds, SINCE_OTHERS)
    if Version(transformers.__version__) < Version(since):
        return f"its functions get no arguments of a call before transformers {since}"
    for kind in kinds:
        found = _functions_of(module, kind)
        if not found:
            return f"{module.__name__} has no function for its {kind}"
        if strange := [name for name in found if not _is_own(module, getattr(module, name))]:
            return f"another library replaced {strange[0]}"
    return None


def _is_own(module: ModuleType, function: Any) -> bool:
    """Tell whether a function is a modeling file's own, or ours."""
    if isinstance(function, Branching):
        return True
    kind = function if inspect.isfunction(function) else type(function)
    return kind.__module__ == module.__name__ or kind.__module__.split(".")[0] == "kernels"


class Branching:
    """A function of a modeling file that branches calls of rows.

    Args:
        original: The function.
        kind: What it is; ``None`` for one that is not counted.
        handler: What branches it.
    """

    def __init__(self, original: Callable[..., Any], kind: str | None, handler: Callable[..., Any]) -> None:
        self.original, self.kind, self.handler = original, kind, handler
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original, or branch it for a row."""
        call = kwargs.pop(CALL, None)
        if not isinstance(call, Row) or not call.kinds:
            return self.original(*args, **kwargs)
        if self.kind is not None:
            call.branched[self.kind] += 1
        return self.handler(call.plan.segments, self.original, *args, **kwargs)


_rows: "weakref.WeakSet[Row]" = weakref.WeakSet()
_modules: set[str] = set()


def wrap(modules: Iterable[str], row: Row) -> None:
    """Wrap the functions of modeling files for a row. Cheap where they are.

    Args:
        modules: Names of the modeling files.
        row: The row. Functions stay wrapped while it lives: layers may be recomputed in its backward.
    """
    _rows.add(row)
    for name in modules:
        module = sys.modules[name]
        _modules.add(name)
        for function, (kind, handler) in HANDLERS.items():
            original = getattr(module, function, None)
            if original is not None and not isinstance(original, Branching) and _is_own(module, original):
                setattr(module, function, Branching(original, kind, handler))


def unwrap() -> None:
    """Put the original functions back, unless a row that may still be recomputed needs the wrapped ones."""
    if _rows:
        return
    for name in _modules:
        for function in HANDLERS:
            wrapped = getattr(sys.modules[name], function, None)
            if isinstance(wrapped, Branching):
                setattr(sys.modules[name], function, wrapped.original)
    _modules.clear()


def modeling_files(model: nn.Module, adapter: Adapter) -> set[str]:
    """Find the modeling files of a model's mixers that no mask can cut.

    Args:
        model: The model.
        adapter: The record of its architecture.

    Returns:
        Their names, as Python imports them.
    """
    return {own_class(mixer, adapter.unshared)[1] for mixer in mixers_of(model, adapter.unshared)}


@contextmanager
def plain(files: Iterable[str]) -> Iterator[None]:
    """Run the functions of modeling files on torch's own operations, whichever kernels are installed.

    Kernels neither compute in float64 nor run on a CPU, and transformers calls them even so.

    Args:
        files: Names of the modeling files.
    """
    changed = []
    for module in map(sys.modules.get, files):
        for name, function in list(vars(module).items()):
            own = function.original if isinstance(function, Branching) else function
            if (by_torch := kept_by(own).get("torch_function")) is not None:
                changed.append((module, name, function))
                if isinstance(function, Branching):
                    by_torch = Branching(by_torch, function.kind, function.handler)
                setattr(module, name, by_torch)
    try:
        yield
    finally:
        for module, name, function in changed:
            setattr(module, name, function)
