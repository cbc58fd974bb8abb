"""Count the tokens that folding left out, batch by batch, and add them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# A row is worth folding a batch for if it costs at most this share of it.
WORTH = 0.9


@dataclass(frozen=True)
class Counts:
    """Tokens of one batch.

    Attributes:
        padded: Tokens of the batch as it was given: N sequences times S columns.
        real: Tokens with an output that may be read.
        computed: Tokens that the model computed.
        reason: Why the batch ran as it was given, as the end of a sentence; ``None`` where it was folded.
        images: Images of the batch; in batches that were folded alone.
        images_run: Images that the model looked at.
    """

    padded: int
    real: int
    computed: int
    reason: str | None = None
    images: int = 0
    images_run: int = 0

    def padding(self) -> int:
        """Return the padding tokens that folding left out. One of them stays, for all padding to point to."""
        return self.padded - self.real

    def shared(self) -> int:
        """Return the tokens that folding left out because an equal one stands for them."""
        return self.real - self.computed


@dataclass(frozen=True)
class Savings:
    """The savings of folding over some batches.

    Attributes:
        batches: Calls without a cache.
        folded: How many of them were folded; the others ran as they were given.
        padded: Tokens the unpatched model computes: rows times columns.
        computed: Tokens that were computed.
        padding: Tokens saved as padding.
        shared: Tokens saved because sequences share them.
        reasons: Why batches ran as they were given, the most frequent reason first -> how many did.
        images: Images in batches that were folded.
        images_run: How many of them the model looked at.
    """

    batches: int
    folded: int
    padded: int
    computed: int
    padding: int
    shared: int
    reasons: Mapping[str, int] = field(default_factory=dict, compare=False)
    images: int = 0
    images_run: int = 0

    @classmethod
    def of(cls, counts: Iterable[Counts]) -> Savings:
        """Sum over batches."""
        every = list(counts)
        folded = [c for c in every if c.reason is None and c.computed < c.padded]
        padding, shared = (sum(getattr(c, kind)() for c in folded) for kind in ("padding", "shared"))
        padded, computed = (sum(getattr(c, kind) for c in every) for kind in ("padded", "computed"))
        reasons = dict(Counter(c.reason for c in every if c.reason is not None).most_common())
        images, images_run = (sum(getattr(c, kind) for c in folded) for kind in ("images", "images_run"))
        return cls(len(every), len(folded), padded, computed, padding, shared, reasons, images, images_run)

    @property
    def factor(self) -> float:
        """Return how many times fewer tokens were computed."""
        return self.padded / self.computed if self.computed else 1.0

    def __str__(self) -> str:
        whole = max(self.padded, 1)
        given = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        head = f"{self.folded} of {self.batches} batches folded: "
        if not self.folded:
            return head + (given or "none has run yet")
        return (
            f"{head}{self.computed:,} tokens computed instead of {self.padded:,}, {self.factor:.2f} times fewer; "
            f"{self.padding / whole:.0%} were padding, {self.shared / whole:.0%} shared prefixes"
            + (f"; {self.images_run:,} of {self.images:,} images run" if self.images else "")
            + (f"; as given: {given}" if given else "")
        )
