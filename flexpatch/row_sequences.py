"""Two-way blocks and rope positions of rows, found on their separate sequences.

Shapes: B rows, L tokens a row, N sequences of a batch, S columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flexpatch.blocks import stops_of
from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.images import rope_positions
from flexpatch.internals import text_config
from flexpatch.layouts import Media
from flexpatch.registry import adapter_for


def _mask(index: np.ndarray) -> np.ndarray:
    """Return (N, S) bool, False where a batch of :func:`in_batches` repeats a sequence's last token."""
    mask = np.ones(index.shape, bool)
    mask[:, 1:] = index[:, 1:] != index[:, :-1]
    return mask


def blocks_of(
    record: Media, inner: Any, batches: Sequence[np.ndarray], types: np.ndarray, shape: Sequence[int]
) -> np.ndarray | None:
    """Find where the two-way block of each token ends.

    Args:
        record: Of the multimodal class.
        inner: The model.
        batches: Indices (N, S) of the rows' separate sequences, from :func:`flexpatch.plan.in_batches`.
        types: (B * L,) kinds of tokens.
        shape: B, L.

    Returns:
        (B, L) int32, as ``Rows.last``; ``None`` without blocks.

    Raises:
        FlexpatchError: For blocks that sequences share in part.
        UnsupportedModelError: For blocks that are longer than a window.
    """
    if record.blocks is None:
        return None
    last = np.arange(types.size)
    seen = []
    for index in batches:
        mask = _mask(index)
        blocks = np.where(mask, record.blocks(inner.config, types[index]), -1)
        columns, split = stops_of(blocks)
        if split:
            raise FlexpatchError(_BROKEN)
        inside = columns >= 0
        stops = np.where(inside, np.take_along_axis(index, np.maximum(columns, 0), 1), index)
        if (stops - index != columns - np.arange(index.shape[1]))[inside].any():
            raise FlexpatchError(_BROKEN)
        last[index[mask]] = stops[mask]
        seen.append((index[mask], stops[mask]))
    if any((last[tokens] != stops).any() for tokens, stops in seen):
        raise FlexpatchError(_BROKEN)
    if (last == np.arange(last.size)).all():
        return None
    last = last.reshape(shape) - np.arange(shape[0])[:, None] * shape[1]
    if record.beyond_windows:
        _check_windows(inner, int((last - np.arange(shape[1])).max()) + 1)
    return last.astype(np.int32)


_BROKEN = (
    "a two-way block of this model (an image, or a prompt) begins in a run that several trees continue, or other "
    "tokens interrupt it: put all of it into one Tree"
)


def _check_windows(inner: Any, longest: int) -> None:
    windows = adapter_for(inner.config).windows(text_config(inner)).values()
    window = min(filter(None, windows), default=None)
    if window is not None and longest > window:
        raise UnsupportedModelError(
            f"rows with two-way blocks of {longest} tokens, longer than a window of {window}, in which this model's "
            "see all of themselves: use smaller images"
        )


def axes_of(
    backbone: Any,
    record: Media,
    batches: Sequence[np.ndarray],
    ids: np.ndarray,
    types: np.ndarray,
    sizes_in: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
) -> np.ndarray | None:
    """Let the model's own method compute rope positions of all sequences.

    Args:
        backbone: The backbone.
        record: Of the multimodal class.
        batches: As in :func:`blocks_of`.
        ids, types: (B * L,) of the rows.
        sizes_in: A batch of ``batches`` and its mask -> sizes of its images, as a call holds them.

    Returns:
        (axes, B * L) int64; ``None`` where the model counts columns.

    Raises:
        FlexpatchError: If sequences give a token that they share different positions.
    """
    each: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
    for index in batches:
        mask, positions = _mask(index), None
        if sizes := sizes_in(index, mask):
            positions, _ = rope_positions(backbone, {}, ids[index], mask, types[index], sizes, record)
        each.append((index, mask, None if positions is None else positions.numpy()))
    axes = next((len(positions) for *_, positions in each if positions is not None), None)
    if axes is None:
        return None
    known = np.zeros((axes, ids.size), np.int64)
    spread = []
    for index, mask, given in each:
        own = np.broadcast_to(np.arange(index.shape[1]), (axes, *index.shape)) if given is None else given
        known[:, index[mask]] = own[:, mask]
        spread.append((index[mask], own[:, mask]))
    if any((known[:, tokens] != own).any() for tokens, own in spread):
        raise FlexpatchError("sequences give the tokens that they share different rope positions; run them separately")
    return known
