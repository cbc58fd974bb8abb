"""Put the rows of a generation in order: completions of one prompt into one micro-batch."""

from typing import Any

import torch

from flexpatch.errors import FlexpatchError


def gather_groups(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Redistribute the rows of micro-batches, so that rows of one prompt are neighbours.

    Args:
        batches: Micro-batches of N rows each: tensors and lists of N values, numbers that all share, and ``None``.

    Returns:
        As many micro-batches of as many rows. Prompts are in order of their first rows.

    Raises:
        FlexpatchError: For batches with images.
    """
    if any(batches[0].get(name) is not None for name in ("pixel_values", "num_images")):
        raise FlexpatchError("batches with images cannot be grouped by their prompts: use the stock trainer")
    prompts = torch.cat([torch.cat([batch["prompt_ids"], batch["prompt_mask"]], 1) for batch in batches])
    size, device = len(batches[0]["prompt_ids"]), prompts.device
    group = torch.unique(prompts, dim=0, return_inverse=True)[1]
    rows = torch.arange(len(group), device=device)
    firsts = torch.full_like(rows, len(group)).scatter_reduce_(0, group, rows, "amin")
    order = firsts[group].argsort(stable=True)

    def ordered(values: list[Any]) -> list[Any]:
        if values[0] is None or (isinstance(values[0], torch.Tensor) and values[0].ndim == 0):
            return values
        if isinstance(values[0], torch.Tensor):
            return list(torch.cat(values)[order].split(size))
        each = [value for some in values for value in some]
        return [[each[row] for row in some] for some in order.view(-1, size).tolist()]

    columns = {name: ordered([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(batches))]
