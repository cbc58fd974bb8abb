"""Random prefix trees, and what their rows mean by definition: slow, obvious, and independent of flexpatch."""

import numpy as np

from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Layout, Tree, lay_out

Prefix = tuple[int, tuple[int, ...]]  # which tree of the row, and all ids from its root to the token


def random_tree(rng: np.random.Generator, *, levels: int = 4, longest_run: int = 3) -> Tree:
    """Up to four children a node, and so few distinct ids that siblings often begin alike."""
    vocabulary = int(rng.integers(3, 6))

    def grow(left: int) -> Tree:
        ids = rng.integers(0, vocabulary, rng.integers(1, longest_run + 1)).tolist()
        children = [grow(left - 1) for _ in range(rng.integers(0, 5))] if left > 1 else []
        return Tree(ids, children, answer=(None, True, False)[rng.integers(3)])

    tree = grow(int(rng.integers(1, levels + 1)))
    # A scored root needs a second token.
    return Tree([*tree.ids, 0], tree.children, tree.answer) if tree.answer and len(tree.ids) == 1 else tree


def runs(tree: Tree, before: tuple[int, ...] = ()) -> list[tuple[Tree, tuple[int, ...], int]]:
    """Every run of ``tree`` in depth-first order: its node, its whole sequence, and where in that it starts."""
    sequence = (*before, *tree.ids)
    here = [(tree, sequence, len(before))]
    return here + [run for child in tree.children for run in runs(child, sequence)]


def row_prefixes(ids: np.ndarray, positions: np.ndarray) -> list[Prefix]:
    """The prefix of every token of a row. A token's parent is the last token before it that is one less deep."""
    prefixes: list[Prefix] = []
    path: list[int] = []
    for token, position in zip(ids.tolist(), positions.tolist(), strict=True):
        path = [*path[:position], token]
        number = prefixes[-1][0] if prefixes else -1
        prefixes.append((number + (position == 0), tuple(path)))
    return prefixes


def visible(prefixes: list[Prefix], window: int | None = None) -> np.ndarray:
    """(L, L) bool: token i sees token j if j's prefix begins i's, in the same tree and fewer than ``window`` deeper."""
    assert len(set(prefixes)) == len(prefixes), "a token appears twice"
    seen = np.zeros((len(prefixes), len(prefixes)), bool)
    lineages: dict[Prefix, list[int]] = {}
    for i, (number, prefix) in enumerate(prefixes):
        lineage = [*lineages.get((number, prefix[:-1]), []), i]
        assert len(lineage) == len(prefix), "a token comes before its parent"
        lineages[number, prefix] = lineage
        seen[i, lineage if window is None else lineage[-window:]] = True
    return seen


def check_layout(layout: Layout, tree: Tree) -> None:
    """Everything a layout says about ``tree``, by brute force."""
    nodes = runs(tree)
    leaves = [sequence for node, sequence, _ in nodes if not node.children]
    scored = [
        (sequence, max(start, 1))
        for node, sequence, start in nodes
        if (node.answer if node.answer is not None else not node.children and start > 0)
    ]
    prefixes = [prefix for _, prefix in row_prefixes(layout.ids, layout.positions)]

    # No token twice, none missing, none invented.
    assert len(layout) == len(prefixes) == len(set(prefixes))
    assert set(prefixes) == {leaf[:k] for leaf in leaves for k in range(1, len(leaf) + 1)}
    assert layout.positions.tolist() == [len(prefix) - 1 for prefix in prefixes]
    assert layout.separate_tokens == sum(map(len, leaves))

    index = np.arange(len(layout))
    by_ends = (index[None, :] <= index[:, None]) & (index[:, None] < layout.ends[None, :])
    assert (by_ends == visible([(0, prefix) for prefix in prefixes])).all()

    assert [tuple(layout.ids[path]) for path in layout.answers] == [sequence for sequence, _ in scored]
    assert layout.answer_lengths == [len(sequence) - start for sequence, start in scored]
    predicted = [sequence[: k + 1] for sequence, start in scored for k in range(start, len(sequence))]
    found = [
        (*prefixes[predictor], target)
        for predictor, target in zip(layout.predictors, layout.targets.tolist(), strict=True)
    ]
    assert found == predicted


def random_rows(seed: int, *, longest_run: int = 5) -> tuple[Rows, list[list[int]], list[bool]]:
    """One to three rows of random trees, some with padding.

    Also, for each token of all rows, the tokens of its sequence from the root to it, by positions alone, and whether
    it is no padding.
    """
    rng = np.random.default_rng(seed)
    bins = [
        [random_tree(rng, levels=3, longest_run=longest_run) for _ in range(rng.integers(1, 4))]
        for _ in range(rng.integers(1, 4))
    ]
    rows = build_rows(bins)
    B, L = rows.ends.shape
    lengths = [sum(len(lay_out(tree, 0)) for tree in trees) for trees in bins]
    paths: list[list[int]] = []
    for b in range(B):
        path: list[int] = []
        for i, position in enumerate(rows.position_ids[b].tolist()):
            path = [*path[:position], b * L + i]
            paths.append(path)
    return rows, paths, [i < length for length in lengths for i in range(L)]
