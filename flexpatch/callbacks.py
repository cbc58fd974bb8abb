"""Savings of folding among a trainer's metrics, and :func:`flexpatch.apply` for programs that take callbacks."""

import gc
from typing import Any

from transformers import Trainer, TrainerCallback

from flexpatch.errors import FlexpatchError
from flexpatch.patch import apply, is_applied, savings
from flexpatch.refusals import check_dropout
from flexpatch.trainers import models_of


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


class Flexpatch(SavingsCallback):
    """Apply flexpatch to all models of the trainer that gets this callback, and tell what that saved.

    For programs that build their trainer themselves and take callbacks: ``callbacks=[Flexpatch()]`` is
    ``flexpatch.apply(trainer)``. The policy is patched when the trainer is built, before an engine wraps it. All other
    models (reference, teacher, value model) are patched when training begins. Log entries get the values of
    :class:`SavingsCallback`, for reporters too. When training ends, the first process prints the savings of each
    model, with the reasons of batches that ran as they were given.

    Reference log-probs that a trainer computes while it is being built, of a separate reference, run unfolded.

    Args:
        last: Number of latest batches that logged values are taken over.
        options: Options of :func:`flexpatch.apply`.

    Raises:
        UnsupportedModelError: When the trainer is built or training begins, for a policy that would not be exact.
    """

    def __init__(self, last: int = 100, **options: Any) -> None:
        super().__init__(last)
        self.options = options
        self.models: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_dropout(model, trains=True, shared_dropout=self.options.get("shared_dropout", False))
        apply(model, **self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trainer = _trainer_with(self)
        apply(trainer, **self.options)
        self.models = {name: each for name, each in models_of(trainer).items() if is_applied(each)}
        # Reporters run in the order of this list, and report what the entry holds by then.
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, model: Any = None, **_: Any
    ) -> None:
        if self.options.get("fold", True):
            super().on_log(args, state, control, logs, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and self.options.get("fold", True):
            for name, each in self.models.items():
                print(f"flexpatch: {name}: {savings(each)}", flush=True)
        self.models = {}


def _trainer_with(callback: TrainerCallback) -> Trainer:
    """Find the trainer that a callback was given to. Callbacks are told of its policy alone."""
    for thing in gc.get_objects():
        # Asks the type, since ``isinstance`` runs code of objects that stand for others.
        if issubclass(type(thing), Trainer):
            handler = vars(thing).get("callback_handler")
            if handler is not None and any(each is callback for each in handler.callbacks):
                return thing
    raise FlexpatchError("no trainer of transformers holds this callback: call flexpatch.apply(trainer) instead")
