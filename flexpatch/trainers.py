"""Find the models that a trainer holds: its policy, and perhaps references, teachers, value and reward models."""

import warnings
from typing import Any

from torch import nn

from flexpatch.errors import FlexpatchWarning
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


def warn_of_another(trainer: Any) -> None:
    """Warn of a trainer that will train another model than it holds, and not a patched one.

    Args:
        trainer: A trainer whose model was not patched yet.
    """
    if getattr(trainer, "model_init", None) is not None and not trainer.is_in_train:
        warnings.warn(
            "flexpatch: train() of this trainer makes another model by model_init, which runs as it is: let model_init "
            "return flexpatch.apply(model), or pass the trainer callbacks=[flexpatch.callbacks.Flexpatch()]",
            FlexpatchWarning,
            4,
        )
