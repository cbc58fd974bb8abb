"""Find the models that a trainer holds: its policy, and perhaps references, teachers, value and reward models."""

from typing import Any

from torch import nn

from flexpatch.internals import find_pretrained


def is_trainer(thing: Any) -> bool:
    """Tell whether ``thing`` holds a model and trains it."""
    return not isinstance(thing, nn.Module) and isinstance(getattr(thing, "model", None), nn.Module)


def models_of(trainer: Any) -> dict[str, nn.Module]:
    """Find all transformers models among a trainer's attributes, and in lists that are attributes.

    Args:
        trainer: A trainer after it was built.

    Returns:
        Models by the names of attributes, each once, ``model`` first.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, value in {"model": trainer.model, **vars(trainer)}.items():
        several = list(value) if isinstance(value, list | tuple | nn.ModuleList) else [value]
        for i, model in enumerate(several):
            inner = find_pretrained(model)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                found[name if len(several) == 1 else f"{name}[{i}]"] = model
    return found
