"""Trees against their definition: each distinct prefix of each sequence is one token of the row, and nothing else."""

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.forests import check_layout, random_tree, row_prefixes, runs, visible
from parameterized import parameterized

from flexpatch import FlexpatchError, Rows, Tree, build_rows, lay_out

PAIR = Tree.of([1, 2, 3], [4, 5], [4, 6, 7], [8])
CIRCLE = Tree([1], [])
CIRCLE.children.append(CIRCLE)


def test_a_prompt_and_three_answers() -> None:
    layout = lay_out(PAIR)
    #                                  prompt   4  5  6  7  8
    assert layout.ids.tolist() == [*(1, 2, 3), 4, 5, 6, 7, 8]
    assert layout.positions.tolist() == [*(0, 1, 2), 3, 4, 4, 5, 3]
    assert layout.ends.tolist() == [*(8, 8, 8), 7, 5, 7, 7, 8]
    assert [path.tolist() for path in layout.answers] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5, 6], [0, 1, 2, 7]]
    assert layout.predictors.tolist() == [*(2, 3), *(2, 3, 5), 2]
    assert layout.targets.tolist() == [*(4, 5), *(4, 6, 7), 8]


def test_layout_is_the_set_of_prefixes() -> None:
    for seed in range(2000):
        tree = random_tree(np.random.default_rng(seed))
        check_layout(lay_out(tree), tree)


@parameterized.expand(
    [
        ("an end one too far", lambda x: replace(x, ends=x.ends + 1)),
        ("an answer that ends with its sibling", lambda x: replace(x, ends=np.full_like(x.ends, len(x)))),
        ("positions that do not restart", lambda x: replace(x, positions=np.arange(len(x)))),
        ("answers predicted by themselves", lambda x: replace(x, predictors=x.predictors + 1)),
        ("targets of other answers", lambda x: replace(x, targets=np.roll(x.targets, 1))),
        ("answers swapped", lambda x: replace(x, answers=x.answers[::-1])),
        ("lengths swapped", lambda x: replace(x, answer_lengths=x.answer_lengths[::-1])),
        ("prompts not shared", lambda x: lay_out(Tree([1, 2, 3, 4, 5]))),
    ]
)
def test_check_layout_notices(_name: str, broken) -> None:
    check_layout(lay_out(PAIR), PAIR)
    with pytest.raises(AssertionError):
        check_layout(broken(lay_out(PAIR)), PAIR)


@parameterized.expand(
    [
        # name, tree, tokens, answer lengths
        ("prompt and answers of one token", Tree.of([1], [2], [3]), 3, [1, 1]),
        ("one answer", Tree.of([1, 2], [3, 4]), 4, [2]),
        ("equal answers", Tree.of([1, 2], [3, 4], [3, 4]), 4, [2, 2]),
        ("answers that begin alike", Tree.of([1, 2], [3, 4, 5], [3, 4, 6, 7]), 7, [3, 4]),
        ("an answer that begins another", Tree.of([1, 2], [3, 4], [3, 4, 5]), 5, [2, 3]),
        ("the longer answer first", Tree.of([1, 2], [3, 4, 5], [3, 4]), 5, [3, 2]),
        ("an ordinary sequence", Tree([1, 2, 3], answer=True), 3, [2]),
        ("nothing scored", Tree([1, 2, 3]), 3, []),
        ("nothing scored below", Tree([1, 2], [Tree([3], answer=False)]), 3, []),
        ("a scored prompt", Tree([1, 2], [Tree([3])], answer=True), 3, [1, 1]),
        (
            "a dialogue",
            Tree([1, 2], [Tree([3], [Tree([4], [Tree([5]), Tree([6])], answer=False)], answer=True)]),
            6,
            [1, 1, 1],
        ),
    ]
)
def test_layout_of(_name: str, tree: Tree, tokens: int, answer_lengths: list[int]) -> None:
    layout = lay_out(tree)
    check_layout(layout, tree)
    assert (len(layout), layout.answer_lengths) == (tokens, answer_lengths)


def test_answers_that_extend_one_another_nest_without_recursion() -> None:
    # Deeper than the interpreter's recursion limit.
    answers = [list(range(1, k + 2)) for k in range(2000)]
    layout = lay_out(Tree.of([0], *answers))
    assert layout.ids.tolist() == list(range(2001))
    assert (layout.ends == 2001).all()
    assert [len(path) for path in layout.answers] == list(range(2, 2002))


