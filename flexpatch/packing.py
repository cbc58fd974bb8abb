"""First-fit-decreasing bin packing, and the bins of an epoch."""

from collections.abc import Sequence

import numpy as np

from flexpatch.errors import FlexpatchError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins as first-fit-decreasing needs (at most 11/9 of the optimum + 6/9, Dosa 2007).

    Items are taken longest first (ties: lowest index first) and each goes into the first bin it fits in. A max-tree
    over the bins' free room finds that bin in O(log n).

    Args:
        lengths: Length of each item, e.g. ``len(lay_out(tree))`` in tokens.
        capacity: Largest sum of lengths in a bin.

    Returns:
        Item indices of each bin, in order of opening; deterministic.

    Raises:
        FlexpatchError: For an item longer than ``capacity``, naming it.
    """
    for item, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise FlexpatchError(f"sample {item} has {length} tokens, outside 1 to {capacity} (the budget of one row)")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # room[1] is the root; node i has children 2i and 2i + 1
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < lengths[item]:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def epoch_bins(
    lengths: Sequence[int],
    capacity: int,
    *,
    costs: Sequence[float] | None = None,
    ranks: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> list[list[int]]:
    """The bins of one epoch, shuffled: rank r of R takes bins r, r + R, r + 2R, ...

    Their number is the same in every epoch and a multiple of ``ranks``, so schedules are known ahead and no rank waits
    for another's last step. Which samples share a bin changes from epoch to epoch: lengths are rounded up to a 512th of
    ``capacity``, and samples of one rounded length trade places. The ``ranks`` bins of a step have neighbouring costs.

    Args:
        lengths: As in :func:`pack`.
        capacity: As in :func:`pack`.
        costs: Cost of each item in any unit, to balance the ranks; ``None``: its length.
        ranks: Processes that share the epoch.
        seed: Of all epochs.
        epoch: Number of the epoch.

    Returns:
        Item indices of each bin; deterministic. If no bin is left to split, the last ones repeat items to fill a step.

    Raises:
        FlexpatchError: As in :func:`pack`.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    step = max(1, capacity // 512)
    for item, length in enumerate(lengths):  # pack would name a shuffled item
        if not 0 < length <= capacity:
            raise FlexpatchError(f"sample {item} has {length} tokens, outside 1 to {capacity} (the budget of one row)")
    rounded = [min(-(-lengths[item] // step) * step, capacity) for item in order]
    bins = [[int(order[i]) for i in items] for items in pack(rounded, capacity)]
    while len(bins) % ranks:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]))
        bins.append(bins[largest][1::2] or bins[largest])
        if len(bins[largest]) > 1:
            bins[largest] = bins[largest][::2]
    cost = [sum((costs or lengths)[item] for item in items) for items in bins]
    ranked = sorted(range(len(bins)), key=lambda b: -cost[b])
    steps = [ranked[i : i + ranks] for i in range(0, len(bins), ranks)]
    return [bins[b] for i in rng.permutation(len(steps)) for b in steps[i]]
