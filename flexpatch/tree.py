"""Prefix trees, and their layout in depth-first order.

A **tree** is a run of tokens and the trees that continue it: a prompt and its answers, or a dialogue with several
replies at every turn. A **row** (``rows.py``) holds many trees in depth-first order, each token once. For every token
a row keeps

- ``position``: its depth in tokens from its root, which is its rope position (siblings restart after their parent);
- ``end``: the row index at which the subtree of its node ends (exclusive).

In depth-first order a node and its descendants are the indices before ``end``. So the whole attention rule is
``q may see kv  <=>  kv <= q < end[kv]``. The rule contains Algorithms 1 to 3 of arXiv 2410.20305, and any deeper tree.

Shapes: L tokens of a tree, T scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flexpatch.errors import FlexpatchError
from flexpatch.illustrated import Illustrated, Keys, checked_images

LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Tree:
    """A run of tokens, and the trees that continue it.

    >>> pair = Tree.of([1, 2, 3], [4, 5], [6])                      # prompt, chosen, rejected
    >>> chat = Tree([1, 2], [Tree([3], [Tree([4], [Tree([5]), Tree([6])], answer=False)], answer=True)])

    Attributes:
        ids: Token ids of this run, at least one.
        children: Trees that continue this run. Their order is the order of the answers.
        answer: ``True`` if the run's tokens are scored, ``False`` if not. ``None`` scores leaves that have a parent. A
            scored root is an ordinary sequence: all its tokens are scored but the first, which no token predicts.
        images: Tensors of the run's images by name, in the order of their placeholders among ``ids``: what the model's
            processor makes of this run beside its ids (``pixel_values``, ``image_grid_thw``, ...). ``None``: no images.
    """

    ids: Sequence[int]
    children: Sequence[Tree] = ()
    answer: bool | None = None
    images: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, prompt: Sequence[int], *answers: Sequence[int], images: Mapping[str, Tensor] | None = None) -> Tree:
        """Make the tree of one prompt and its answers.

        Args:
            prompt: Token ids of the prompt, at least one.
            answers: Token ids of each answer, at least one.
            images: Tensors of the prompt's images, as in :class:`Tree`.

        Returns:
            A root with one leaf for each answer, in order.
        """
        return cls(prompt, [cls(answer) for answer in answers], images=images)


@dataclass(frozen=True, eq=False)
class Layout:
    """One tree laid out in depth-first order, before it has a place in a row.

    The arrays are NumPy's, so that a loader's worker processes can build a layout.

    Attributes:
        ids: (L,) int64, token ids.
        positions: (L,) int64, depth of each token from the root.
        ends: (L,) int64, index at which the subtree of each token's node ends (exclusive), from the layout's start.
        predictors: (T,) int64, predictor index: the token that predicts each scored token.
        targets: (T,) int64, id of each scored token.
        answers: One int64 index array an answer: all tokens from the root to the answer's last (a separate sequence).
        answer_lengths: Scored tokens of each answer.
        separate_tokens: Tokens of all root-to-leaf sequences, run separately.
        sample: Name of the tree in error messages.
        images: Runs of tokens with images, in the order of the tokens.
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    predictors: np.ndarray
    targets: np.ndarray
    answers: list[np.ndarray]
    answer_lengths: list[int]
    separate_tokens: int
    sample: int | str = 0
    images: Sequence[Illustrated] = ()

    def __len__(self) -> int:
        return len(self.ids)


def lay_out(tree: Tree, sample: int | str = 0) -> Layout:
    """Lay a tree out in depth-first order, and merge the common beginnings of its branches.

    Two answers that begin alike share their first tokens too: every distinct prefix is one token of the layout. Runs
    with images are shared if they and their images are equal.

    Args:
        tree: The tree.
        sample: Name of the tree in error messages.

    Returns:
        The layout, with each distinct prefix once.

    Raises:
        FlexpatchError: For an empty run, ids that are not integers in 0 to 2^31 - 1, an object that is not a tree, or
            a tree that continues itself. The message names the sample and the run.
    """
    named = Keys(LARGEST_ID + 1)
    branches, spans = _branches(tree, sample, named)
    lengths = np.array([len(branch) for branch in branches])
    keys = np.zeros((len(branches), lengths.max()), np.int64)
    keys[np.arange(keys.shape[1]) < lengths[:, None]] = np.concatenate(branches)
    forest = merge_prefixes(keys, lengths)
    assert forest is not None
    keys, positions, ends, paths = forest
    ids, images = named.resolve(keys)
    predictors, targets, answers, answer_lengths = [], [], [], []
    for branch, start, stop in spans:
        path = paths[branch][:stop]
        predictors.append(path[start - 1 : stop - 1])
        targets.append(ids[path[start:stop]])
        answers.append(path)
        answer_lengths.append(stop - start)
    nothing = np.empty(0, np.int64)
    return Layout(
        ids,
        positions,
        ends,
        np.concatenate([nothing, *predictors]),
        np.concatenate([nothing, *targets]),
        answers,
        answer_lengths,
        int(lengths.sum()),
        sample,
        images,
    )


