"""Patch every causal language model that this process loads, and tell at its end what that saved.

``python -m flexpatch.launch`` has Python call :func:`install` in each process of a program. Nothing heavy is imported
before the program imports transformers.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from flexpatch.launch import options_of_environment


def install() -> None:
    """Let transformers load patched models in this process. Called when Python starts, before anything is imported."""
    when_imported("transformers.modeling_utils", _patch_loading)
    when_imported("transformers.trainer", _patch_training)


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Change a module as soon as it has been imported.

    Args:
        name: Dotted name of a module that is not imported yet.
        change: Takes the module.
    """
    if not _changes:
        sys.meta_path.insert(0, _Finder())
    _changes.setdefault(name, []).append(change)


_changes: dict[str, list[Callable[[Any], None]]] = {}


class _Finder:
    """Finds the modules that are to be changed where they are."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _changes else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for change in _changes[name]:
                change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch_loading(module: Any) -> None:
    """Let ``from_pretrained`` and ``from_config`` of all classes return patched models."""

    def patched(load: Callable[..., Any]) -> Any:
        @wraps(load)
        def loaded(cls: type, *args: Any, **kwargs: Any) -> Any:
            result = load(cls, *args, **kwargs)
            model = result[0] if isinstance(result, tuple) else result
            # Backbones (LlamaModel) are parts of other models, or make embeddings.
            if any(part in type(model).__name__ for part in ("For", "LMHead")):
                _patch(model, {"": model})
            return result

        return classmethod(loaded)

    kind = module.PreTrainedModel
    for name in ("from_pretrained", "_from_config"):
        setattr(kind, name, patched(vars(kind)[name].__func__))


def _patch_training(module: Any) -> None:
    """Let all trainers patch all of their models before they train."""
    train = module.Trainer.train

    @wraps(train)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        from flexpatch.trainers import models_of

        _patch(self, models_of(self))
        return train(self, *args, **kwargs)

    module.Trainer.train = patched


def _patch(whole: Any, models: Mapping[str, Any]) -> None:
    """Apply flexpatch to a model or a trainer. If it is refused, it runs as it is.

    Args:
        whole: The model itself, or the trainer that holds several.
        models: Its models by name, the one first for which it may be refused.
    """
    import flexpatch
    from flexpatch.errors import first_line

    try:
        flexpatch.apply(whole, **options_of_environment())
    except flexpatch.FlexpatchError as error:
        refused, *others = models
        _let_be(models[refused], first_line(error))
        for name in others:
            _patch(models[name], {name: models[name]})
        return
    for name, model in models.items():
        if flexpatch.is_applied(model):
            tell_at_exit(model, name)


def _let_be(model: Any, why: str) -> None:
    """Tell why a model runs as it is. It may have been patched when it was loaded, and given dropout since."""
    import flexpatch
    from flexpatch.forward import hook_of

    hook = hook_of(model)
    if hook is not None:
        _counted.pop(id(hook.folding.counts), None)
        flexpatch.remove(model)
    sentence = f"{type(model).__name__} runs as it is: {why}"
    if sentence not in _said:
        _said.add(sentence)
        _say(sentence)


# Counts of batches, by the list that holds them, with the model's name. Models themselves may be freed before the end.
_counted: dict[int, tuple[str, Any]] = {}
_said: set[str] = set()
_telling: set[int] = set()  # processes that tell at their end


def tell_at_exit(model: Any, name: str = "") -> None:
    """Print the savings of a patched model when this process ends.

    Args:
        model: A model after :func:`flexpatch.apply`.
        name: Tells it from others of its class.
    """
    from multiprocessing.util import Finalize  # runs in processes of multiprocessing too, as atexit does not

    from flexpatch.forward import hook_of
    from flexpatch.internals import pretrained

    hook = hook_of(model)
    assert hook is not None
    if os.getpid() not in _telling:
        _telling.add(os.getpid())
        _counted.clear()  # a process that was forked has those of another
        Finalize(None, _tell, exitpriority=0)
    kind = type(pretrained(model)).__name__
    _counted[id(hook.folding.counts)] = (f"{kind} ({name})" if name else kind, hook.folding.counts)


def _tell() -> None:
    from flexpatch.counts import Savings

    for name, counts in _counted.values():
        _say(f"{name}: {Savings.of(list(counts))}")


def _say(sentence: str) -> None:
    rank = f" rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"flexpatch{rank}: {sentence}", file=sys.stderr, flush=True)
