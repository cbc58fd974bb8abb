"""Let mixers that get no row find it, in a forward and where layers are recomputed in backward.

Some models hand no arguments of a call to their mixers. The row of the forward that runs then waits for them here, and
each layer's checkpointing function takes it along.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from flexpatch.arrival import Row
from flexpatch.errors import UnsupportedModelError

# Attributes of modules whose value recomputes layers: of transformers' layers, and of torch's checkpoint_wrapper.
CHECKPOINTING = {"_gradient_checkpointing_func", "checkpoint_fn"}


class Now(threading.local):
    """The forward that runs in a thread, for mixers that get no row."""

    def __init__(self) -> None:
        self.set(None)

    def set(self, row: Row | None) -> None:
        """Begin a forward of ``row``, or end one."""
        self.row = row
        self.inside: list[tuple[nn.Module, Any]] = []  # mixers that run, and their separate sequences
        self.grad = torch.is_grad_enabled()
        self.carried = False  # whether recomputation finds the row
        self.functions: list[tuple[nn.Module, str]] = []  # layers' checkpointing functions that take the row along

    def carry(self, functions: list[tuple[nn.Module, str]]) -> None:
        """Let recomputation of layers find the row of their forward.

        Args:
            functions: Layers, and the names of their checkpointing functions.
        """
        assert self.row is not None, "a forward runs"
        self.functions = functions
        for module, name in functions:
            setattr(module, name, Carrying(self, self.row, getattr(module, name)))

    def release(self) -> None:
        """Undo :meth:`carry`."""
        for module, name in self.functions:
            if isinstance(carrying := getattr(module, name), Carrying):
                setattr(module, name, carrying.function)

    def check_recomputation(self, mixer: nn.Module) -> None:
        """Refuse a mixer in a layer that is recomputed without its row.

        Reentrant checkpointing shows by gradients that are off, and would recompute the layer on the row without a
        word. The other kind compares shapes, and raises by itself.

        Raises:
            UnsupportedModelError: With the way out.
        """
        if self.grad and not torch.is_grad_enabled() and not self.carried:
            raise UnsupportedModelError(
                f"something recomputes the layers of this model in backward, where its {type(mixer).__name__} would "
                "not find its separate sequences. Use the model's own gradient checkpointing, or torch's "
                "checkpoint_wrapper; or apply with fold=False"
            )


class Carrying:
    """A layer's checkpointing function that sets the row of its own forward again as the layer is recomputed."""

    def __init__(self, now: Now, row: Row, function: Callable[..., Any]) -> None:
        self.now, self.row, self.function = now, row, function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(partial(self._run, layer), *args, **kwargs)

    def _run(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = self.now
        before = dict(vars(now))
        now.set(self.row)
        now.carried = True
        try:
            return layer(*args, **kwargs)
        finally:
            vars(now).update(before)
