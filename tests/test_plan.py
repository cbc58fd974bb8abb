"""The separate sequences of packed rows, against paths that are walked token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.forests import random_tree
from parameterized import parameterized
from torch import Tensor

from flexpatch import Rows, build_rows
from flexpatch.plan import WASTE, Plan, in_batches, plan_of, sequences_of

FORESTS = 1000


def random_rows(rng: np.random.Generator) -> Rows:
    """One to three rows of one to five trees, of which the shorter rows are padded."""
    levels, longest = int(rng.integers(1, 6)), int(rng.choice([1, 3, 12]))
    bins = [
        [random_tree(rng, levels=levels, longest_run=longest) for _ in range(rng.integers(1, 6))]
        for _ in range(rng.integers(1, 4))
    ]
    return build_rows(bins)


def paths(ends: Tensor) -> list[list[int]]:
    """Each token without children, with its ancestors: the tokens before it whose subtree holds it."""
    L = ends.shape[1]
    found = []
    for b, row in enumerate(ends.tolist()):
        ends_of = [max(end, token + 1) for token, end in enumerate(row)]
        for token in range(L):
            if ends_of[token] == token + 1:
                found.append([b * L + above for above in range(token) if ends_of[above] > token] + [b * L + token])
    return found


def check(plan: Plan, expected: list[list[int]], waste: float = WASTE) -> None:
    """All paths, each once, in batches within ``waste``; owners are the first of each token."""
    found = []
    for index in plan.batches:
        lengths = []
        for sequence in index.tolist():
            length = next(s + 1 for s in range(len(sequence)) if sequence[s:] == sequence[s:][:1] * len(sequence[s:]))
            found.append(sequence[:length])
            lengths.append(length)
        assert index.shape[1] == max(lengths)
        assert index.numel() <= waste * sum(lengths)
    assert sorted(found) == sorted(expected)
    flat = torch.cat([index.flatten() for index in plan.batches])
    tokens = torch.arange(plan.owners.numel())
    assert torch.equal(flat[plan.owners.flatten()], tokens)
    first = {token: place for place, token in reversed(list(enumerate(flat.tolist())))}
    assert plan.owners.flatten().tolist() == [first[token] for token in tokens.tolist()]


@parameterized.expand([(part,) for part in range(4)])
def test_random_forests(part: int) -> None:
    rng = np.random.default_rng(part)
    batches = []
    for _ in range(FORESTS // 4):
        rows = random_rows(rng)
        plan, expected = Plan(rows.ends), paths(rows.ends)
        check(plan, expected)
        check(plan.in_one_batch, expected, np.inf)
        assert len(plan.in_one_batch.batches) == 1
        assert plan.masks == [None] * len(plan.batches)
        batches.append(len(plan.batches))
    assert min(batches) == 1 and max(batches) > 3


def broken(plan: Plan, what: str) -> Plan:
    """A plan with one fault."""
    plan = Plan(torch.from_numpy(plan._ends))
    if what == "owner":  # of another token
        plan.owners = plan.owners.roll(1, -1)
    elif what == "later owner":  # of the right token, but not its first place
        flat = torch.cat([index.flatten() for index in plan.batches])
        last = {token: place for place, token in enumerate(flat.tolist())}
        plan.owners = torch.tensor([last[token] for token in range(len(last))]).view(plan.shape)
    elif what == "sequence":  # left out
        plan.batches = [index[1:] if len(index) > 1 else index for index in plan.batches]
    elif what == "ancestor":  # of another tree
        plan.batches = [torch.where(index == 0, index.max(), index) for index in plan.batches]
    else:  # padded too far
        plan.batches = [torch.nn.functional.pad(index, (0, 9), "replicate") for index in plan.batches]
    return plan


@parameterized.expand([("owner",), ("later owner",), ("sequence",), ("ancestor",), ("padding",)])
def test_the_walk_sees_faults(what: str) -> None:
    rows = random_rows(np.random.default_rng(1))
    with pytest.raises((AssertionError, KeyError)):
        check(broken(Plan(rows.ends), what), paths(rows.ends))


def test_padding_in_front_of_sequences_is_a_path_that_mixers_mask() -> None:
    """Folding marks it by ends that leave a token itself out."""
    ends = torch.tensor([[3, 3, 3, 3, 6, 6, 6]], dtype=torch.int32)
    plan = Plan(ends)
    check(plan, paths(ends), 10)
    for index, mask in zip(plan.batches, plan.masks, strict=True):
        assert torch.equal(mask, (index != 3) & (index != 6))


def test_rows_share_one_plan() -> None:
    """Policy and reference; a change of the ends makes another."""
    rows = random_rows(np.random.default_rng(0))
    plan = plan_of(rows)
    assert plan_of(rows) is plan and plan.in_one_batch is plan.in_one_batch
    assert plan_of(replace(rows)) is not plan
    rows.ends[:, -1] -= 1
    assert plan_of(rows) is not plan


def test_batches() -> None:
    """The longest first; a sequence that would be too much padding begins another batch."""
    sequences = [np.arange(n) for n in (4, 100, 95, 4, 3)]
    assert [batch.shape for batch in in_batches(sequences)] == [(2, 100), (3, 4)]
    assert [batch.shape for batch in in_batches(sequences, np.inf)] == [(5, 100)]
    assert sequences_of(np.array([[1]])) == [np.array([0])]
