"""Tell when two image tokens are equal, and find the images of a row's placeholders.

An image token's key is its image. An image is shared whole or not at all, and so is a two-way block: the key of its
first token names all of it.

Shapes: N sequences, S columns, L tokens of the row, K images (or videos).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flexpatch.blocks import firsts_of, stops_of
from flexpatch.fold import Folded, predicting_padding
from flexpatch.images import Held, identities, rope_positions, select
from flexpatch.layouts import TYPES, Media, Unit, media_of, placeholders_of

# Keys from here on are no token ids.
KEYS = 1 << 31
UNMATCHED = "whose images do not match their placeholders"


@dataclass(frozen=True)
class Images:
    """The images of a batch, on the host.

    Attributes:
        units: All of them, kind by kind.
        kinds: (K,) int64, which of a record's layouts each has.
        unit_of: (N, S) int64, the image that each token is a placeholder of, -1 for others.
        keys: (N, S) int64, by which tokens are merged.
        originals: The token id of each key from ``KEYS`` on.
        last: (N, S) int64, column of the last token of each token's two-way block, -1 outside; ``None``: no blocks.
        types: (N, S) int64 kinds of tokens; ``None``: not given.
        sizes: Sizes of each layout, for rope positions.
        beyond: Tokens of the longest two-way block that a window must not cut; 0: there is none.
        reason: Why the batch has to run as it was given.
    """

    units: Sequence[Unit]
    kinds: np.ndarray
    unit_of: np.ndarray
    keys: np.ndarray
    originals: np.ndarray
    last: np.ndarray | None
    types: np.ndarray | None
    sizes: Mapping[str, np.ndarray]
    beyond: int = 0
    reason: str | None = None

    def key(self) -> Any:
        """Return what tells these images from others, beside the batch's tokens."""
        units = [(kind, *unit) for kind, unit in zip(self.kinds, self.units, strict=True)]
        return self.reason, self.keys.tobytes(), units


def images_in(config: Any, held: Sequence[Held], numbers: Iterator[np.ndarray], batch: Any) -> Images | None:
    """Find the images of a batch.

    Args:
        config: The configuration of the backbone.
        held, numbers: As :func:`images_of` takes them.
        batch: A :class:`flexpatch.calls.Batch`.

    Returns:
        ``None`` for a batch without images, and without two-way blocks.
    """
    record = media_of(config)
    if record is None:
        return None
    types = batch.types[TYPES.index(record.types)] if record.types is not None else None
    if not held and not (record.text_blocks and types is not None):
        return None
    return images_of(record, config, held, numbers, batch.ids, batch.mask, types)


def placeholders_out(config: Any, ids: np.ndarray) -> np.ndarray:
    """Put 0 in place of placeholders, whose ids may lie outside the vocabulary.

    Args:
        config: The configuration of the backbone.
        ids: (N, S) int64.

    Returns:
        (N, S) int64.
    """
    tokens = placeholders_of(config)
    return np.where(np.isin(ids, tokens), 0, ids) if tokens else ids


def images_of(
    record: Media,
    config: Any,
    held: Sequence[Held],
    numbers: Iterator[np.ndarray],
    ids: np.ndarray,
    mask: np.ndarray | None,
    types: np.ndarray | None,
) -> Images:
    """Find which image each placeholder of a batch stands for, and the key of every token.

    Args:
        record: Of the multimodal class.
        config: Its configuration.
        held: The call's images.
        numbers: On the host, what :meth:`Held.numbers` of each made.
        ids, mask, types: (N, S) of the batch; ``None``: no padding, no types.

    Returns:
        The images; with a reason if they cannot be told apart.
    """
    keys, unit_of = ids.copy(), np.full(ids.shape, -1)
    seen = np.ones(ids.shape, bool) if mask is None else mask
    units: list[Unit] = []
    kinds: list[int] = []
    names = _Names()
    sizes: dict[str, np.ndarray] = {}
    reason = None
    for kind, each in enumerate(held):
        prints, own_sizes, skipped, finite = each.read(numbers)
        sizes |= own_sizes
        if not finite:
            reason = "with pixels that are NaN or infinite, which would spread to other sequences of a row,"
        placeholders = ids == getattr(config, each.layout.token)
        counts = {name: len(tensor) for name, tensor in each.entries.items()}
        own = each.layout.units(config, counts, own_sizes, skipped, int(placeholders.sum()))
        tokens = np.array([unit.tokens for unit in own or ()], np.int64)
        if not own or tokens.sum() != placeholders.sum() or not tokens.all() or (placeholders & ~seen).any():
            reason = reason or UNMATCHED
            continue
        rows, columns = np.nonzero(placeholders)
        stops = np.cumsum(tokens)
        starts = stops - tokens
        if (rows[starts] != rows[stops - 1]).any():
            reason = reason or UNMATCHED
            continue
        numbered = identities(each, own, prints)
        unit_of[placeholders] = np.repeat(len(units) + np.arange(len(own)), tokens)
        own_names = [
            names.of(("image", kind, int(k)), ids[rows[s], columns[s]]) for k, s in zip(numbered, starts, strict=True)
        ]
        keys[placeholders] = np.repeat(np.array(own_names, np.int64), tokens)
        for start, stop in zip(starts, stops, strict=True):
            row, first = rows[start], columns[start]
            whole = ("whole", keys[row, first : columns[stop - 1] + 1].tobytes())
            keys[row, first] = names.of(whole, ids[row, first])
        units += own
        kinds += [kind] * len(own)
    last = None
    if record.blocks is not None and types is not None:
        stops, split = stops_of(np.where(seen, record.blocks(config, types), -1))
        if split and reason is None:
            reason = "with two-way blocks that padding or other tokens interrupt"
        for row, first in zip(*firsts_of(stops), strict=True):  # the first token of a block names all of it
            last, block = stops, keys[row, first : stops[row, first] + 1]
            keys[row, first] = names.of(("block", block.tobytes()), ids[row, first])
    originals = np.array(names.originals, np.int64)
    beyond = 0
    if last is not None and record.beyond_windows:
        beyond = int((last - np.arange(ids.shape[1])).max()) + 1
    return Images(units, np.array(kinds, np.int64), unit_of, keys, originals, last, types, sizes, beyond, reason)


