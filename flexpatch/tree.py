"""Prefix trees and the packed rows they become.

A **tree** is a run of tokens and the trees that continue it: a prompt and its answers, or a dialogue with several
replies at every turn. A **row** holds many trees in depth-first order, each token once. For every token a row keeps

- ``position``: its depth in tokens from its root, which is its rope position (siblings restart after their parent);
- ``end``: the row index at which the subtree of its node ends (exclusive).

In depth-first order the descendants-or-self of a token's node are the indices before ``end``, so the whole attention
rule is ``q may see kv  <=>  kv <= q < end[kv]``. It contains Algorithms 1 to 3 of arXiv 2410.20305 and any deeper tree.

Shapes: B rows, L tokens a row, T scored tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flexpatch.errors import FlexpatchError

LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Tree:
    """A run of tokens and what continues it.

    >>> pair = Tree.of([1, 2, 3], [4, 5], [6])                      # prompt, chosen, rejected
    >>> chat = Tree([1, 2], [Tree([3], [Tree([4], [Tree([5]), Tree([6])], answer=False)], answer=True)])

    Attributes:
        ids: Token ids of this run, at least one.
        children: Trees that continue it. Their order is the order of the answers.
        answer: Whether the run's tokens are scored. ``None``: yes for a leaf that has a parent. A scored root is an
            ordinary sequence: all its tokens but the first, which nothing predicts.
    """

    ids: Sequence[int]
    children: Sequence[Tree] = ()
    answer: bool | None = None

    @classmethod
    def of(cls, prompt: Sequence[int], *answers: Sequence[int]) -> Tree:
        """A prompt and any number of answers."""
        return cls(prompt, [cls(answer) for answer in answers])


@dataclass(frozen=True, eq=False)
class Layout:
    """One tree laid out in depth-first order, before it has a place in a row. NumPy arrays, so that a loader's
    worker processes can build it.

    Attributes:
        ids, positions, ends: (L,) int64; ``ends`` counts from the layout's own first token.
        sources: (T,) int64, index of the token that predicts each scored token.
        targets: (T,) int64, id of each scored token.
        answers: Index arrays, one an answer, of all tokens from the root to the answer's last: its separate sequence.
        answer_lengths: Scored tokens of each answer.
        separate_tokens: Tokens that separate runs of every root-to-leaf sequence would need.
        sample: How error messages name it.
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    answers: list[np.ndarray]
    answer_lengths: list[int]
    separate_tokens: int
    sample: int | str = 0

    def __len__(self) -> int:
        return len(self.ids)


def lay_out(tree: Tree, sample: int | str = 0) -> Layout:
    """Lay ``tree`` out in depth-first order, merging whatever its branches have in common.

    Two answers that begin alike share those tokens too: a token is computed once for every sequence it begins.

    Args:
        tree: The tree.
        sample: How error messages name it.

    Raises:
        FlexpatchError: For an empty run, ids that are not integers in 0 to 2^31 - 1, what is no tree, or a tree that
            continues itself. The message names the sample and the run.
    """
    branches, spans = _branches(tree, sample)
    lengths = np.array([len(branch) for branch in branches])
    keys = np.zeros((len(branches), lengths.max()), np.int64)
    keys[np.arange(keys.shape[1]) < lengths[:, None]] = np.concatenate(branches)
    forest = merge_prefixes(keys, lengths)
    assert forest is not None
    ids, positions, ends, paths = forest
    sources, targets, answers, answer_lengths = [], [], [], []
    for branch, start, stop in spans:
        path = paths[branch][:stop]
        sources.append(path[start - 1 : stop - 1])
        targets.append(ids[path[start:stop]])
        answers.append(path)
        answer_lengths.append(stop - start)
    nothing = np.empty(0, np.int64)
    return Layout(
        ids,
        positions,
        ends,
        np.concatenate([nothing, *sources]),
        np.concatenate([nothing, *targets]),
        answers,
        answer_lengths,
        int(lengths.sum()),
        sample,
    )


