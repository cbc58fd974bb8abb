"""First-fit-decreasing against the textbook loop, bin for bin."""

import time
from typing import Any

import numpy as np
import pytest
from parameterized import parameterized

from flexpatch import FlexpatchError, pack
from flexpatch.packing import epoch_bins


def fit(lengths: list[int], capacity: int, *, decreasing: bool = True, best: bool = False) -> list[list[int]]:
    """First-fit, or best-fit: each item into the first, or the fullest, bin that has room for it."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]) if decreasing else range(len(lengths)):
        room = [capacity - sum(lengths[i] for i in bin) for bin in bins]
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        if not fitting:
            bins.append([item])
        else:
            bins[min(fitting, key=room.__getitem__) if best else fitting[0]].append(item)
    return bins


def random_lengths(rng: np.random.Generator) -> tuple[list[int], int]:
    capacity = int(rng.integers(1, 60))
    # Few distinct lengths give ties and bins filled to the last token.
    longest = int(rng.integers(1, capacity + 1))
    return rng.integers(1, longest + 1, rng.integers(0, 80)).tolist(), capacity


def test_bins_are_those_of_the_textbook() -> None:
    exactly_full = 0
    for seed in range(1000):
        lengths, capacity = random_lengths(np.random.default_rng(seed))
        bins = pack(lengths, capacity)
        assert bins == fit(lengths, capacity)
        assert sorted(item for bin in bins for item in bin) == list(range(len(lengths)))
        exactly_full += sum(sum(lengths[i] for i in bin) == capacity for bin in bins)
    assert exactly_full > 1000


def test_other_rules_give_other_bins() -> None:
    lengths = [2, 5, 4, 7, 1, 3, 8]
    assert pack(lengths, 10) == [[6, 0], [3, 5], [1, 2, 4]]
    assert len(fit(lengths, 10, decreasing=False)) == 4  # first-fit in the given order
    lengths = [7, 4, 4, 2]
    assert pack(lengths, 10) == [[0, 3], [1, 2]]
    assert fit(lengths, 10, best=True) == [[0], [1, 2, 3]]  # best-fit


@parameterized.expand(
    [
        ("nothing", [], 8, []),
        ("one", [8], 8, [[0]]),
        ("capacity met", [3, 5, 4, 4], 8, [[1, 0], [2, 3]]),
        ("one token too many", [4, 5], 8, [[1], [0]]),
        ("ties keep their order", [2, 2, 2, 2], 4, [[0, 1], [2, 3]]),
    ]
)
def test_pack(_name: str, lengths: list[int], capacity: int, bins: list[list[int]]) -> None:
    assert pack(lengths, capacity) == bins


@parameterized.expand([("too long", [3, 9], 9), ("nothing in it", [3, 0], 0), ("negative", [3, -1], -1)])
def test_refuses(_name: str, lengths: list[int], length: int) -> None:
    with pytest.raises(FlexpatchError, match=f"^sample 1 has {length} tokens, outside 1 to 8"):
        pack(lengths, 8)


def test_large_datasets_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 8193, 50_000).tolist()
    start = time.process_time()
    bins = pack(lengths, 8192)
    assert time.process_time() - start < 5
    assert len(bins) <= 1.02 * sum(lengths) / 8192


def waiting(costs_SR: np.ndarray) -> float:
    """Mean over steps of the share by which the costliest rank exceeds the mean."""
    return float((costs_SR.max(1) / costs_SR.mean(1) - 1).mean())


class TestEpochBins:
    def lengths(self, n: int = 500) -> list[int]:
        return np.random.default_rng(0).integers(20, 900, n).tolist()

    def test_every_item_once_within_the_budget(self) -> None:
        lengths = self.lengths()
        for ranks in (1, 2, 3, 8, 64):
            bins = epoch_bins(lengths, 2048, ranks=ranks)
            items = sorted(item for some in bins for item in some)
            assert sorted(set(items)) == list(range(500))
            assert len(items) == -(-500 // ranks) * ranks, "only what fills the last step occurs twice"
            assert all(sum(lengths[item] for item in some) <= 2048 for some in bins)
            assert len(bins) % ranks == 0
            assert len(bins) <= 1.1 * sum(lengths) / 2048 + ranks

    def test_ranks_of_a_step_hold_equally_many(self) -> None:
        for lengths, capacity in ((self.lengths(), 2048), (self.lengths(41), 900), ([5] * 7, 10)):
            for ranks in (2, 3, 8):
                counts = [len(some) for some in epoch_bins(lengths, capacity, ranks=ranks)]
                assert all(len(set(counts[i : i + ranks])) == 1 for i in range(0, len(counts), ranks))

    def test_epochs_differ_in_all_but_their_number(self) -> None:
        lengths = self.lengths()
        epochs = [epoch_bins(lengths, 2048, ranks=4, seed=1, epoch=epoch) for epoch in range(5)]
        assert len({len(bins) for bins in epochs}) == 1
        shared = [{frozenset(items) for items in bins} for bins in epochs]
        assert all(len(shared[0] & other) < len(shared[0]) / 2 for other in shared[1:])
        assert epochs[2] == epoch_bins(lengths, 2048, ranks=4, seed=1, epoch=2)
        assert epochs[2] != epoch_bins(lengths, 2048, ranks=4, seed=2, epoch=2)

    def test_steps_come_in_no_order(self) -> None:
        counts = [len(some) for some in epoch_bins(self.lengths(2000), 2048, ranks=4)]
        assert counts != sorted(counts)

    @parameterized.expand([(ranks, capacity) for ranks in (8, 512) for capacity in (8192, 32768)])
    def test_ranks_wait_for_each_other_less_than_a_twentieth(self, ranks: int, capacity: int) -> None:
        """Share of a step that its ranks wait, in FLOPs of a 7B model's layers; of lengths with a heavy tail."""
        lengths = np.random.default_rng(0).lognormal(6, 0.9, 60_000).clip(16, 8000).astype(int)
        costs = 6 * 218e6 * lengths + 6 * 4096 * lengths.astype(float) ** 2
        start = time.process_time()
        bins = epoch_bins(lengths.tolist(), capacity, ranks=ranks)
        assert time.process_time() - start < 5
        steps = len(bins) // ranks
        waits = waiting(np.array([costs[some].sum() for some in bins]).reshape(steps, ranks))
        each = len(lengths) // len(bins)  # control: as many items to every rank, drawn at random
        drawn = np.random.default_rng(0).permutation(costs)[: steps * ranks * each]
        assert waits < 0.05 < waiting(drawn.reshape(steps, ranks, each).sum(2))
        assert steps <= len(pack(lengths.tolist(), capacity)) * 1.01 / ranks + 1

    def test_ranks_with_a_long_item_get_shorter_ones_with_it(self) -> None:
        """Four items from 500 to 950 tokens, which neighbours in length could not even out within 1,000."""
        lengths = [950, 800, 650, 500, *range(10, 250, 4)]
        bins = epoch_bins(lengths, 1000, ranks=4)
        first = next(step for step in np.arange(len(bins)).reshape(-1, 4) if any(0 in bins[b] for b in step))
        tokens = [sum(lengths[item] for item in bins[b]) for b in first]
        assert {item for b in first for item in bins[b] if item < 4} == {0, 1, 2, 3}
        assert 980 <= min(tokens) <= max(tokens) <= 1000

    def test_steps_are_equally_full_where_that_can_be_had(self) -> None:
        lengths = self.lengths(2000)
        tokens = [sum(lengths[item] for item in some) for some in epoch_bins(lengths, 8192, ranks=8)]
        assert min(tokens) > 0.95 * max(tokens)
        lengths = [6, 6, 6, 4, 4, 4, 4, 4]  # 6 + 4 three times and 4 + 4; spread evenly, the last 4 would not fit
        tokens = sorted(sum(lengths[item] for item in some) for some in epoch_bins(lengths, 10))
        assert tokens == [8, 10, 10, 10]

    def test_bins_that_cannot_be_split_repeat(self) -> None:
        for ranks in (2, 4):
            bins = epoch_bins([5, 5, 5], 5, ranks=ranks)
            assert len(bins) == 4 and {item for some in bins for item in some} == {0, 1, 2}

    def test_too_long_items_keep_their_name(self) -> None:
        with pytest.raises(FlexpatchError, match="sample 2 has 11 tokens, outside 1 to 10"):
            epoch_bins([1, 2, 11, 3], 10)

    def test_refuses_settings(self) -> None:
        for settings in (dict(ranks=0), dict(seed=-1), dict(epoch=-1)):
            with pytest.raises(FlexpatchError, match=r"ranks=.* at least 1, seed=.* at least 0"):
                epoch_bins([1, 2], 10, **settings)


def test_small_integers_do_not_overflow() -> None:
    assert pack(np.array([100, 100], np.int8), 16384) == [[0, 1]]


@parameterized.expand([
    ([1, 1.5], 8, "sample 1's length is 1.5"), ([1, "2"], 8, "sample 1's length is '2'"), ([1], 8.0, "capacity is 8.0"),
    (np.array([1, 1], "m8[s]"), 8, "sample 0's length is"),
])  # fmt: skip
def test_refuses_what_is_no_number_of_tokens(lengths: Any, capacity: Any, name: str) -> None:
    with pytest.raises(FlexpatchError, match=f"^{name}.*; expected a number of tokens"):
        pack(lengths, capacity)
