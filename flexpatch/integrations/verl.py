"""Module for verl's FSDP workers:

    actor_rollout_ref.model.external_lib=flexpatch.integrations.verl
    critic.model.external_lib=flexpatch.integrations.verl

verl imports it in each worker. Actor, reference and critic are patched as they are built, before FSDP wraps them. Both
values of ``use_remove_padding`` fold. Options of ``flexpatch.apply`` are taken from the environment, as
``python -m flexpatch.launch`` writes them: ``FLEXPATCH_OPTIONS="--backend dense"``.
"""

from functools import wraps
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

import flexpatch
from flexpatch.autopatch import tell_at_exit
from flexpatch.launch import options_of_environment

# Names the attribute by which a method that was wrapped here is known: workers of one process import this once more.
OWN = "flexpatch_wrapped"


def wrapped(build: Any) -> Any:
    """Let a method that builds a model apply flexpatch to it.

    Args:
        build: ``FSDPEngine._build_module``.

    Returns:
        A method of the same arguments; ``build`` itself where it was wrapped before.
    """
    if hasattr(build, OWN):
        return build

    @wraps(build)
    def build_module(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = flexpatch.apply(build(self, *args, **kwargs), **options_of_environment())
        tell_at_exit(model)
        return model

    setattr(build_module, OWN, True)
    return build_module


FSDPEngine._build_module = wrapped(FSDPEngine._build_module)