def _branches(tree: Tree, sample: int | str) -> tuple[list[np.ndarray], list[tuple[int, int, int]]]:
    """Root-to-leaf sequences, and (branch, start, stop) of every scored run, in depth-first order of the runs."""
    branches: list[np.ndarray] = []
    spans: list[tuple[int, int, int]] = []
    path: list[Tree] = []  # from the root to the node in hand
    on_path: set[int] = set()
    stack: list[tuple[Tree, int, np.ndarray, str]] = [(tree, 0, np.empty(0, np.int64), "")]
    while stack:
        node, depth, before, name = stack.pop()
        _check_node(node, sample, name)
        while len(path) > depth:
            on_path.remove(id(path.pop()))
        if id(node) in on_path:
            raise FlexpatchError(f"sample {sample}: {_called(name)} is a tree that it continues: it would never end")
        path.append(node)
        on_path.add(id(node))
        run = _checked(node.ids, sample, name)
        sequence = np.concatenate([before, run])
        answer = (not node.children and bool(name)) if node.answer is None else node.answer
        if answer:
            start = max(len(before), 1)
            if start == len(sequence):
                raise FlexpatchError(f"sample {sample}: a sequence of one token has no token to score")
            spans.append((len(branches), start, len(sequence)))  # the next branch to be finished runs through here
        if node.children:
            names = (f"{name}.{i}" if name else str(i) for i in range(len(node.children)))
            children = [(c, depth + 1, sequence, n) for c, n in zip(node.children, names, strict=True)]
            stack.extend(reversed(children))
        else:
            branches.append(sequence)
    return branches, spans


def _called(name: str) -> str:
    name = name if len(name) <= 60 else f"{name[:40]}...{name[-20:]}"
    return f"answer {name}" if name else "the prompt"


def _check_node(node: Any, sample: int | str, name: str) -> None:
    """Refuse what is no tree, before it is taken for one."""
    where = f"sample {sample}: {_called(name)}"
    if not isinstance(node, Tree):
        raise FlexpatchError(f"{where} is {type(node).__name__}; expected a flexpatch.Tree")
    if not isinstance(node.children, list | tuple):
        raise FlexpatchError(f"{where} has {type(node.children).__name__} as children; expected a list of trees")
    if node.answer is not None and not isinstance(node.answer, bool | np.bool_):
        raise FlexpatchError(f"{where} has answer={node.answer!r:.40}; expected True, False or None")


def _checked(ids: Sequence[int], sample: int | str, name: str) -> np.ndarray:
    """``ids`` as an int64 array, or the reason why not."""
    where = f"sample {sample}: {_called(name)}"
    try:
        run = np.asarray(ids)
    except Exception as error:  # lists of unequal lengths, tensors that want gradients or are elsewhere, ...
        raise FlexpatchError(f"{where} must be a flat list of token ids: {error!s:.200}") from error
    if run.ndim != 1:
        raise FlexpatchError(f"{where} must be a flat list of token ids, but has shape {run.shape}")
    if len(run) == 0:
        raise FlexpatchError(f"{where} is empty; every run needs at least one token")
    if run.dtype.kind not in "iu":  # np.integer would include durations
        raise FlexpatchError(f"{where} holds {run.dtype} values; token ids are integers")
    if isinstance(ids, list | tuple) and bool in set(map(type, ids)):  # which NumPy takes for 0 and 1
        raise FlexpatchError(f"{where} holds bool values; token ids are integers")
    if run.min() < 0:
        raise FlexpatchError(f"{where} holds the id {run.min()}; token ids are >= 0")
    if run.max() > LARGEST_ID:
        raise FlexpatchError(f"{where} holds the id {run.max()}; token ids are at most {LARGEST_ID}")
    return run.astype(np.int64)


