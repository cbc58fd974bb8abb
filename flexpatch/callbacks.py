"""Savings of folding among a trainer's metrics."""

from typing import Any

from transformers import TrainerCallback

from flexpatch.patch import savings


class SavingsCallback(TrainerCallback):
    """Add the savings of folding to each log entry, reference passes included.

    - ``flexpatch/token_factor``: tokens of the padded batches, divided by the tokens that were computed;
    - ``flexpatch/padding``: fraction of the padded batches' tokens that was left out as padding;
    - ``flexpatch/shared``: fraction of the padded batches' tokens that was left out as shared prefixes.

    Pass the callback as ``callbacks=[SavingsCallback()]``. Reporters (TensorBoard, W&B, ...) run before callbacks that
    are passed so, and miss the values. To log them there too, insert the callback first:
    ``trainer.callback_handler.callbacks.insert(0, SavingsCallback())``.

    Args:
        last: Number of latest batches that the values are taken over.
    """

    def __init__(self, last: int = 100) -> None:
        self.last = last

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        savings(model)  # an error now, before hours of training, if the model does not fold

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
