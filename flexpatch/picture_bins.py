"""Lengths of rows with images, for bins: what the trainer's own collator makes of a row, and its tower's work."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flexpatch.costs import Cost, sizes_of
from flexpatch.errors import FlexpatchError, first_line
from flexpatch.image_costs import Tower, tower_of
from flexpatch.layouts import media_of
from flexpatch.processing import COLUMNS, TEXT


def columns_of_images(dataset: Any) -> list[str]:
    """Return the columns of a dataset that hold images."""
    return [name for name in COLUMNS if name in (getattr(dataset, "column_names", None) or ())]


class Pictured(NamedTuple):
    """Lengths of a dataset row with images, as tokens.

    Attributes:
        prompt: Digest of the prompt's ids and images. Equal prompts have equal ones.
        shared: Tokens of the prompt, and the work of its images: that of as many tokens as pass the text model's layers
            with equally many FLOPs, forward and without attention, rounded up.
        answers: Tokens of all its answers.
        images: Whether it has any.
    """

    prompt: bytes
    shared: int
    answers: int
    images: bool


def pictured_rows(
    dataset: Any, collate: Callable[[list[Any]], Any], config: Any, workers: int, sequences: int = 2
) -> list[Pictured]:
    """Measure each row of a dataset with images, its prompt counted once.

    An image that several rows of a bin share is counted for each, unless their prompts are one.

    Args:
        dataset: Dataset of rows with images. All are read, and processed once.
        collate: Makes a batch of a list of rows: for two ``sequences`` first the prompt with the chosen answer, then
            with the rejected one.
        config: Configuration of the model.
        workers: Processes that read images.
        sequences: Sequences that ``collate`` makes of a row.

    Returns:
        The lengths of each row.

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
    measure = partial(_measured, dataset, collate, tower, per_token, sequences)
    rows: Any = range(len(dataset))
    loader: DataLoader[int] = DataLoader(rows, batch_size=1, collate_fn=measure, num_workers=workers)
    return list(tqdm(loader, "lengths", disable=None))


def shards(accelerator: Any, fsdp: bool) -> bool:
    """Tell whether ranks hold parts of a model.

    Args:
        accelerator: The trainer's.
        fsdp: Whether it has FSDP.

    Returns:
        Whether they do.

    Raises:
        FlexpatchError: Under ZeRO-3, where transformers shards every model that is made: a tower cannot be measured.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise FlexpatchError(
            "packed batches with images cannot be measured under DeepSpeed's ZeRO-3: use FSDP2 or DDP, or the stock "
            "trainer with flexpatch.apply(model)"
        )
    return accelerator.num_processes > 1 and (fsdp or plugin is not None)


def check_images(rows: Sequence[Pictured], sharded: bool) -> None:
    """Refuse a dataset of which some micro-batches may have no images, where ranks gather a tower's weights together.

    Args:
        rows: Lengths of all rows.
        sharded: Whether ranks hold parts of the model.

    Raises:
        FlexpatchError: If some rows have images, some have none, and ``sharded``.
    """
    without = next((i for i, row in enumerate(rows) if not row.images), None)
    if sharded and without is not None and any(row.images for row in rows):
        raise FlexpatchError(
            f"sample {without} has no image, and others have: under FSDP and DeepSpeed a rank whose micro-batch has "
            "none would leave the others waiting in the vision tower. Train with DDP, or give every row an image"
        )


def _measured(
    dataset: Any, collate: Callable[[list[Any]], Any], tower: Tower, per_token: int, sequences: int, rows: list[int]
) -> Pictured:
    """Measure one row."""
    (row,) = rows
    try:
        batch = collate([dataset[row]])
    except Exception as error:  # processors and chat templates raise all kinds of errors
        raise FlexpatchError(
            f"sample {row}: the processor failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    if len(batch["input_ids"]) != sequences or "completion_mask" not in batch:
        expected = "the chosen and the rejected one" if sequences == 2 else "one"
        raise FlexpatchError(
            f"sample {row}: the data collator made {len(batch['input_ids'])} sequences with {', '.join(batch)}; "
            f"expected {expected}, and completion_mask"
        )
    given = batch["attention_mask"].bool()
    prompt = (given & ~batch["completion_mask"].bool())[0]
    tokens, images = int(prompt.sum()), _images(batch)
    digest = hashlib.sha256(batch["input_ids"][0][prompt].numpy().tobytes())
    for name, tensor in sorted(images.items()):
        numbers = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + numbers)
    work = _work(batch, tower, sequences * int(batch["input_ids"].shape[1]))
    # All sequences have the images.
    shared = tokens + -(-work // (sequences * per_token))
    return Pictured(digest.digest(), shared, int(given.sum()) - sequences * tokens, bool(work))


def _images(batch: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch's images."""
    text = (*TEXT, "completion_mask", "label")
    tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
    return {name: x for name, x in tensors.items() if name not in text and not name.startswith("KL_")}


def _work(batch: Any, tower: Tower, tokens: int) -> int:
    """Return the FLOPs of the tower for all images of a batch, of which at most ``tokens`` tokens come out."""
    pixels: torch.Tensor | None = batch.get("pixel_values")
    if pixels is None:
        return 0
    patches, tile = tower.patches(pixels)
    grids = batch.get("image_grid_thw")
    if grids is None:
        return tower.flops(patches, tile, tokens)
    return sum(tower.flops(t * h * w, h * w, 0) for t, h, w in grids.tolist()) + tower.flops(0, 0, tokens)
