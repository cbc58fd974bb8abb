"""Choose what checkpointed layers keep of a forward, by the bytes that each way of keeping takes.

Between all activations and none, a layer may keep the outputs of its matrix products and attention, or of attention
alone (:mod:`flexpatch.selective`). Sizes are in bytes.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from flexpatch.segments import Load

# From the least that is kept.
WAYS = ("attention", "products", "everything")


class Choice(NamedTuple):
    """Layers of a call by what they keep.

    Attributes:
        everything: Layers that keep all their activations.
        products: Layers that keep those of matrix products and attention.
        attention: Layers that keep that of attention. All others keep their inputs alone.
    """

    everything: Sequence[nn.Module] = ()
    products: Sequence[nn.Module] = ()
    attention: Sequence[nn.Module] = ()


class Sizes:
    """Bytes that layers keep for one token, beyond those of a layer that is recomputed: by way, and by kind of layer.

    Attributes:
        of: By way.
        load: The lightest of the rows that were measured.
    """

    def __init__(self, load: Load) -> None:
        self.of: dict[str, dict[str, float]] = {way: {} for way in WAYS}
        self.load = load

    def note(self, way: str, kind: str, size: float, load: Load) -> None:
        """Take a measurement.

        Args:
            way, kind: How one layer kept how much, and its kind.
            size: Bytes a token.
            load: Of the row.
        """
        self.load = Load(*map(min, self.load, load)) if any(self.of.values()) else load
        self.of[way][kind] = size

    def of_layers(self, way: str, kinds: Sequence[str], usable: Sequence[bool]) -> list[float]:
        """List the bytes a token of layers.

        Args:
            way: How they would keep.
            kinds: Of all layers. The largest size stands for kinds that came later, such as layers with new adapters.
            usable: Whether each can keep this way.

        Returns:
            Sizes; 0 for layers that cannot, and for all if none was measured.
        """
        known = self.of[way]
        largest = max(known.values(), default=0.0)
        return [known.get(kind, largest) if able else 0.0 for kind, able in zip(kinds, usable, strict=True)]

    def weight(self, load: Load) -> float:
        """Tell how many times more than the rows that were measured a row's token may keep, at most."""
        more = (now / then if then else math.inf for now, then in zip(load, self.load, strict=True) if now > then)
        return max([1.0, *more])


def mixture(sizes: Sequence[Sequence[float]], room: float) -> list[int]:
    """Choose what layers keep, so that as little as possible is computed again.

    A byte of attention saves at least as much time as one of other products, and far more in long rows; a byte of
    products saves more than one of the rest. So all layers keep one before any of them keeps the next.

    Args:
        sizes: By way, from the least kept, the bytes of each layer beyond one that keeps nothing; 0 where it cannot.
        room: Bytes that may be kept.

    Returns:
        How many layers, from the last, keep at least so much, by way.
    """
    counts: list[int] = []
    spent, held = 0.0, [0.0] * len(sizes[0])
    for way in sizes:
        more = (max(0.0, a - b) for a, b in zip(reversed(way), reversed(held), strict=True))
        needs = list(accumulate(more, initial=spent))
        counts.append(max(0, sum(need <= room for need in needs) - 1))
        if counts[-1] < len(way):
            break
        spent, held = needs[-1], list(map(max, way, held))
    return counts + [0] * (len(sizes) - len(counts))


def choose(layers: Sequence[nn.Module], usable: Mapping[str, Collection[int]], counts: Sequence[int]) -> Choice:
    """Name the layers of a mixture.

    Args:
        layers: All layers.
        usable: By way, the places of layers that can keep so.
        counts: As :func:`mixture` returns them.

    Returns:
        Each layer where it keeps most.
    """
    found: dict[str, list[nn.Module]] = {way: [] for way in WAYS}
    for i, layer in enumerate(layers):
        ways = [way for way, count in zip(WAYS, counts, strict=True) if i >= len(layers) - count and i in usable[way]]
        if ways:
            found[ways[-1]].append(layer)
    return Choice(**found)


def moved(choice: Choice, layer: nn.Module, way: str) -> Choice:
    """Let a layer keep in another way.

    Args:
        choice: Of all layers.
        layer: The layer.
        way: One of ``WAYS``.

    Returns:
        The changed choice.
    """
    others = ([other for other in some if other is not layer] for some in choice)
    return Choice(*(some + [layer] * (name == way) for name, some in zip(reversed(WAYS), others, strict=True)))
