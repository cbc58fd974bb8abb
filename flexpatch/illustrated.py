"""Runs of tokens with images: which are equal, where they are in a row, and the tensors of their images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexpatch.errors import FlexpatchError


@dataclass(frozen=True, eq=False)
class Illustrated:
    """A run of tokens with images.

    Attributes:
        start: Index of its first token, in a layout, or among all B * L tokens of rows.
        stop: Index behind its last token.
        tensors: Its images, as the model's processor makes them.
        given: The same on the device on which they were given: what the host reads of them waits for no other device.
        name: What to call it in error messages.
    """

    start: int
    stop: int
    tensors: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    name: str

    def moved(self, by: int) -> "Illustrated":
        """Return this run ``by`` tokens further."""
        return replace(self, start=self.start + by, stop=self.stop + by)

    def each(self, function: Any) -> "Illustrated":
        """Return this run with ``function`` of each tensor in its place."""
        return replace(self, tensors={name: function(tensor) for name, tensor in self.tensors.items()})


class Keys:
    """Keys of the first tokens of runs with images. Equal runs with equal images have one key.

    Args:
        first: The smallest key, larger than all token ids.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.runs: list[tuple[np.ndarray, Illustrated]] = []

    def first_named(self, run: np.ndarray, tensors: Mapping[str, Tensor], name: str) -> np.ndarray:
        """Put a key that names a run and its images in place of its first token.

        Args:
            run: (L,) int64 token ids.
            tensors: Of its images.
            name: What to call the run in error messages.

        Returns:
            (L,) int64.
        """
        same = (i for i, (ids, other) in enumerate(self.runs) if np.array_equal(ids, run) and _equal(tensors, other))
        number = next(same, len(self.runs))
        if number == len(self.runs):
            self.runs.append((run, Illustrated(0, len(run), tensors, tensors, name)))
        return np.concatenate([[self.first + number], run[1:]])

    def resolve(self, keys: np.ndarray) -> tuple[np.ndarray, list[Illustrated]]:
        """Return the token ids (L,) of keys (L,), and the runs with images among them."""
        at = np.flatnonzero(keys >= self.first)
        if not len(at):
            return keys, []
        ids, found = keys.copy(), []
        for start in at.tolist():
            run, pictured = self.runs[keys[start] - self.first]
            ids[start] = run[0]
            found.append(pictured.moved(start))
        return ids, found


def _equal(tensors: Mapping[str, Tensor], other: Illustrated) -> bool:
    """Tell whether images are equal in every number."""
    if tensors.keys() != other.given.keys():
        return False
    pairs = ((tensor, other.given[name]) for name, tensor in tensors.items())
    return all(a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)) for a, b in pairs)


def checked_images(images: Any, where: str) -> dict[str, Tensor]:
    """Refuse what are no tensors by name, before anything is read of them.

    Args:
        images: Of a run, as a user gave them.
        where: What to call the run.

    Returns:
        The tensors.

    Raises:
        FlexpatchError: Naming the run.
    """
    way_out = (
        "expected the processor's tensors by name: processor(text=..., images=..., return_tensors='pt') makes them"
    )
    if not isinstance(images, Mapping):
        raise FlexpatchError(f"{where} has {type(images).__name__} as images; {way_out}")
    for name, tensor in images.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.ndim or tensor.requires_grad:
            what = "a tensor with a gradient" if getattr(tensor, "requires_grad", False) else type(tensor).__name__
            raise FlexpatchError(f"{where} has {what} as images[{name!r:.40}]; {way_out}")
    if not images:
        raise FlexpatchError(f"{where} has no tensor among its images; pass images=None")
    return dict(images)