def _branches(tree: Tree, sample: int | str, named: Keys) -> tuple[list[np.ndarray], list[tuple[int, int, int]]]:
    """List the root-to-leaf sequences, and (branch, start, stop) of every scored run, in depth-first order.

    The first token of a run with images gets a key that names them.
    """
    branches: list[np.ndarray] = []
    spans: list[tuple[int, int, int]] = []
    path: list[Tree] = []  # from the root to the current node
    on_path: set[int] = set()
    stack: list[tuple[Tree, int, np.ndarray, str]] = [(tree, 0, np.empty(0, np.int64), "")]
    while stack:
        node, depth, before, name = stack.pop()
        _check_node(node, sample, name)
        while len(path) > depth:
            on_path.remove(id(path.pop()))
        if id(node) in on_path:
            raise FlexpatchError(
                f"sample {sample}: {_called(name)} is a tree that continues itself: it would never end"
            )
        path.append(node)
        on_path.add(id(node))
        run = _checked(node.ids, sample, name)
        if node.images is not None:
            where = f"sample {sample}: {_called(name)}"
            run = named.first_named(run, checked_images(node.images, where), where)
        sequence = np.concatenate([before, run])
        answer = (not node.children and bool(name)) if node.answer is None else node.answer
        if answer:
            start = max(len(before), 1)
            if start == len(sequence):
                raise FlexpatchError(f"sample {sample}: a sequence of one token has no token to score")
            spans.append((len(branches), start, len(sequence)))  # the next finished branch contains this run
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
    """Refuse an object that is not a tree, before its attributes are read."""
    where = f"sample {sample}: {_called(name)}"
    if not isinstance(node, Tree):
        raise FlexpatchError(f"{where} is {type(node).__name__}; expected a flexpatch.Tree")
    if not isinstance(node.children, list | tuple):
        raise FlexpatchError(f"{where} has {type(node.children).__name__} as children; expected a list of trees")
    if node.answer is not None and not isinstance(node.answer, bool | np.bool_):
        raise FlexpatchError(f"{where} has answer={node.answer!r:.40}; expected True, False or None")


def _checked(ids: Sequence[int], sample: int | str, name: str) -> np.ndarray:
    """Convert token ids to an int64 array, or raise an error that names the run and the fault."""
    where = f"sample {sample}: {_called(name)}"
    try:
        run = np.asarray(ids)
    except Exception as error:  # lists of unequal lengths, tensors with gradients or on another device
        raise FlexpatchError(f"{where} must be a flat list of token ids: {error!s:.200}") from error
    if run.ndim != 1:
        raise FlexpatchError(f"{where} must be a flat list of token ids, but has shape {run.shape}")
    if len(run) == 0:
        raise FlexpatchError(f"{where} is empty; every run needs at least one token")
    if run.dtype.kind not in "iu":  # not np.integer, which includes durations
        raise FlexpatchError(f"{where} holds {run.dtype} values; token ids are integers")
    if isinstance(ids, list | tuple) and bool in set(map(type, ids)):  # NumPy converts True to 1
        raise FlexpatchError(f"{where} holds bool values; token ids are integers")
    if run.min() < 0:
        raise FlexpatchError(f"{where} holds the id {run.min()}; token ids are >= 0")
    if run.max() > LARGEST_ID:
        raise FlexpatchError(f"{where} holds the id {run.max()}; token ids are at most {LARGEST_ID}")
    return run.astype(np.int64)


def merge_prefixes(
    keys_NS: np.ndarray, lengths_N: np.ndarray, worth: Callable[[int], bool] = lambda tokens: True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Merge N sequences into their prefix forest, in depth-first order.

    Sorting makes neighbours of sequences with a common beginning. Each sequence then adds only the tokens that it does
    not share with the one before it. So no loop over sequences is needed, and no recursion, however deep they nest.

    Args:
        keys_NS: (N, S) int64 >= 0. Equal keys in one column are one token, if all keys before them are equal too.
        lengths_N: (N,) int64 in 1 to S.
        worth: Called with L, the tokens of the forest, as soon as L is known; ``False`` stops the work.

    Returns:
        ``keys``, ``positions`` (columns) and ``ends`` of the forest's tokens, each (L,) int64, and the token index of
        each given key, (N, S) int64, without meaning beyond a sequence's length. ``None`` if ``worth`` said no.
    """
    N, S = keys_NS.shape
    columns = np.arange(S)
    # Padding sorts last, so that a sequence comes after all sequences that continue it.
    keys = np.where(columns < lengths_N[:, None], keys_NS, -1)
    whole = keys.view(np.dtype((np.void, keys.itemsize * S)))[:, 0]
    order = np.argsort(whole)  # by bytes: an odd order, but every order groups prefixes
    keys, lengths = keys[order], lengths_N[order]
    # Counts the tokens that each sequence shares with the one before it.
    common = np.zeros(N, np.int64)
    differs = keys[1:] != keys[:-1]
    common[1:] = np.minimum(np.where(differs.any(1), differs.argmax(1), S), lengths[1:])
    offsets = np.concatenate([[0], np.cumsum(lengths - common)])
    if not worth(int(offsets[-1])):
        return None
    anew = common[:, None] <= columns  # columns not shared with the sequence before
    sequence = np.arange(N)[:, None]
    owner = np.maximum.accumulate(np.where(anew, sequence, 0))
    index = np.empty((N, S), np.int64)
    index[order] = offsets[owner] + columns - common[owner]
    # A subtree ends where the next sequence outside it begins.
    leaves = np.full((N + 1, S), N)
    leaves[:N] = np.where(anew, sequence, N)
    leaves = np.minimum.accumulate(leaves[::-1])[::-1][1:]
    own = anew & (columns < lengths[:, None])
    return keys[own], np.broadcast_to(columns, (N, S))[own], offsets[leaves[own]], index
