"""First-fit-decreasing bin packing, and the bins of an epoch.

Shapes: R ranks, G items of each rank in one step.
"""

import heapq
from collections.abc import Sequence
from operator import index

import numpy as np

from flexpatch.errors import FlexpatchError

# Limits how many short items may complement a long one: more short items even each other out without help.
MOST_COMPLEMENTS = 64


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by first-fit-decreasing (at most 11/9 of the fewest bins + 6/9, Dosa 2007).

    Items are taken longest first (ties: lowest index first). Each goes into the first bin that has room for it. A
    max-tree over the bins' free room finds that bin in O(log n).

    Args:
        lengths: Length of each item, for instance ``len(lay_out(tree))``, in tokens.
        capacity: Largest sum of lengths in a bin, in tokens.

    Returns:
        Item indices of each bin, in order of opening; deterministic.

    Raises:
        FlexpatchError: For an item that is longer than ``capacity`` or empty. The message names the item.
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
    """Convert lengths to Python's integers, which cannot overflow, or raise an error that names the item."""
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
    """Make the bins of one epoch, shuffled. Rank r of R takes bins r, r + R, r + 2R, ...

    The number of bins is the same in every epoch and a multiple of ``ranks``, so schedules are known ahead and no rank
    waits for another's last step. The R bins of one step hold equally many items, because trainers gather values of
    items over ranks, and nearly equally many tokens. Bins hold other samples in every epoch: lengths are rounded up a
    little (to a 64th of their mean, or a 512th of ``capacity`` if that is less), and samples of one rounded length
    trade places.

    Args:
        lengths: Length of each item, in tokens.
        capacity: Largest sum of lengths in a bin, in tokens.
        ranks: Processes that share the epoch.
        seed: Seed of all epochs.
        epoch: Number of the epoch.

    Returns:
        Item indices of each bin; deterministic. If ``ranks`` does not divide the number of items, up to ``ranks - 1``
        items are repeated, as in stock samplers.

    Raises:
        FlexpatchError: For an item that is longer than ``capacity`` or empty, ``ranks < 1``, or a negative seed or
            epoch.
    """
    if not (ranks >= 1 and seed >= 0 and epoch >= 0):
        raise FlexpatchError(f"ranks={ranks} must be at least 1, seed={seed} and epoch={epoch} at least 0")
    lengths = _checked(lengths, capacity)  # here, since pack would name an item by its shuffled index
    if not lengths:
        return []
    rng = np.random.default_rng([seed, epoch])
    sizes = np.array(lengths)
    step = max(1, min(capacity // 512, int(sizes.mean()) // 64))
    rounded = np.minimum(-(-sizes // step) * step, capacity)
    # Longest first, random among equals: bins depend on rounded lengths alone, so epochs differ in their items only.
    items = rng.permutation(len(sizes))
    items = items[np.argsort(-rounded[items], kind="stable")]
    items = np.concatenate([items, np.resize(items[::-1], -len(items) % ranks)])
    steps = []
    while (chosen_GR := _complemented(rounded[items], capacity, ranks)) is not None:
        steps.append(items[chosen_GR])
        items = np.delete(items, chosen_GR)
    # Neighbours in length go to different ranks. Each group is packed as one item, as long as its longest.
    groups = items.reshape(-1, ranks)
    packed = _pack_evenly(rounded[groups].max(1).tolist(), capacity)
    steps += [_deal(groups[some], sizes) for some in packed]
    return [some for i in rng.permutation(len(steps)) for some in rng.permutation(steps[i].T).tolist()]


def _complemented(lengths: np.ndarray, capacity: int, ranks: int) -> np.ndarray | None:
    """Fill a step with the R longest items, and complement each with shorter ones.

    Args:
        lengths: (n,) lengths, longest first.

    Returns:
        (G, R) indices into ``lengths``: G items of each rank. ``None`` if the R longest are nearly equal, so that
        neighbours in length balance ranks as well, or if no shorter items complement them.
    """
    slack = capacity // 50
    if len(lengths) == 0 or lengths[0] - lengths[ranks - 1] <= slack:
        return None
    room_R = capacity - lengths[:ranks]
    shorter = lengths[ranks:]
    if len(shorter) == 0:
        return None
    fewest = -(-(int(room_R.max()) - slack) // int(shorter[0]))
    most = min(MOST_COMPLEMENTS, int(room_R.min()) // int(shorter[-1]), len(shorter) // ranks)
    for count in range(max(1, fewest), most + 1):
        found_GR = _complements(shorter, room_R, count)
        if found_GR is not None and (room_R - shorter[found_GR].sum(0)).max() <= slack:
            return np.concatenate([np.arange(ranks)[None], found_GR + ranks])
    return None


def _complements(lengths: np.ndarray, room_R: np.ndarray, count: int) -> np.ndarray | None:
    """Fill each of R rooms with ``count`` items: in turn the longest item that fits an equal share of the room left.

    Returns:
        (count, R) distinct indices into ``lengths``, which is longest first; ``None`` if too few items are that short.
    """
    ascending, found = lengths[::-1], []
    left = np.ones(len(lengths), bool)
    ranks = np.arange(len(room_R))
    for shares in range(count, 0, -1):
        pool = np.flatnonzero(left)
        widest_first = np.argsort(-room_R, kind="stable")
        at = np.searchsorted(ascending[pool], room_R[widest_first] // shares, side="right") - 1
        at = np.minimum.accumulate(at + ranks) - ranks  # a taken item is replaced by the next shorter
        if at[-1] < 0:
            return None
        taken_R = np.empty_like(at)
        taken_R[widest_first] = pool[at]
        left[taken_R] = False
        room_R = room_R - ascending[taken_R]
        found.append(len(lengths) - 1 - taken_R)
    return np.array(found)


def _pack_evenly(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins as first-fit-decreasing needs, equally full if possible, longest items first.

    First-fit-decreasing leaves its last bins nearly empty, and the few items of such a bin cannot be balanced over
    ranks.
    """
    packed = pack(lengths, capacity)
    bins: list[list[int]] = [[] for _ in packed]
    fullness = [(0, b) for b in range(len(bins))]  # a heap
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        used, b = fullness[0]
        if used + lengths[item] > capacity:
            return packed
        heapq.heapreplace(fullness, (used + lengths[item], b))
        bins[b].append(item)
    return bins


def _deal(groups_GR: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Deal each group of R items to R ranks, the longest item to the rank with the fewest tokens so far."""
    ranks = groups_GR.shape[1]
    if ranks == 1:
        return groups_GR
    dealt_GR, tokens_R = np.empty_like(groups_GR), np.zeros(ranks, lengths.dtype)
    for g, items in enumerate(groups_GR):
        longest_first = items[np.argsort(-lengths[items], kind="stable")]
        emptiest_first = np.argsort(tokens_R, kind="stable")
        dealt_GR[g, emptiest_first] = longest_first
        tokens_R[emptiest_first] += lengths[longest_first]
    return dealt_GR