def test_deep_trees_need_no_recursion() -> None:
    tree = Tree([0], answer=True)
    for _ in range(2000):
        tree = Tree([0], [tree])
    assert len(lay_out(tree)) == 2001


def check_rows(rows: Rows, bins: list[list[Tree]], pad_id: int) -> None:
    """Rows against the layouts they are made of, through the row's own prefixes."""
    layouts = [lay_out(tree) for trees in bins for tree in trees]
    B, L = rows.input_ids.shape
    assert (len(bins), max(sum(len(lay_out(tree)) for tree in trees) for trees in bins)) == (B, L)
    predictors, prefixes = rows.predictors.tolist(), []
    for b, trees in enumerate(bins):
        ids, positions = rows.input_ids[b].numpy(), rows.position_ids[b].numpy()
        row = row_prefixes(ids, positions)
        prefixes += row
        mine = [
            (number, prefix)
            for number, tree in enumerate(trees)
            for _, prefix in row_prefixes(lay_out(tree).ids, lay_out(tree).positions)
        ]
        assert row[: len(mine)] == mine
        padding = slice(len(mine), L)
        assert (ids[padding] == pad_id).all() and (positions[padding] == 0).all()
        assert not set(range(b * L + len(mine), b * L + L)) & set(predictors)
        index = np.arange(L)
        by_ends = (index[None, :] <= index[:, None]) & (index[:, None] < rows.ends[b].numpy()[None, :])
        assert (by_ends == visible(row)).all()

    expected = [
        (sample, tuple(layout.ids[path]), length)
        for sample, layout in enumerate(layouts)
        for path, length in zip(layout.answers, layout.answer_lengths, strict=True)
    ]
    assert rows.sample_of_answer.tolist() == [sample for sample, _, _ in expected]
    assert rows.sequence_lengths == [len(sequence) for _, sequence, _ in expected]
    scored = []
    for tokens, (_, sequence, length) in zip(rows.answer_tokens.tolist(), expected, strict=True):
        assert tokens[length:] == [len(predictors)] * (len(tokens) - length)
        scored += tokens[:length]
        for at, token in enumerate(tokens[:length], start=len(sequence) - length):
            assert prefixes[predictors[token]][1] == sequence[:at]
            assert rows.targets[token] == sequence[at]
    assert scored == list(range(len(predictors)))
    assert rows.tokens == sum(map(len, layouts))
    assert rows.separate_tokens == sum(layout.separate_tokens for layout in layouts)
    assert rows.depth == max(len(sequence) for trees in bins for tree in trees for _, sequence, _ in runs(tree))
    assert rows.largest_ids == [int(layout.ids.max()) for layout in layouts]


def random_bins(seed: int) -> list[list[Tree]]:
    rng = np.random.default_rng(seed)
    return [[random_tree(rng, levels=3) for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(1, 4))]


def test_rows_hold_their_trees() -> None:
    for seed in range(200):
        bins = random_bins(seed)
        check_rows(build_rows(bins, pad_id=7), bins, pad_id=7)


@parameterized.expand(
    [
        ("predictors", lambda rows: rows.predictors + 1),
        ("targets", lambda rows: rows.targets.flip(0)),
        ("ends", lambda rows: rows.ends + 1),
        ("position_ids", lambda rows: torch.arange(rows.input_ids.shape[1]).expand_as(rows.input_ids)),
        ("input_ids", lambda rows: rows.input_ids.flip(0)),
        ("answer_tokens", lambda rows: rows.answer_tokens.flip(0)),
        ("sample_of_answer", lambda rows: rows.sample_of_answer.flip(0)),
    ]
)
def test_check_rows_notices(name: str, broken) -> None:
    bins = [[PAIR, Tree.of([1], [2])], [Tree.of([3, 4], [5, 6, 7])]]
    rows = build_rows(bins, pad_id=7)
    check_rows(rows, bins, pad_id=7)
    with pytest.raises((AssertionError, IndexError)):
        check_rows(replace(rows, **{name: broken(rows)}), bins, pad_id=7)


def assert_equal(a: Rows, b: Rows) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_layouts_and_trees_make_the_same_rows() -> None:
    bins = random_bins(1)
    number = itertools.count()
    assert_equal(build_rows([[lay_out(tree, next(number)) for tree in trees] for trees in bins]), build_rows(bins))


