"""First-fit-decreasing bin packing, and the bins of an epoch."""

from collections.abc import Sequence
from operator import index

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
        FlexpatchError: For an item longer than ``capacity``, or of no length, naming it.
    """
    lengths, capacity = _checked(lengths, capacity), int(capacity)
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


def _checked(lengths: Sequence[int], capacity: int) -> list[int]:
    """``lengths`` as Python's integers, which cannot overflow, or the reason why not."""
    whole = []
    for item, length in [("capacity", capacity), *enumerate(lengths)]:
        try:
            whole.append(index(length))
        except TypeError as error:
            name = item if item == "capacity" else f"sample {item}'s length"
            raise FlexpatchError(f"{name} is {length!r:.40}; expected a number of tokens") from error
        if item != "capacity" and not 0 < whole[-1] <= whole[0]:
            raise FlexpatchError(f"sample {item} has {length} tokens, outside 1 to {capacity} (the budget of one row)")
    return whole[1:]


def epoch_bins(
    lengths: Sequence[int], capacity: int, *, ranks: int = 1, seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    """The bins of one epoch, shuffled: rank r of R takes bins r, r + R, r + 2R, ...

    Their number is the same in every epoch and a multiple of ``ranks``, so schedules are known ahead and no rank waits
    for another's last step. The R bins that are run together hold equally many items, because trainers gather values of
    items over ranks, and have neighbouring costs. Which samples share a bin changes from epoch to epoch: lengths are
    rounded up to a 512th of ``capacity``, and samples of one rounded length trade places.

    Args:
        lengths: As in :func:`pack`.
        capacity: As in :func:`pack`.
        ranks: Processes that share the epoch.
        seed: Of all epochs.
        epoch: Number of the epoch.

    Returns:
        Item indices of each bin; deterministic. If ``ranks`` does not divide the number of items, up to ``ranks - 1``
        of them are repeated, as in stock samplers.

    Raises:
        FlexpatchError: As in :func:`pack`; for ``ranks < 1``, or a negative seed or epoch.
    """
    if not (ranks >= 1 and seed >= 0 and epoch >= 0):
        raise FlexpatchError(f"ranks={ranks} must be at least 1, seed={seed} and epoch={epoch} at least 0")
    lengths = _checked(lengths, capacity)  # pack would name a shuffled item
    rng = np.random.default_rng([seed, epoch])
    step = max(1, capacity // 512)
    rounded = [min(-(-length // step) * step, capacity) for length in lengths]
    # Longest first, random among equals: what follows depends on rounded lengths alone, so epochs differ in items only.
    items = sorted(rng.permutation(len(lengths)).tolist(), key=lambda item: -rounded[item])
    missing = -len(items) % ranks
    items += (items * ranks)[::-1][:missing]
    # Neighbours in length go to different ranks, and are packed as if they were one item, as long as the longest.
    groups = [items[at : at + ranks] for at in range(0, len(items), ranks)]
    steps = pack([max(rounded[item] for item in group) for group in groups], capacity)
    bins: list[list[int]] = []
    for i in rng.permutation(len(steps)):
        dealt = [rng.permutation(groups[number]).tolist() for number in steps[i]]
        bins += [list(some) for some in zip(*dealt, strict=True)]
    return bins