def merge_prefixes(
    keys_NS: np.ndarray, lengths_N: np.ndarray, worth: Callable[[int], bool] = lambda tokens: True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The prefix forest of N sequences in depth-first order.

    Sorted, sequences with a common beginning are neighbours, and each adds to the forest what it does not have in
    common with the one before it. So no loop over sequences is needed, and no recursion however deep they nest.

    Args:
        keys_NS: (N, S) int64 >= 0. Equal keys in equal columns are the same token, if all before them are.
        lengths_N: (N,) int64 in 1 to S.
        worth: Asked with L once that is known, which is early.

    Returns:
        Of the L tokens of the forest: ``keys``, ``positions`` (columns) and ``ends``, each (L,) int64; and (N, S)
        int64, the token of each key, meaningless from a sequence's length on. ``None`` if not ``worth`` it.
    """
    N, S = keys_NS.shape
    columns = np.arange(S)
    # Padding sorts last, so that a sequence comes after all that continue it.
    keys = np.where(columns < lengths_N[:, None], keys_NS, -1)
    whole = keys.view(np.dtype((np.void, keys.itemsize * S)))[:, 0]
    order = np.argsort(whole)  # byte by byte, which is an odd order, but any groups prefixes
    keys, lengths = keys[order], lengths_N[order]
    # Tokens each sequence has in common with the one before it.
    common = np.zeros(N, np.int64)
    differs = keys[1:] != keys[:-1]
    common[1:] = np.minimum(np.where(differs.any(1), differs.argmax(1), S), lengths[1:])
    offsets = np.concatenate([[0], np.cumsum(lengths - common)])
    if not worth(int(offsets[-1])):
        return None
    anew = common[:, None] <= columns  # nothing is shared with the sequence before from this column on
    sequence = np.arange(N)[:, None]
    owner = np.maximum.accumulate(np.where(anew, sequence, 0))
    index = np.empty((N, S), np.int64)
    index[order] = offsets[owner] + columns - common[owner]
    # A subtree ends where the next sequence that leaves it begins.
    leaves = np.full((N + 1, S), N)
    leaves[:N] = np.where(anew, sequence, N)
    leaves = np.minimum.accumulate(leaves[::-1])[::-1][1:]
    own = anew & (columns < lengths[:, None])
    return keys[own], np.broadcast_to(columns, (N, S))[own], offsets[leaves[own]], index


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows on one device: everything a forward pass and its answer log-probs need.

    Attributes:
        input_ids: (B, L) int64.
        position_ids: (B, L) int64, rope positions.
        ends: (B, L) int32, exclusive row index at which each token's subtree ends. A padding token is its own tree.
        sources: (T,) int64 into the flattened (B*L) tokens: the token that predicts each scored token.
        targets: (T,) int64, ids of the scored tokens, answer by answer.
        answer_tokens: (A, longest answer) int64 into T; T itself marks padding.
        sample_of_answer: (A,) int64, which tree of the input each answer belongs to.
        tokens: Tokens computed, without padding.
        separate_tokens: Tokens that separate runs of every sequence would compute, without padding.
        depth: Longest root-to-leaf sequence, in tokens.
        sequence_lengths: Length of every answer's separate sequence, in tokens.
        largest_ids: Largest id of each tree.
        samples: How error messages name each tree.
        pad_id: Id of padding tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    sources: Tensor
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
    # Masks already built from these rows, so that policy and reference share them.
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A copy may have other ends or positions (dataclasses.replace), so it never takes masks along.
        object.__setattr__(self, "masks", {})

    def _each(self, function: Any) -> Rows:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def __getitem__(self, key: Any) -> NoReturn:
        """Refuse a trainer that takes packed rows for a batch of its own.

        Raises:
            FlexpatchError: Always; so do iteration, ``items()``, ``keys()`` and ``values()``.
        """
        raise _no_batch(repr(key))

    def __iter__(self) -> NoReturn:
        raise _no_batch("its columns")

    def items(self) -> NoReturn:
        """Refuse a trainer that asks for all columns; ``keys`` and ``values`` are this method."""
        raise _no_batch("all columns")

    keys = values = items

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on another device. Masks are built there anew."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """The same rows in pinned memory; ``DataLoader(pin_memory=True)`` calls it."""
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
            messages; layouts keep the name they were given.
        pad_id: Id of padding tokens. They attend only to themselves and score nothing.

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
    sources, targets, answers, samples = [], [], [], []
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
            sources.append(layout.sources + b * length + start)
            targets.append(layout.targets)
            for answer_length in layout.answer_lengths:
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
        sources=torch.from_numpy(np.concatenate(sources)),
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
    )