def test_rows_copy_without_their_masks() -> None:
    rows = build_rows([[PAIR]])
    rows.masks[None, None] = lambda: "a closure, which nothing can pickle"
    with pytest.raises(AssertionError, match=r"^masks\nassert False"):
        assert_equal(rows, build_rows([[PAIR]]))
    assert_equal(rows.to("cpu"), build_rows([[PAIR]]))
    assert_equal(pickle.loads(pickle.dumps(rows)), build_rows([[PAIR]]))
    assert rows.to("meta").ends.device.type == "meta"
    if torch.cuda.is_available():
        assert rows.pin_memory().ends.is_pinned()
        assert_equal(rows.pin_memory(), build_rows([[PAIR]]))


@parameterized.expand(
    [
        ("empty prompt", Tree.of([], [1]), "the prompt is empty"),
        ("empty answer", Tree.of([1], [2], []), "answer 1 is empty"),
        ("empty nested answer", Tree([1], [Tree([2]), Tree([3], [Tree([4]), Tree([])])]), "answer 1.1 is empty"),
        ("negative id", Tree.of([1], [2, -100]), "answer 0 holds the id -100"),
        ("floats", Tree.of([1.0, 2.0], [3]), "the prompt holds float64 values"),
        ("bools", Tree.of([1], [True, False]), "answer 0 holds bool values"),
        ("strings", Tree.of([1], ["a"]), "answer 0 holds <U1 values"),
        ("two dimensions", Tree.of([[1, 2]], [3]), r"the prompt must be a flat list .* shape \(1, 2\)"),
        ("no list", Tree.of([1], 2), r"answer 0 must be a flat list .* shape \(\)"),
        ("ragged lists", Tree.of([1], [[1], [2, 3]]), "answer 0 must be a flat list"),
        ("one scored token", Tree([1], answer=True), "a sequence of one token has no token to score"),
        ("a bool among ids", Tree.of([1, True], [2]), "the prompt holds bool values"),
        (
            "more than 63 bits",
            Tree.of(np.array([1, 2**63], np.uint64), [2]),
            "the prompt holds the id 9223372036854775808",
        ),
        ("more than 31 bits", Tree.of([1], [2**31]), "answer 0 holds the id 2147483648; .* at most 2147483647"),
        ("durations", Tree.of(np.array([1, 2], "m8[s]"), [2]), "the prompt holds timedelta64"),
        ("a tensor with a gradient", Tree.of(torch.ones(2, requires_grad=True), [2]), "the prompt must be a flat list"),
        ("a tensor without values", Tree.of(torch.ones(2, device="meta"), [2]), "the prompt must be a flat list"),
        ("ids for a child", Tree([1], [[2]]), "answer 0 is list; expected a flexpatch.Tree"),
        ("a tree for children", Tree([1], Tree([2])), "the prompt has Tree as children; expected a list of trees"),
        ("an answer that is no truth", Tree([1], [Tree([2], answer="no")]), "answer 0 has answer='no'"),
        ("a circle", CIRCLE, "answer 0 is a tree that continues itself: it would never end"),
    ]
)
def test_refuses(_name: str, tree: Tree, message: str) -> None:
    with pytest.raises(FlexpatchError, match=f"^sample 4: {message}"):
        lay_out(tree, 4)
    with pytest.raises(FlexpatchError, match=f"^sample 2: {message}"):
        build_rows([[PAIR, PAIR], [tree]])  # samples are numbered through all bins


@parameterized.expand([("no bins", []), ("an empty bin", [[PAIR], []])])
def test_refuses_empty_rows(_name: str, bins: list[list[Tree]]) -> None:
    with pytest.raises(FlexpatchError, match="every row needs at least one tree"):
        build_rows(bins)


def test_a_tree_may_continue_several() -> None:
    shared = Tree([5])
    assert len(lay_out(Tree([1], [Tree([2], [shared]), Tree([3], [shared]), shared])).answers) == 3


@parameterized.expand([(-1,), (1.5,), (None,), (2**31,)])
def test_refuses_padding_that_is_no_id(pad_id: object) -> None:
    with pytest.raises(FlexpatchError, match=f"pad_id={pad_id}; expected a token id"):
        build_rows([[PAIR]], pad_id)


@parameterized.expand([("trees", [PAIR, PAIR]), ("layouts", [lay_out(PAIR)])])
def test_refuses_trees_that_are_in_no_row(_name: str, trees: list[Tree]) -> None:
    with pytest.raises(FlexpatchError, match=r"a list of rows.*pass \[trees\]"):
        build_rows(trees)
