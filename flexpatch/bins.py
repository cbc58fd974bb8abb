"""Bins of a preference dataset for trainers: lengths of its items, a sampler of bins, and a dataset that it indexes.

An **item** is one or more dataset rows that share a prompt. A bin holds items up to a budget of shared tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from flexpatch.packing import epoch_bins


def _read(dataset: Any, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Read some columns of a dataset, row by row."""
    columns = dataset.select_columns(names)
    for batch in tqdm(columns.iter(1000), "lengths", -(-len(columns) // 1000), disable=None):
        yield from zip(*(batch[name] for name in names), strict=True)


def pair_lengths(dataset: Any, max_length: int | None, truncation_mode: str = "keep_start") -> list[int]:
    """Count the tokens of each tokenised pair in a shared row.

    Args:
        dataset: Dataset with the columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        max_length: Longest prompt + answer, in tokens. DPOTrainer cuts longer ones. ``None`` for no limit.
        truncation_mode: ``"keep_start"`` if DPOTrainer cuts the end, ``"keep_end"`` if it cuts the start, after which
            the two sequences of a pair share no prefix.

    Returns:
        Tokens of each pair, its prompt counted once.
    """
    lengths = np.array([list(map(len, row)) for row in _read(dataset, ["prompt_ids", "chosen_ids", "rejected_ids"])])
    prompt = lengths[:, 0]
    chosen, rejected = prompt + lengths[:, 1], prompt + lengths[:, 2]
    if max_length is not None:
        if truncation_mode == "keep_end":
            prompt = np.where(np.maximum(chosen, rejected) > max_length, 0, prompt)
        prompt, chosen, rejected = (np.minimum(x, max_length) for x in (prompt, chosen, rejected))
    return (chosen + rejected - prompt).tolist()


def sequence_lengths(dataset: Any) -> list[int]:
    """Count the tokens of each pair of whole sequences, as RewardTrainer makes them, in a shared row.

    Args:
        dataset: Dataset with the columns ``chosen_ids`` and ``rejected_ids``, prompts included.

    Returns:
        Tokens of each pair, the common beginning counted once.
    """
    return [
        len(chosen) + len(rejected) - _shared(chosen, rejected)
        for chosen, rejected in _read(dataset, ["chosen_ids", "rejected_ids"])
    ]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:shorter]) != np.asarray(b[:shorter]))
    return int(differ[0]) if len(differ) else shorter


def prompt_groups(dataset: Any, max_length: int | None, token_budget: int) -> tuple[list[list[int]], list[int]]:
    """Group single completions by their prompts.

    Args:
        dataset: Dataset with the columns ``prompt_ids`` and ``completion_ids``.
        max_length: Longest prompt + completion, in tokens. KTOTrainer cuts the end of longer ones, of its completion
            under another prompt too: a completion counts in full. ``None`` for no limit.
        token_budget: Most tokens of a group. A prompt with more completions makes several groups.

    Returns:
        Row numbers of each group, and its tokens with the prompt counted once.
    """

    def cut(ids: Sequence[int]) -> int:
        return min(len(ids), max_length or len(ids))

    read = _read(dataset, ["prompt_ids", "completion_ids"])
    rows = ((np.asarray(prompt, np.int64).tobytes(), cut(prompt), cut(completion)) for prompt, completion in read)
    return group_by_prompt(rows, token_budget)


def group_by_prompt(rows: Iterable[tuple[bytes, int, int]], token_budget: int) -> tuple[list[list[int]], list[int]]:
    """Group rows by their prompts.

    Args:
        rows: Of each, a key that is its prompt's alone, and the tokens of prompt and completion.
        token_budget: Most tokens of a group.

    Returns:
        As :func:`prompt_groups`.
    """
    groups: list[list[int]] = []
    lengths: list[int] = []
    latest: dict[bytes, int] = {}
    for row, (key, prompt_tokens, tokens) in enumerate(rows):
        group = latest.get(key)
        if group is None or lengths[group] + tokens > token_budget:
            latest[key] = len(groups)
            groups.append([row])
            lengths.append(prompt_tokens + tokens)
        else:
            groups[group].append(row)
            lengths[group] += tokens
    return groups, lengths


class BinSampler(Sampler[list[int]]):
    """Sampler of the bins of an epoch, of all ranks. Accelerate deals bins to ranks in turn, and calls ``set_epoch``.

    Args:
        lengths: Length of each item, in tokens.
        token_budget: Most tokens of a bin.
        ranks: Processes that share the epoch.
        seed: Seed of all epochs.

    Raises:
        FlexpatchError: For an item that is longer than ``token_budget``.
    """

    def __init__(self, lengths: list[int], token_budget: int, ranks: int, seed: int) -> None:
        self.settings: dict[str, Any] = dict(lengths=lengths, capacity=token_budget, ranks=ranks, seed=seed)
        self.epoch = 0
        self.bins = epoch_bins(**self.settings)

    def set_epoch(self, epoch: int) -> None:
        """Make the bins of epoch number ``epoch``."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.bins = epoch_bins(**self.settings, epoch=epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.bins)

    def __len__(self) -> int:
        return len(self.bins)


class BinDataset(Dataset):
    """Dataset of bins, each indexed by the list of its items.

    Args:
        dataset: Dataset of rows.
        bins: Sampler of the bins.
        groups: Row numbers of each item; ``None`` if each row is an item.
    """

    def __init__(self, dataset: Any, bins: BinSampler, groups: list[list[int]] | None = None) -> None:
        self.dataset = dataset
        self.bins = bins
        self.groups = groups

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler.

        Accelerate looks for ``set_epoch`` on the sampler. It does not find the sampler after it has split batches among
        ranks and skipped the first batches of a resumed epoch, and calls the dataset's method instead.
        """
        self.bins.set_epoch(epoch)

    def __getitem__(self, items: list[int]) -> list[Any]:
        return [self.dataset[row] for row in self.rows(items)]

    def rows(self, items: list[int]) -> list[int]:
        """Return the rows of items: the first row of each, then the second of each, and so on.

        Neighbours so have different prompts, which KTO's estimate of the KL divergence wants.
        """
        if self.groups is None:
            return items
        turns = zip_longest(*(self.groups[item] for item in items))
        return [row for turn in turns for row in turn if row is not None]
