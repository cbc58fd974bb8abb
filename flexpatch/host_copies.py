"""Bring numbers from a GPU to the host and back, with as little waiting for the GPU as can be.

A tensor may carry its copy on the host: then nobody waits for the GPU to read it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexpatch.masks import version

# Names the attribute of a tensor that holds its host copy.
COPY = "flexpatch_host_copy"


def remember(tensor: Tensor, copy: Tensor) -> None:
    """Let a tensor on a device carry its copy on the host.

    Args:
        tensor: Any tensor. Its copy is forgotten when an operation writes to it, but not when somebody writes to
            ``tensor.data`` or a collective of torch.distributed does: then call :func:`remember` again.
        copy: A CPU tensor of the same numbers, which nobody changes.
    """
    if not tensor.is_inference():  # inference tensors do not count how often they were written to
        setattr(tensor, COPY, (copy, version(tensor)))  # a plain tuple, which torch.load takes


def recall(tensor: Tensor) -> np.ndarray | None:
    """Return the numbers of a tensor, if they are known on the host.

    Args:
        tensor: Any tensor.

    Returns:
        Its host copy; ``None`` if there is none, or the tensor was written to since.
    """
    copy, written = getattr(tensor, COPY, (None, 0))
    return None if copy is None or written != version(tensor) else copy.numpy()


def to_host(tensors: Sequence[Tensor | None], others: Sequence[Tensor] = ()) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Bring a batch's arrays and other integers to the host at once: on a GPU each copy would wait for all before it.

    Args:
        tensors: Ids (N, S); the attention mask, any dtype, zero for padding; and others that broadcast to their shape.
            All but the ids may be ``None``.
        others: Each (n,) integers.

    Returns:
        (A, N, S) int64, of the tensors that are there, the mask as 0 and 1; the others, one after another.
    """
    ids, mask, *rest = tensors
    assert ids is not None
    if (known := None if others else _known([ids, mask, *rest])) is not None:
        return known, iter(())
    each = [ids, None if mask is None else mask != 0, *rest]
    arrays = torch.stack([x.expand_as(ids).to(ids.device, torch.int64) for x in each if x is not None])
    if not others:
        return arrays.numpy(force=True), iter(())
    every = torch.cat([arrays.flatten(), *(x.to(arrays.device) for x in others)]).numpy(force=True)
    bounds = np.cumsum([arrays.numel(), *map(len, others)])
    return every[: bounds[0]].reshape(arrays.shape), iter(np.split(every, bounds[:-1])[1:])


def _known(tensors: Sequence[Tensor | None]) -> np.ndarray | None:
    """Stack a batch's arrays from host copies; ``None`` if one of them has none."""
    arrays = []
    for place, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if (array := recall(tensor)) is None:
            return None
        arrays.append(array != 0 if place == 1 else array)
    return np.stack([np.broadcast_to(array, arrays[0].shape).astype(np.int64) for array in arrays])


def send(x: Any, device: torch.device) -> Any:
    """Copy to a device while the host goes on.

    Args:
        x: A tensor or rows, on the CPU.
        device: The device.

    Returns:
        The copy.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
