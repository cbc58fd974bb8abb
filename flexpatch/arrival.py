"""Check that a row arrives in attention: its own mask and all its tokens, whoever stands in between.

Context and sequence parallelism of every kind, known or not, drop or replace masks, split or gather sequences, or put
attention of their own in place of the registered one. Each is an error here, never a number.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.errors import UnsupportedModelError
from flexpatch.parallelism import hooks_of

_graphs: list[bool] = []


@torch.compiler.assume_constant_result
def _note_graph() -> bool:
    """Run while a graph is made that holds attention of ours: within the graph nothing may change."""
    _graphs.append(True)
    return True


class Row:
    """A row's mask and length, for attention to compare with what it gets. An argument of the call reaches all layers.

    Engines rebuild arguments that are containers, and move those with a method ``to``: this is neither.
    """

    def __init__(self, length: int, masks: Any) -> None:
        """Args: ``length``: tokens of the row; ``masks``: its mask, or a dict of masks by layer type."""
        self.length = length
        self.masks = tuple(masks.values()) if isinstance(masks, dict) else (masks,)
        self.reached = False

    def check_attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Any) -> None:
        """Refuse an attention call that is not the row's. Shapes: q (B, H, L, D), k (B, G, L, D).

        Raises:
            UnsupportedModelError: If the mask is gone or another, or the tokens are not the row's.
        """
        if torch.compiler.is_compiling():
            _note_graph()
        else:
            self.reached = True
        wrong = None
        if mask is None or not self._is_own(mask):
            wrong = f"got {'no mask' if mask is None else 'another mask'} in place of a row's"
        elif q.shape[2] != self.length or k.shape[2] != self.length:
            wrong = f"got {q.shape[2]} queries and {k.shape[2]} keys for a row of {self.length} tokens"
        if wrong is not None:
            raise UnsupportedModelError(
                f"attention ({type(module).__name__}) {wrong}: something between the model and its attention changed "
                f"them{hooks_of(module)}, as context and sequence parallelism do. Take it off, or run the model "
                "without flexpatch: flexpatch.remove(model)"
            )

    def check_reached(self) -> None:
        """Refuse a call whose attention never asked for the row. Not where layers are compiled: graphs set no marks.

        Raises:
            UnsupportedModelError: If somebody's own attention ran instead of the registered one.
        """
        if not self.reached and not _graphs:
            raise UnsupportedModelError(
                "a row's mask was not used: another library replaced the attention of this model's layers. Load the "
                "model without it, or run it without flexpatch: flexpatch.remove(model)"
            )

    def _is_own(self, mask: Any) -> bool:
        """Whether a mask is the row's, or a copy on another device or in another dtype (engines make such)."""
        if torch.compiler.is_compiling():  # in a graph functions cannot be told apart
            return isinstance(mask, (BlockMask, Tensor))
        if isinstance(mask, BlockMask):
            return any(isinstance(own, BlockMask) and own.mask_mod is mask.mask_mod for own in self.masks)
        if any(mask is own for own in self.masks):
            return True
        owns = (own for own in self.masks if isinstance(own, Tensor) and own.shape == mask.shape)
        return any(torch.equal(own.to(mask.device, mask.dtype), mask) for own in owns)
