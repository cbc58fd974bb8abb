"""Packed rows: many trees in one row of tensors, with each token once.

Shapes: B rows, L tokens a row, T scored tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flexpatch.errors import FlexpatchError
from flexpatch.illustrated import Illustrated
from flexpatch.tree import LARGEST_ID, Layout, Tree, lay_out


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows on one device, with all that a forward pass and its answer log-probs need.

    Attributes:
        input_ids: (B, L) int64.
        position_ids: (B, L) int64, rope positions.
        ends: (B, L) int32, row index at which each token's subtree ends (exclusive). A padding token is a tree alone.
        last: (B, L) int32, row index of the last token of each token's two-way block, for a token outside its own;
            ``None``: there are no blocks. In rows with images they are found when a model runs these.
        predictors: (T,) int64, predictor index: the token, of all B * L, that predicts each scored token.
        targets: (T,) int64, ids of the scored tokens, answer by answer.
        answer_tokens: (A, longest answer) int64, indices of each answer's scored tokens in 0 to T - 1; T is padding.
        sample_of_answer: (A,) int64, index of the tree that each answer belongs to.
        tokens: Tokens computed, without padding.
        separate_tokens: Tokens of all sequences, run separately, without padding.
        depth: Longest root-to-leaf sequence, in tokens.
        visible: Pairs of tokens of which one sees the other, without windows and two-way blocks.
        sequence_lengths: Length of every answer's separate sequence, in tokens.
        largest_ids: Largest id of each tree.
        samples: Name of each tree in error messages.
        pad_id: Id of padding tokens.
        scored: (T,) int64, the scored tokens themselves, of all B * L.
        starts: The first token of each tree, of all B * L.
        images: Runs of tokens with images, in the order of the tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    predictors: Tensor
    targets: Tensor
    answer_tokens: Tensor
    sample_of_answer: Tensor
    tokens: int
    separate_tokens: int
    depth: int
    sequence_lengths: list[int]
    largest_ids: list[int]
    samples: list[int | str]
    pad_id: int = 0
    visible: int = 0
    last: Tensor | None = None
    scored: Tensor | None = None
    starts: Sequence[int] = ()
    images: Sequence[Illustrated] = ()
    # Keeps masks that were built from these rows, so that policy and reference share them.
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # dataclasses.replace may change ends or positions, so a copy never takes masks along.
        object.__setattr__(self, "masks", {})

    def _each(self, function: Any) -> Rows:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved, images=[each.each(function) for each in self.images])

    def __getitem__(self, key: Any) -> NoReturn:
        """Refuse a trainer that takes packed rows for a batch of columns.

        Raises:
            FlexpatchError: Always; so do iteration, ``items()``, ``keys()`` and ``values()``.
        """
        raise _no_batch(repr(key))

    def __iter__(self) -> NoReturn:
        raise _no_batch("its columns")

    def items(self) -> NoReturn:
        """Refuse a trainer that asks for all columns; ``keys`` and ``values`` are this method too."""
        raise _no_batch("all columns")

    keys = values = items

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """Copy the rows to another device. Masks are built anew there.

        Args:
            device: The device.
            non_blocking: Copy from pinned memory while the host goes on.

        Returns:
            Rows whose tensors are on ``device``.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """Copy the rows to pinned memory. ``DataLoader(pin_memory=True)`` calls this method."""
        return self._each(lambda tensor: tensor.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        # A BlockMask holds a closure and cannot leave the process.
        return {f.name: {} if f.name == "masks" else getattr(self, f.name) for f in fields(self)}


def _no_batch(asked: str) -> FlexpatchError:
    return FlexpatchError(
        f"packed rows were asked for {asked:.40}, as if they were a batch of columns. A stock trainer makes its own "
        "batches, and flexpatch.apply(model) folds those: leave flexpatch.Collator out of it. In a loop of your own "
        "pass rows to flexpatch.answer_logprobs(model, rows)"
    )


def build_rows(bins: Sequence[Sequence[Tree | Layout]], pad_id: int = 0) -> Rows:
    """Pack trees into rows, one row for each bin, padded to the longest.

    Args:
        bins: The trees (or layouts made by :func:`lay_out`) of each row, in order. Trees are numbered through in error
            messages; layouts keep their names.
        pad_id: Id of padding tokens. A padding token attends to itself alone, and is not scored.

    Returns:
        Rows on the CPU, one for each bin; answers are in the order of the trees.

    Raises:
        FlexpatchError: For an empty bin, or a malformed tree (the message names the sample).
    """
    if not isinstance(bins, Sequence) or not all(isinstance(row, Sequence) for row in bins):
        raise FlexpatchError("expected a list of rows, each a list of trees; for a single row pass [trees]")
    if not isinstance(pad_id, int | np.integer) or not 0 <= pad_id <= LARGEST_ID:
        raise FlexpatchError(f"pad_id={pad_id!r:.40}; expected a token id")
    if not bins or not all(bins):
        raise FlexpatchError("every row needs at least one tree")
    firsts = np.cumsum([0, *map(len, bins)])
    rows = [
        [tree if isinstance(tree, Layout) else lay_out(tree, int(first) + i) for i, tree in enumerate(trees)]
        for first, trees in zip(firsts, bins, strict=False)
    ]
    length = max(sum(map(len, row)) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
    predictors, targets, answers, samples = [], [], [], []
    tokens, starts, images = [np.empty(0, np.int64)], [], []
    layouts = [layout for row in rows for layout in row]
    scored = 0
    sample = 0
    for b, row in enumerate(rows):
        start = 0
        for layout in row:
            span = slice(start, start + len(layout))
            input_ids[b, span] = layout.ids
            position_ids[b, span] = layout.positions
            ends[b, span] = layout.ends + start
            predictors.append(layout.predictors + b * length + start)
            targets.append(layout.targets)
            starts.append(b * length + start)
            images += [each.moved(starts[-1]) for each in layout.images]
            for answer_length, path in zip(layout.answer_lengths, layout.answers, strict=True):
                tokens.append(path[len(path) - answer_length :] + starts[-1])
                answers.append(np.arange(scored, scored + answer_length))
                samples.append(sample)
                scored += answer_length
            start += len(layout)
            sample += 1
    answer_tokens = np.full((len(answers), max(map(len, answers), default=0)), scored, np.int64)
    for i, answer in enumerate(answers):
        answer_tokens[i, : len(answer)] = answer
    return Rows(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        ends=torch.from_numpy(ends),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        answer_tokens=torch.from_numpy(answer_tokens),
        sample_of_answer=torch.tensor(samples, dtype=torch.int64),
        tokens=sum(map(len, layouts)),
        separate_tokens=sum(layout.separate_tokens for layout in layouts),
        depth=max(int(layout.positions.max()) + 1 for layout in layouts),
        sequence_lengths=[len(answer) for layout in layouts for answer in layout.answers],
        largest_ids=[int(layout.ids.max()) for layout in layouts],
        samples=[layout.sample for layout in layouts],
        pad_id=int(pad_id),
        visible=sum(int(layout.positions.sum()) + len(layout) for layout in layouts),
        scored=torch.from_numpy(np.concatenate(tokens)),
        starts=starts,
        images=images,
    )