class _Names:
    """Numbers whatever a token's key has to tell, and keeps the token's id."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.originals: list[int] = []

    def of(self, what: Any, token: Any) -> int:
        """Return the key of a token that is ``what``."""
        what = what, int(token)
        if what not in self._numbers:
            self._numbers[what] = KEYS + len(self.originals)
            self.originals.append(int(token))
        return self._numbers[what]


@dataclass(frozen=True)
class RowImages:
    """The images of a folded batch's row.

    Attributes:
        picked: Images in the order of the row's placeholders: indices into those of the batch.
        where: (L,) int64, a position of the batch, of all N * S, that each of the row's tokens stands for.
        read: (R,) int64, positions of the batch whose output may be read.
        token_of: (R,) int64, the row's token for each.
    """

    picked: np.ndarray
    where: np.ndarray
    read: np.ndarray
    token_of: np.ndarray

    def agree(self, values: np.ndarray) -> bool:
        """Tell whether values (..., N * S) are equal wherever tokens were merged."""
        return bool((values[..., self.where[self.token_of]] == values[..., self.read]).all())


def place(images: Images, folded: Folded, mask: np.ndarray | None) -> tuple[Folded, RowImages] | str:
    """Give a row its token ids back, and find the images of its placeholders.

    Args:
        images: Of the batch.
        folded: The batch, folded by its keys.
        mask: (N, S) bool of the batch; ``None``: no padding.

    Returns:
        The row and its images; or the reason why the batch has to run as it was given.
    """
    rows, index = folded.rows, folded.index.numpy().ravel()
    L = rows.input_ids.shape[1]
    seen = np.ones(images.keys.shape, bool) if mask is None else mask
    read = np.flatnonzero(seen | predicting_padding(seen))
    where = np.zeros(L, np.int64)
    where[index[::-1]] = np.arange(index.size)[::-1]
    where[index[read][::-1]] = read[::-1]
    row = RowImages(np.empty(0, np.int64), where, read, index[read])
    if images.types is not None and not row.agree(images.types.reshape(1, -1)):
        return "whose equal tokens are of different types"
    keys = rows.input_ids.numpy()[0]
    named = keys >= KEYS
    ids = keys.copy()
    ids[named] = images.originals[keys[named] - KEYS]
    units = images.unit_of.ravel()[where]
    order = []
    for kind in range(int(images.kinds.max(initial=-1)) + 1):
        filled = units[(units >= 0) & (images.kinds[units] == kind)]
        tokens = np.array([images.units[u].tokens for u in filled], np.int64)
        at, picked = 0, []
        while at < len(filled):
            unit = filled[at]
            if (filled[at : at + tokens[at]] != unit).any() or at + tokens[at] > len(filled):
                return "whose equal images are followed by different tokens before they end"
            picked.append(unit)
            at += tokens[at]
        order += picked
    last = None
    if images.last is not None:
        last, S = torch.arange(L, dtype=torch.int32), images.keys.shape[1]
        inside = np.flatnonzero(images.last.ravel()[where] >= 0)
        (sequences, columns), stops = divmod(where[inside], S), images.last.ravel()[where[inside]]
        ends_at = index[sequences * S + stops]
        if (ends_at - inside != stops - columns).any():
            return "with two-way blocks that padding or other tokens interrupt"
        last[torch.from_numpy(inside)] = torch.from_numpy(ends_at).int()
    rows = replace(rows, input_ids=torch.from_numpy(ids)[None], last=last)
    counts = replace(folded.counts, images=len(images.units), images_run=len(order))
    return replace(folded, rows=rows, counts=counts), replace(row, picked=np.array(order, np.int64))


def row_arguments(
    backbone: Any, call: Mapping[str, Any], record: Media, held: Sequence[Held], batch: Any, row: RowImages
) -> dict[str, Any] | str:
    """Make the arguments that a row's call has beside its tokens: its images, and rope positions of several axes.

    Args:
        backbone: The backbone that is called.
        call: The batch's call.
        record: Of the multimodal class.
        held: The call's images.
        batch: The :class:`flexpatch.calls.Batch`.
        row: The images of its row.

    Returns:
        The arguments; or the reason why the batch has to run as it was given.
    """
    images = batch.images
    picked = [row.picked[images.kinds[row.picked] == kind] for kind in range(len(held))]
    shown = select(held, [[images.units[k] for k in own] for own in picked])
    if record.three_axes and call.get("position_ids") is None:
        positions, deltas = rope_positions(backbone, call, batch.ids, batch.mask, images.types, images.sizes, record)
        if positions is not None:
            if deltas is not None:
                backbone.rope_deltas = deltas.to(call["input_ids"].device)  # as an unpatched call leaves them
            flat = positions.flatten(1)
            if not row.agree(flat.numpy()):
                return "whose equal tokens have different rope positions"
            shown["position_ids"] = flat[:, row.where][:, None].to(call["input_ids"].device)
    return shown
