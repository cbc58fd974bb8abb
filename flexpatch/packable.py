"""Models, datasets and settings with which a packed trainer could not keep its word: refused when it is built."""

from collections.abc import Sized
from numbers import Integral
from typing import Any

from torch import nn

from flexpatch.errors import FlexpatchError
from flexpatch.patch import settings_of
from flexpatch.picture_bins import columns_of_images
from flexpatch.refusals import check_dropout

# Settings of a data loader that releases of transformers have, by their names without "dataloader_".
LOADER = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")


def check_budget(token_budget: Any) -> None:
    """Refuse a budget that is no number of tokens, before the trainer is built.

    Raises:
        FlexpatchError: Saying what is expected.
    """
    if not isinstance(token_budget, Integral) or isinstance(token_budget, bool) or token_budget < 1:
        raise FlexpatchError(f"token_budget={token_budget!r}; expected a number of tokens, such as 16384")


def check_folds(model: nn.Module, name: str, otherwise: str) -> None:
    """Refuse a model that would run batches as they are given.

    Args:
        model: Of a trainer.
        name: ``"model"`` or ``"ref_model"``.
        otherwise: What would happen, for the error.

    Raises:
        FlexpatchError: Saying how to make it fold.
        UnsupportedModelError: For dropout of a model that trains.
    """
    settings = settings_of(model)
    if settings is not None and settings["fold"]:
        if name == "model":  # the trainer may have given it an adapter since
            check_dropout(model, trains=True, shared_dropout=settings["shared_dropout"])
        return
    if settings is not None:
        raise FlexpatchError(f"{name} does not fold batches, because of flexpatch.apply(fold=False): {otherwise}")
    way = "pass flexpatch.apply(model)"
    if name == "ref_model":
        way = (
            "pass ref_model=flexpatch.apply(copy.deepcopy(model)), since one that the trainer makes comes too late, or "
            "train an adapter, without which the model is the reference"
        )
    raise FlexpatchError(f"{name} does not fold batches: {otherwise}. So {way}")


def check_packs(trainer: Any) -> None:
    """Refuse a dataset of which no bins can be made, and a setting that would start the training again for nothing.

    Args:
        trainer: A packed trainer, once TRL has prepared its dataset. ``takes_images`` tells whether it packs images.

    Raises:
        FlexpatchError: Saying what to do.
    """
    dataset, args = trainer.train_dataset, trainer.args
    if args.auto_find_batch_size:
        raise FlexpatchError(
            "auto_find_batch_size=True would start the training again and again with the same bins, which do not "
            "depend on per_device_train_batch_size: leave it out, and lower token_budget if memory runs out"
        )
    if not isinstance(dataset, Sized):
        raise FlexpatchError(
            "packing needs a dataset of known length; this one is streamed: load it without streaming=True, or train "
            "with TRL's trainer, flexpatch.apply(model) and a batch size"
        )
    if len(dataset) == 0:
        raise FlexpatchError(
            f"train_dataset has no rows to pack: perhaps max_length={args.max_length} leaves nothing of their answers. "
            "Raise it, or pass other rows"
        )
    if (shown := columns_of_images(dataset)) and not trainer.takes_images:
        raise FlexpatchError(
            f"{type(trainer).__name__} packs no rows with images, as TRL's takes none, and the dataset has a column "
            f"'{shown[0]}': remove it to train on text, or train with PackedDPOTrainer or PackedKTOTrainer"
        )


def check_groups(trainer: Any) -> None:
    """Refuse a trainer that generates, and whose micro-batches cannot hold whole groups.

    Args:
        trainer: After TRL has built it.

    Raises:
        FlexpatchError: Saying what to do.
    """
    check_folds(trainer.accelerator.unwrap_model(trainer.model), "model", "its groups would be computed unshared")
    if shown := columns_of_images(trainer.train_dataset):
        raise FlexpatchError(
            f"{type(trainer).__name__} cannot group rows with images by their prompts, and the dataset has a column "
            f"'{shown[0]}': use the stock trainer with flexpatch.apply(model), or remove the column to train on text"
        )
    rows, group = trainer.args.per_device_train_batch_size, trainer.num_generations
    if rows % group:
        raise FlexpatchError(
            f"per_device_train_batch_size={rows} is not a multiple of num_generations={group}, so micro-batches "
            "cannot hold whole groups"
        )
    parts, share = trainer.args.steps_per_generation, getattr(trainer.args, "top_entropy_quantile", 1.0)
    if parts > 1 and share < 1:
        raise FlexpatchError(
            f"top_entropy_quantile={share} trains the tokens of highest entropy of each micro-batch, and the {parts} "
            "micro-batches of a generation hold other completions here than the stock trainer's: set "
            "steps_per_generation=1, leave it at 1.0, or use the stock trainer"
        )


def loader_settings(args: Any) -> dict[str, Any]:
    """Return what a trainer's arguments say of data loaders, but for the sizes of batches.

    Args:
        args: TrainingArguments.

    Returns:
        Arguments of a DataLoader.
    """
    given = {name: f"dataloader_{name}" for name in LOADER}
    return {name: getattr(args, field) for name, field in given.items() if hasattr(args, field)}
