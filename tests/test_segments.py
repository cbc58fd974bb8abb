"""Segments of packed rows, against brute force on random forests."""

import unittest
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from helpers.forests import random_rows
from parameterized import parameterized

from flexpatch import Rows, Tree, build_rows
from flexpatch.plan import plan_of
from flexpatch.segments import SHORT, WASTE, Schedule, Segments

FORESTS = 200


def segments_of(rows: Rows, tokens: int | None = None) -> Segments:
    return Segments(rows.ends.numpy().astype(np.int64), tokens)


def groups_of(schedule: Schedule, varlen: bool) -> Iterator[tuple[int, Any, list[list[int]]]]:
    """Each group with its level and the tokens of its segments."""
    slots = iter(np.split(schedule.index.array, np.cumsum(schedule.sizes)[:-1]))
    for level, groups in enumerate(schedule.levels):
        for group in groups:
            own = next(slots)
            starts = group.bounds.array[:-1] if varlen else np.arange(len(group.lengths)) * group.shape[1]
            yield level, group, [own[s : s + n].tolist() for s, n in zip(starts, group.lengths, strict=True)]


class TestSegments(unittest.TestCase):
    def test_a_tree_by_hand(self) -> None:
        """A prompt of 3 tokens, one answer of 2, and a turn of 1 with two answers of 2 and 1."""
        tree = Tree([5, 6, 7], [Tree([8, 9]), Tree([10], [Tree([11, 12]), Tree([13])], answer=False)])
        segments = segments_of(build_rows([[tree]]))
        assert segments.starts.tolist() == [0, 3, 5, 6, 8]
        assert segments.lengths.tolist() == [3, 2, 1, 2, 1]
        assert segments.parents.tolist() == [-1, 0, 0, 2, 2]
        assert segments.levels.tolist() == [0, 1, 1, 2, 2]
        assert segments.previous.tolist() == [-1, 0, 1, 2, 3, 2, 5, 6, 5]

    def test_tokens_before_and_windows_are_those_of_each_sequence(self) -> None:
        for seed in range(FORESTS):
            rows, paths, real = random_rows(seed)
            segments = segments_of(rows, rows.tokens)
            tokens, ancestors = (index.array for index in segments.windows(4))
            windows = dict(zip(tokens.tolist(), ancestors.tolist(), strict=True))
            for token, path in enumerate(paths):
                if real[token]:
                    before, own = ([-1, *path][-2], ([-1] * 3 + path)[-4:])
                    assert segments.previous[token] == before, (seed, token)
                    assert windows.get(token, list(range(token - 3, token + 1))) == own, (seed, token)

    @parameterized.expand([("varlen",), ("bucketed",)])
    def test_every_token_runs_once_and_after_its_parent(self, name: str) -> None:
        for seed in range(FORESTS):
            rows, _, _ = random_rows(seed)
            segments = segments_of(rows, rows.tokens)
            schedule: Schedule = getattr(segments, name)
            assert (schedule.index.array[schedule.back.array] == np.arange(rows.ends.numel())).all()
            seen: list[int] = []
            kept: dict[int, list[int]] = {}  # of each level, the last tokens of segments whose states are kept
            for level, group, tokens in groups_of(schedule, name == "varlen"):
                for run in tokens:
                    assert segments.previous[run[1:]].tolist() == run[:-1], "a segment is a run"
                firsts = segments.previous[[run[0] for run in tokens]].tolist()
                starts = [-1] * len(tokens)
                if group.parents is not None:
                    starts = [kept[level - 1][parent] for parent in group.parents.array]
                assert firsts == starts, seed
                if group.keeps:
                    kept.setdefault(level, []).extend(run[-1] for run in tokens)
                seen += [token for run in tokens for token in run]
            assert sorted(seen) == list(range(rows.ends.numel()))

    def test_two_calls_a_level_or_little_padding(self) -> None:
        for seed in range(FORESTS):
            rows, _, _ = random_rows(seed, longest_run=150)
            segments = segments_of(rows, rows.tokens)
            assert all(len(level) <= 2 for level in segments.varlen.levels)
            assert segments.varlen.index.array.size == rows.ends.numel(), "varlen has no padding"
            for groups in segments.bucketed.levels:
                for group in groups:
                    assert group.shape[1] <= SHORT or np.prod(group.shape) <= WASTE * group.lengths.sum()

    def test_padding_of_a_row_is_one_segment(self) -> None:
        rows = build_rows([[Tree.of([3, 4], [5], [6, 7])], [Tree.of(list(range(3, 80)), [5], [6])]])
        single, merged = segments_of(rows), segments_of(rows, rows.tokens)
        assert len(single.starts) == 6 + rows.ends.numel() - rows.tokens
        assert len(merged.starts) == 6 + 1

    def test_real_trees_of_one_token_stay_alone_before_padding(self) -> None:
        one = Tree([3])
        rows = build_rows([[Tree.of([3, 4], [5], [6, 7]), one, one], [Tree.of(list(range(3, 30)), [5], [6])]])
        segments = segments_of(rows, rows.tokens)
        spans = dict(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True))
        assert spans[5] == spans[6] == 1
        assert len(spans) == 3 + 2 + 1 + 3, "the padding behind them is merged"

    def test_they_are_made_once_for_policy_and_reference(self) -> None:
        rows, _, _ = random_rows(0)
        segments = plan_of(rows).segments
        assert plan_of(rows).segments is segments
        rows.ends.copy_(torch.arange(1, rows.ends.shape[1] + 1).expand_as(rows.ends))
        assert plan_of(rows).segments is not segments, "its tokens have other ends now"
