"""Calls that hold the images of trees: of separate sequences for unpatched models, and the tensors of rows.

Shapes: N sequences, S columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flexpatch.errors import FlexpatchError
from flexpatch.illustrated import Illustrated
from flexpatch.layouts import Media, media_of
from flexpatch.tree import Layout


def scored_of(tree: Layout) -> np.ndarray:
    """Return the indices of a laid-out tree's scored tokens, answer by answer."""
    each = zip(tree.answers, tree.answer_lengths, strict=True)
    return np.concatenate([np.empty(0, np.int64), *(path[len(path) - length :] for path, length in each)])


def types_of(record: Media, config: Any, ids: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
    """Tell the kinds of tokens, as processors do.

    Args:
        record, config: Of the multimodal class.
        ids: Token ids.
        scored: Indices of answers' tokens.

    Returns:
        int64 like ``ids``: 1 for placeholders of images, 2 of videos; where types tell prompts from answers, 1 for
        answers.
    """
    types = np.zeros(ids.shape, np.int64)
    if record.text_blocks:
        types[[] if scored is None else scored] = 1
        return types
    for kind, layout in enumerate(record.layouts(), 1):
        types[(ids == getattr(config, layout.token, -1)) & (types == 0)] = kind
    return types


def tensors_of(record: Media, images: Sequence[Illustrated], dtype: torch.dtype) -> dict[str, Tensor]:
    """Join the tensors of runs with images.

    Args:
        record: Of the multimodal class.
        images: The runs, in order.
        dtype: Of pixels.

    Returns:
        Arguments of the model.

    Raises:
        FlexpatchError: For tensors that cannot be joined. The message names the run.
    """
    joined: dict[str, Tensor] = {}
    for layout in record.layouts():
        held = [(each, layout.entries(each.tensors)) for each in images]
        held = [(each, entries) for each, entries in held if entries]
        if not held:
            continue
        names = held[0][1].keys()
        for each, entries in held:
            if entries.keys() != names:
                raise FlexpatchError(f"{each.name} has {sorted(entries)}, and {held[0][0].name} has {sorted(names)}")
        joined |= layout.join({name: _joined(name, [(x, entries[name]) for x, entries in held]) for name in names})
    late = record.rounds_late
    arguments = {name: x.to(dtype) if x.is_floating_point() and not late else x for name, x in joined.items()}
    pixels = record.layouts()[-1].names[0]
    for name in record.passed:
        shown = [each for each in images if pixels in each.tensors]
        lacking = [each for each in shown if name not in each.tensors]
        having = [each for each in shown if name in each.tensors]
        if having and lacking:
            raise FlexpatchError(f"{having[0].name} has {name}, and {lacking[0].name} has none")
        if having:
            arguments[name] = torch.cat([each.tensors[name] for each in having])
    return arguments


def _joined(name: str, held: Sequence[tuple[Illustrated, Tensor]]) -> Tensor:
    """Join entries, and fill pixels and their masks up to one size, as processors fill those of a batch."""
    sides = [tensor.shape[1:] for _, tensor in held]
    most = [max(lengths) for lengths in zip(*sides, strict=False)]
    for each, tensor in held:
        fills = tensor.is_floating_point() or "mask" in name
        if len(tensor.shape) - 1 != len(most) or (list(tensor.shape[1:]) != most and not fills):
            raise FlexpatchError(f"{each.name}: {name} has shape {tuple(tensor.shape)}, which other images do not have")
    filled = []
    for _, tensor in held:
        room = [side - have for side, have in zip(most, tensor.shape[1:], strict=True)]
        filled.append(F.pad(tensor, [x for side in room[::-1] for x in (0, side)]) if any(room) else tensor)
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def sequence_arguments(
    config: Any, sequences: Sequence[tuple[Layout, np.ndarray]], ids: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Make what an unpatched model is shown of a batch of separate sequences beside their text.

    Args:
        config: Of the model.
        sequences: The laid-out tree of each, and its tokens there.
        ids: (N, S) int64 of the batch, padded on the right.
        dtype: Of pixels.

    Returns:
        Arguments of the model, none for one without images.

    Raises:
        FlexpatchError: For images of a model that takes none.
    """
    record = media_of(config)
    each_images = [
        [replace(each, tensors=each.given) for each in tree.images if each.start in path] for tree, path in sequences
    ]
    images = [image for each in each_images for image in each]
    if record is None and images:
        raise FlexpatchError(f"{images[0].name} has images, and a model of type '{config.model_type}' takes none")
    if record is None or not (images or record.text_blocks):
        return {}
    S = ids.shape[1]
    answers = [n * S + np.flatnonzero(np.isin(path, scored_of(tree))) for n, (tree, path) in enumerate(sequences)]
    types = types_of(record, config, ids.numpy(force=True).ravel(), np.concatenate(answers)).reshape(ids.shape)
    tensors = {name: tensor.to(ids.device) for name, tensor in tensors_of(record, images, dtype).items()}
    return tensors if record.types is None else tensors | {record.types: torch.from_numpy(types).to(ids.device)}
