"""Plugin of axolotl. In its YAML file:

plugins: [flexpatch.integrations.axolotl.Plugin]
flexpatch_backend: auto         # optional, as the three below: the options of flexpatch.apply
flexpatch_compile: false
flexpatch_recompute_layers: auto
flexpatch_shared_dropout: true
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import flexpatch
from flexpatch.callbacks import Flexpatch

PREFIX = "flexpatch_"


class Arguments(BaseModel):
    """Names in the YAML file, with the prefix ``flexpatch_``, for the options of :func:`flexpatch.apply`."""

    flexpatch_backend: str | None = None
    flexpatch_compile: bool | None = None
    flexpatch_recompute_layers: int | str | None = None
    flexpatch_shared_dropout: bool | None = None


class Plugin(BasePlugin):
    """Applies flexpatch to all models of the trainer. When training ends it prints what that saved."""

    def get_input_args(self) -> str:
        """Name the class that checks the options."""
        return f"{__name__}.{Arguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Apply before training begins, so that a model is refused at once. The callback applies again then."""
        given = {name: cfg.get(name) for name in Arguments.model_fields}
        options = {name.removeprefix(PREFIX): value for name, value in given.items() if value is not None}
        flexpatch.apply(trainer, **options)
        trainer.add_callback(Flexpatch(**options))
