"""What folding saves, among a trainer's metrics."""

from typing import Any

from transformers import TrainerCallback

from flexpatch.patch import savings


class SavingsCallback(TrainerCallback):
    """Adds to each log entry what folding saved over the ``last`` batches, reference passes included.

    ``flexpatch/token_factor``: how many times fewer tokens were computed than the padded batches hold;
    ``flexpatch/padding`` and ``flexpatch/shared``: shares of those tokens left out as padding and as shared prefixes.

    Pass it as ``callbacks=[SavingsCallback()]``. Reporters (TensorBoard, W&B, ...) are called before such callbacks; to
    reach them too: ``trainer.callback_handler.callbacks.insert(0, SavingsCallback())``.
    """

    def __init__(self, last: int = 100) -> None:
        self.last = last

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        savings(model)  # raises for a model that does not fold, before hours of training

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, model: Any = None, **_: Any
    ) -> None:
        if logs is None or not state.log_history:
            return
        saved = savings(model, self.last)
        entry = {
            "flexpatch/token_factor": saved.factor,
            "flexpatch/padding": saved.padding / max(saved.padded, 1),
            "flexpatch/shared": saved.shared / max(saved.padded, 1),
        }
        logs |= entry
        state.log_history[-1] |= entry
