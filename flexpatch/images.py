"""The images of a call, on its device: which are equal, which a row takes, and where its tokens are.

Images are compared in every number. Fingerprints, made in one pass on the device and copied to the host with the
batch's ids, only say which ones to compare.

Shapes: N sequences, S columns, K images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor, nn

from flexpatch.layouts import Layout, Media, Unit
from flexpatch.registry import INSTALLED


@dataclass(frozen=True)
class Held:
    """The images (or videos) of a call, on its device.

    Attributes:
        layout: How the call holds them.
        entries: Their tensors, entries first.
    """

    layout: Layout
    entries: Mapping[str, Tensor]

    def numbers(self) -> list[Tensor]:
        """Return what the host needs: fingerprints, sizes, which entries are left out, and whether all are finite."""
        prints = [fingerprints(tensor) for tensor in self.entries.values()]
        sizes = [self.entries[name].long().flatten() for name in self._sizes()]
        skipped = []
        if self.layout.skips_zeros:
            skipped.append((self.entries[self.layout.names[0]] == 0).flatten(1).all(1).long())
        return [*prints, *sizes, *skipped, finite(self.entries).long()[None]]

    def read(
        self, numbers: Iterator[np.ndarray]
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray], np.ndarray | None, bool]:
        """Take :meth:`numbers` apart again: fingerprints of each tensor, sizes, entries left out, whether finite."""
        prints = [next(numbers) for _ in self.entries]
        sizes: dict[str, np.ndarray] = {}
        for name in self._sizes():
            sizes[name] = next(numbers).reshape(tuple(self.entries[name].shape))
        skipped = next(numbers) != 0 if self.layout.skips_zeros else None
        return prints, sizes, skipped, bool(next(numbers)[0])

    def _sizes(self) -> list[str]:
        return [name for name in self.layout.sizes if name in self.entries]


def held_by(record: Media, call: Mapping[str, Any]) -> list[Held]:
    """Find the images and videos of a call.

    Args:
        record: Of the multimodal class.
        call: The call's arguments by name.

    Returns:
        Those that there are.
    """
    held = [Held(layout, layout.entries(call)) for layout in record.layouts()]
    return [each for each in held if each.layout.names[0] in each.entries]


def finite(entries: Mapping[str, Tensor]) -> Tensor:
    """Tell whether all numbers of images are finite, without waiting for the device.

    One that is not makes its image's keys and values NaN. Attention hides them by weights of zero, which times NaN are
    NaN: within a row they would reach all sequences, unpatched their own alone.

    Args:
        entries: Tensors by name.

    Returns:
        () bool.
    """
    device = next(iter(entries.values())).device
    return torch.stack([tensor.isfinite().all().to(device) for tensor in entries.values()]).all()


def fingerprints(tensor: Tensor) -> Tensor:
    """Sum the bits of each entry.

    Args:
        tensor: (entries, ...), of any dtype.

    Returns:
        (entries,) int64. Equal entries have equal sums.
    """
    flat = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
    flat = flat.contiguous()
    size = flat.shape[1] * flat.element_size()
    offset = int(flat.storage_offset()) * flat.element_size()
    wide = next(d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if not (size | offset) % d.itemsize)
    return flat.view(wide).sum(1, dtype=torch.int64)


def identities(held: Held, units: Sequence[Unit], prints: Sequence[np.ndarray]) -> np.ndarray:
    """Number the images so that equal ones have equal numbers.

    Args:
        held: The images.
        units: Their entries.
        prints: (entries,) fingerprints of each tensor.

    Returns:
        (K,) int64. Images with equal fingerprints were compared in every number.
    """
    first: dict[tuple[bytes, ...], int] = {}
    found, candidates = np.arange(len(units)), []
    names = list(held.entries)
    for k, unit in enumerate(units):
        spans = [slice(*unit.spans[name]) for name in names]
        like = first.setdefault(tuple(each[span].tobytes() for each, span in zip(prints, spans, strict=True)), k)
        if like != k:
            candidates.append((k, like))
    if candidates:
        equal = [_equal(held.entries, units[k], units[like]) for k, like in candidates]
        for (k, like), same in zip(candidates, torch.stack(equal).tolist(), strict=True):
            found[k] = like if same else k
    return found


def _equal(entries: Mapping[str, Tensor], one: Unit, other: Unit) -> Tensor:
    """Compare two images in every number, without waiting for the device."""
    pairs = ((tensor[slice(*one.spans[n])], tensor[slice(*other.spans[n])]) for n, tensor in entries.items())
    device = next(iter(entries.values())).device
    return torch.stack([(a == b).all().to(device) for a, b in pairs]).all()


def select(held: Sequence[Held], units: Sequence[Sequence[Unit]]) -> dict[str, Any]:
    """Take a row's images from a call's tensors.

    Args:
        held: The call's images, and videos.
        units: Those of each that the row has, in its order.

    Returns:
        Arguments of the row's call.
    """
    arguments: dict[str, Any] = {}
    for each, own in zip(held, units, strict=True):
        chosen = {}
        for name, tensor in each.entries.items():
            index = np.concatenate([np.arange(*unit.spans[name]) for unit in own])
            chosen[name] = tensor.index_select(0, torch.from_numpy(index).to(tensor.device, non_blocking=True))
        arguments |= each.layout.join(chosen)
    return arguments


def rope_positions(
    backbone: Any,
    call: Mapping[str, Any],
    ids: np.ndarray,
    mask: np.ndarray | None,
    types: np.ndarray | None,
    sizes: Mapping[str, np.ndarray],
    record: Media,
) -> tuple[Tensor | None, Tensor | None]:
    """Let the model's own method compute the rope positions of a batch, on the host: it reads them token by token.

    Args:
        backbone: The backbone. Its ``rope_deltas``, which the method sets, are put back: only the model's own calls,
            and batches that stand for them, may leave any for generation.
        call: The batch's call; of its arguments those that the record passes on.
        ids, mask, types: (N, S) of the batch, on the host.
        sizes: Of its images, by the names of arguments; of rows with what the record passes on.
        record: Of the multimodal class.

    Returns:
        (axes, N, S) int64, and the ``rope_deltas`` that an unpatched call would leave, on the host; ``None`` where the
        model counts columns, and leaves none.
    """
    method = backbone.compute_3d_position_ids
    known: dict[str, Any] = {name: torch.from_numpy(numbers) for name, numbers in sizes.items()}
    known["input_ids"] = torch.from_numpy(ids)
    known["attention_mask"] = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    known[record.types or ""] = None if types is None else torch.from_numpy(types)
    for name in record.passed & call.keys():
        known[name] = call[name].cpu() if isinstance(call[name], Tensor) else call[name]
    earlier, backbone.rope_deltas = getattr(backbone, "rope_deltas", None), None
    try:
        positions: Tensor | None = method(**{name: known.get(name) for name in signature(method).parameters})
        return positions, backbone.rope_deltas
    finally:
        backbone.rope_deltas = earlier


def media_obstacle(record: Media, backbone: nn.Module, call: Mapping[str, Any]) -> str | None:
    """Find what keeps a call with images from being folded, whatever they show.

    Args:
        record: Of the multimodal class.
        backbone: The backbone that is called.
        call: The call's arguments by name.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    if Version(record.since) > INSTALLED:
        return f"images, in transformers before {record.since} (upgrade it)"
    for name in {name for layout in record.layouts() for name in layout.names}:
        value = call.get(name)
        if value is not None and not isinstance(value, Tensor):
            return f"{name} that are no tensor"
        if value is not None and value.requires_grad:
            return f"{name} that get gradients of their own"
    norms = (m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if any(norm.training or norm.running_mean is None for norm in norms):
        return "images, whose tower normalizes over all images of a call (BatchNorm in training)"
    return None
