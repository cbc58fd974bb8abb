"""Check that a row arrives in attention: with its own mask and with all its tokens.

Context and sequence parallelism of every kind, known or not, drop or replace masks, split or gather sequences, or put
an attention of their own in place of the registered one. Each of these is an error here, never a number.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.errors import UnsupportedModelError
from flexpatch.parallelism import hooks_of

# Names the argument that each call of a patched model carries to its attention. Its value is a Row, or a word:
# a model made from a patched one's configuration has the attention's name, but no hooks, and sends nothing.
CALL = "flexpatch_call"
# Names the attribute of a row's masks that refers to their Row, for layers that hand no such argument to attention.
ROW = "flexpatch_row"
GIVEN = "given"  # a batch as it was given
PENDING = "pending"  # such a batch, whose ids carry exits

_graphs: list[bool] = []


@torch.compiler.assume_constant_result
def _note_graph() -> bool:
    """Run while a graph is made that holds this library's attention: within the graph nothing may change."""
    _graphs.append(True)
    return True


def row_of(mask: Any) -> Any:
    """Return the row of a mask that attention got without the call's argument; ``None`` for other masks."""
    refer = getattr(mask, ROW, None)
    return None if refer is None else refer()


def tensors_in(given: Any) -> Iterator[Tensor]:
    """Walk over all tensors of arguments.

    Args:
        given: A tensor, a container of such, or anything else.

    Returns:
        An iterator of them.
    """
    if isinstance(given, Tensor):
        yield given
    for each in given.values() if isinstance(given, dict) else given if isinstance(given, (tuple, list)) else ():
        yield from tensors_in(each)


class Kernel:
    """Tells attention which function takes the dense masks of a call.

    Args:
        dense: Its name.
    """

    def __init__(self, dense: str) -> None:
        self.dense = dense


class Row(Kernel):
    """Describe a row to attention, which compares what it gets.

    Engines rebuild arguments that are containers, and move those with a method ``to``: this class is neither.
    """

    def __init__(
        self,
        length: int,
        masks: Any,
        *,
        dense: str,
        pending: bool = False,
        fa4: bool = False,
        plan: Any = None,
        mixers: int = 0,
    ) -> None:
        """Args:
        length: Tokens of the row.
        masks: Its mask, or a dict of masks by layer type, ``None`` for layers that take none.
        dense: Name of the attention function that takes dense masks.
        pending: Whether its ids carry exits (:class:`flexpatch.forward.Exits`).
        fa4: Whether attention runs on FlashAttention-4's kernels.
        plan: Its separate sequences (:class:`flexpatch.plan.Plan`); ``None`` for models without unshared mixers.
        mixers: How many mixers have to run on these.
        """
        super().__init__(dense)
        self.length = length
        each = masks.values() if isinstance(masks, dict) else (masks,)
        self.masks = tuple(mask for mask in each if mask is not None)
        self.pending = pending
        self.fa4 = fa4
        self.plan = plan
        self.mixers = mixers
        self.reached = len(self.masks) == 0  # not "not": Dynamo cannot trace that of a tuple
        self.unshared: set[int] = set()  # mixers that ran, some of them several times
        self.kinds: Counter[str] = Counter()  # calls that have to branch a state, of each kind of function
        self.branched: Counter[str] = Counter()  # calls that did
        self.leave: Callable[[], None] = lambda: None  # called when the forward is over

    def mark_masks(self) -> None:
        """Let attention find the row by its mask, while the call's arguments are there."""
        for mask in self.masks:
            setattr(mask, ROW, weakref.ref(self))

    def check_attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Any) -> None:
        """Refuse an attention call that is not the row's.

        Args:
            module: The attention layer.
            q: (B, H, L, D) queries.
            k: (B, G, L, D) keys.
            mask: The mask that reached the layer.

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

    def check_mixer(self, module: nn.Module, given: Any) -> None:
        """Refuse a call of a mixer that is not the row's.

        Args:
            module: The mixer.
            given: All its arguments.

        Raises:
            UnsupportedModelError: If none of them holds the row's tokens.
        """
        if not any(tensor.shape[:2] == self.plan.shape for tensor in tensors_in(given)):
            raise UnsupportedModelError(
                f"{type(module).__name__} got other tokens than the row's {self.length}: something between the model "
                "and its mixers splits rows. Take it off, or run the model without flexpatch: flexpatch.remove(model). "
                "(xLSTM does so itself in eval mode, beyond config.max_inference_chunksize: raise that, or make "
                "shorter rows)"
            )

    def check_reached(self) -> None:
        """Refuse a call whose attention never asked for the row. Compiled layers are let pass: graphs set no marks.

        Raises:
            UnsupportedModelError: If another attention ran instead of the registered one, or a mixer ran on the row.
        """
        if len(self.unshared) != self.mixers:
            raise UnsupportedModelError(
                f"{len(self.unshared)} of this model's {self.mixers} mixers ran on separate sequences: another library "
                "replaced or skipped the others. Load the model without it, or run it without flexpatch: "
                "flexpatch.remove(model)"
            )
        if self.branched != self.kinds:
            seen = ", ".join(f"{self.branched[kind]} of {count} {kind} calls" for kind, count in self.kinds.items())
            raise UnsupportedModelError(
                f"{seen} of this model's mixers were branched: another library replaced or skipped the others. Apply "
                'with mixers="unshared", which needs no such calls, or run the model without flexpatch: '
                "flexpatch.remove(model)"
            )
        if not self.reached and not _graphs:
            raise UnsupportedModelError(
                "a row's mask was not used: another library replaced the attention of this model's layers. Load the "
                "model without it, or run it without flexpatch: flexpatch.remove(model)"
            )

    def _is_own(self, mask: Any) -> bool:
        """Tell whether a mask is the row's, or a copy on another device or in another dtype (engines make such)."""
        if torch.compiler.is_compiling():  # in a graph functions cannot be told apart
            return isinstance(mask, (BlockMask, Tensor))
        if isinstance(mask, BlockMask):
            return any(isinstance(own, BlockMask) and own.mask_mod is mask.mask_mod for own in self.masks)
        if any(mask is own for own in self.masks):
            return True
        owns = (own for own in self.masks if isinstance(own, Tensor) and own.shape == mask.shape)
        return any(torch.equal(own.to(mask.device, mask.dtype), mask) for own in owns)
