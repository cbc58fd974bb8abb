"""Plugin of ms-swift:

    swift rlhf ... --external_plugins $(python -m flexpatch.integrations.swift) --callbacks flexpatch

Options of ``flexpatch.apply`` are taken from the environment, as ``python -m flexpatch.launch`` writes them:
``FLEXPATCH_OPTIONS="--shared-dropout --backend dense"``.
"""

from typing import Any

from swift.callbacks import callbacks_map

from flexpatch.callbacks import Flexpatch
from flexpatch.launch import options_of_environment


class Callback(Flexpatch):
    """Applies flexpatch to all models of the trainer. When training ends it prints what that saved."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(**options_of_environment())


callbacks_map["flexpatch"] = Callback
