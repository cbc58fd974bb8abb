"""Lengths of pairs with images, for bins: what the trainer's own collator makes of a pair, and its tower's work."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flexpatch.costs import Cost, sizes_of
from flexpatch.errors import FlexpatchError, first_line
from flexpatch.image_costs import Tower, tower_of
from flexpatch.layouts import media_of
from flexpatch.processing import COLUMNS


def columns_of_images(dataset: Any) -> list[str]:
    """Return the columns of a dataset that hold images."""
    return [name for name in COLUMNS if name in (getattr(dataset, "column_names", None) or ())]


def pictured_lengths(dataset: Any, collate: Callable[[list[Any]], Any], config: Any, workers: int) -> list[int]:
    """Count the tokens of each pair with images in a shared row, and its tower's work as tokens.

    The work of a pair's images is that of as many tokens as pass the text model's layers with equally many FLOPs,
    forward and without attention, rounded up. An image that several pairs of a bin share is counted for each.

    Args:
        dataset: Dataset of rows with images. All are read, and processed once.
        collate: Makes a batch of a list of rows: first the prompt with the chosen answer, then with the rejected one.
        config: Configuration of the model.
        workers: Processes that read images.

    Returns:
        Tokens of each pair, its prompt counted once, and the work of its images.

    Raises:
        FlexpatchError: If batches with images of this model do not fold, a size is missing in its configuration, or a
            row cannot be collated. The message names the row.
    """
    tower = tower_of(config) if media_of(config) is not None else None
    if tower is None:
        raise FlexpatchError(
            f"batches of {config.model_type} with images do not fold, and a packed one would be a padded batch many "
            "times as large: use the stock trainer"
        )
    per_token = sizes_of(config, config.model_type).flops(Cost(1, 0, 0))
    measure = partial(_measured, dataset, collate, tower, per_token)
    rows: Any = range(len(dataset))
    loader: DataLoader[int] = DataLoader(rows, batch_size=1, collate_fn=measure, num_workers=workers)
    return list(tqdm(loader, "lengths", disable=None))


def _measured(dataset: Any, collate: Callable[[list[Any]], Any], tower: Tower, per_token: int, rows: list[int]) -> int:
    """Measure one row."""
    (row,) = rows
    try:
        batch = collate([dataset[row]])
    except Exception as error:  # processors and chat templates raise all kinds of errors
        raise FlexpatchError(
            f"sample {row}: the processor failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    if len(batch["input_ids"]) != 2 or "completion_mask" not in batch:
        raise FlexpatchError(
            f"sample {row}: the data collator made {len(batch['input_ids'])} sequences with {', '.join(batch)}; "
            "expected the chosen and the rejected one, and completion_mask"
        )
    given = batch["attention_mask"].bool()
    prompt = (given & ~batch["completion_mask"].bool())[0].sum()
    work = _work(batch, tower, int(batch["input_ids"].shape[1]))
    return int(given.sum() - prompt) + -(-work // (2 * per_token))  # both sequences have the images


def _work(batch: Any, tower: Tower, tokens: int) -> int:
    """Return the FLOPs of the tower for all images of a batch, of which at most ``tokens`` tokens of each come out."""
    pixels: torch.Tensor | None = batch.get("pixel_values")
    if pixels is None:
        return 0
    patches, tile = tower.patches(pixels)
    grids = batch.get("image_grid_thw")
    if grids is None:
        return tower.flops(patches, tile, 2 * tokens)
    return sum(tower.flops(t * h * w, h * w, 0) for t, h, w in grids.tolist()) + tower.flops(0, 0, 2 * tokens)
