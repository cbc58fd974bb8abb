"""First-fit-decreasing bin packing."""

from collections.abc import Sequence

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
