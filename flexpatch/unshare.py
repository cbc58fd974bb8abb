"""Run a mixer that no mask can cut on separate sequences, and everything around it on the row.

Scans without an initial state, convolutions, chosen keys: such a module alone takes the row's root-to-leaf sequences
as batches, and each token of the row takes its output from the first sequence that holds it. Two hooks of the module do
so. By causality this is exact, in values and in gradients: no token sees later ones, padding on the right included.

The row arrives with the call's own arguments wherever a model hands these to its mixers: recomputation in backward so
gets the same one. Mixers that get none find it here, set for the forward that runs, and for layers as they are
recomputed.

Shapes: B rows, L tokens a row, N sequences of a batch, S columns.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.arrival import CALL, Kernel, Row, tensors_in
from flexpatch.carrying import CHECKPOINTING, Now
from flexpatch.mixers import look_over, mixers_of, visible_in
from flexpatch.plan import Plan, look_up, visible_mask
from flexpatch.registry import Visible


class Unsharing:
    """Hooks of a model's mixers that run on separate sequences. They are pickled with the model.

    Args:
        rules: The adapter's ``unshared``: class name -> which mask the module's sequences need.
        dense: The kind of attention function that unshared attention runs on, ``"sdpa"`` or another.
    """

    def __init__(self, rules: Mapping[str, Callable[[Any], Visible | None]], dense: str) -> None:
        self.rules = rules
        self.dense = dense
        self.now = Now()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the forward that runs out of copies of a model."""
        return {"rules": self.rules, "dense": self.dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the rules of another model's."""
        self.__init__(**state)  # type: ignore[misc]

    def register(self, backbone: nn.Module) -> list[nn.Module]:
        """Put hooks on all mixers of a backbone.

        Args:
            backbone: The backbone.

        Returns:
            The mixers.
        """
        mixers = list(mixers_of(backbone, self.rules))
        for mixer in mixers:
            mixer.register_forward_pre_hook(self.enter, with_kwargs=True)
            # First of all: FSDP's own hook, if it is there already, takes the weights away again.
            mixer.register_forward_hook(self.leave, prepend=True, with_kwargs=True)
        return mixers

    def begin(self, backbone: nn.Module, row: Row) -> None:
        """Set the row of a forward, and let recomputation of its layers find it.

        Args:
            backbone: The backbone, as its engine has it now.
            row: The row. Its sequences are put in as many batches on all ranks, if an engine needs that.
        """
        assert row.plan is not None, "row_inputs makes one for models with such mixers"
        self.end()
        functions, gathers = look_over(backbone, self.rules, CHECKPOINTING)
        if gathers:
            row.plan = row.plan.in_one_batch
        self.now.set(row)
        self.now.carry(functions)

    def end(self) -> None:
        """Forget the row of a forward."""
        if self.now.row is not None:
            self.now.release()
            self.now.set(None)

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give a mixer the first batch of separate sequences in place of the row. Torch calls this before it.

        Args:
            module: The mixer.
            args, kwargs: Its arguments for the row.

        Returns:
            Its arguments for the batch; ``None`` for a call that holds no row.

        Raises:
            UnsupportedModelError: If the row does not arrive whole, or recomputation would not find it.
        """
        row = kwargs.get(CALL, None if self.now.inside else self.now.row)
        if not isinstance(row, Row) or row.plan is None:
            return None
        row.check_mixer(module, (args, kwargs))
        row.unshared.add(id(module))
        visible = visible_in(module, self.rules)
        row.reached |= visible is not None  # attention in it takes masks of its own
        separate = Separate(row.plan, visible, self.dense, args, kwargs)
        args, kwargs = separate.arguments(0)
        if CALL in kwargs:
            kwargs[CALL] = separate
        else:
            self.now.check_recomputation(module)
            self.now.inside.append((module, separate))
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Run a mixer on the other batches too, and bring all outputs back to the row. Torch calls this after it.

        Args:
            module: The mixer.
            args, kwargs: Its arguments for the first batch.
            output: Its output for that.

        Returns:
            Its output for the row; ``None`` for a call that holds no row.
        """
        separate = kwargs.get(CALL)
        if CALL not in kwargs and self.now.inside and self.now.inside[-1][0] is module:
            separate = self.now.inside[-1][1]
        if not isinstance(separate, Separate):
            return None
        outputs = [output]
        for i in range(1, len(separate.plan.batches)):
            args, kwargs = separate.arguments(i)
            if CALL in kwargs:
                kwargs[CALL] = separate
            outputs.append(module.forward(*args, **kwargs))
        if CALL not in kwargs:
            self.now.inside.pop()
        return separate.join(outputs)


class Parted:
    """An output of a mixer that only its sequences' other mixers can read, such as chosen keys, which are counted in a
    sequence. It passes from layer to layer as it is.

    Args:
        outputs: (N, S, ...) for each of a plan's batches.
    """

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs


class Separate(Kernel):
    """One call of a mixer, on the separate sequences of a row. Attention in it is an ordinary call.

    Args:
        plan: Of the row.
        visible: What its attention sees; ``None`` for a mixer that takes no mask.
        dense: Kind of attention function.
        args: Its arguments for the row.
        kwargs: Its other arguments.
    """

    def __init__(self, plan: Plan, visible: Visible | None, dense: str, args: Any, kwargs: dict[str, Any]) -> None:
        super().__init__(dense)
        self.plan, self.visible = plan, visible
        self.args, self.kwargs = args, kwargs
        self.batch = 0  # of the arguments that were made last

    def arguments(self, batch: int) -> tuple[Any, dict[str, Any]]:
        """Return the arguments for one of the plan's batches.

        Args:
            batch: Its number.

        Returns:
            Positional and other arguments: tensors of tokens (B, L, ...) as (N, S, ...), masks for these.
        """
        self.batch = batch
        index = self.plan.batches[batch]
        args = tuple(self._gather(x, index) for x in self.args)
        kwargs = {name: self._argument(name, x, index) for name, x in self.kwargs.items() if name != "attention_mask"}
        if "attention_mask" in self.kwargs:
            # Without attention, as transformers has it: one number for each token, or none.
            given, tokens = self.kwargs["attention_mask"], self.plan.masks[batch]
            kwargs["attention_mask"] = tokens if self.visible is None else self._mask(given, index)
        return args, kwargs

    def join(self, outputs: list[Any]) -> Any:
        """Bring a mixer's outputs back to the row.

        Args:
            outputs: For each batch, a tensor (N, S, ...), or a tuple or list of such and others.

        Returns:
            Tensors (B, L, ...) of real numbers, :class:`Parted` ones of integers. Others are those of the first batch.
        """
        first = outputs[0]
        if isinstance(first, (tuple, list)):
            return type(first)(self.join(list(each)) for each in zip(*outputs, strict=True))
        shapes = [index.shape for index in self.plan.batches]
        # All: a state's second size may be the length of one batch by chance.
        if not isinstance(first, Tensor) or [output.shape[:2] for output in outputs] != shapes:
            return first
        if not first.is_floating_point():
            return Parted(outputs)
        tokens = torch.cat([output.flatten(0, 1) for output in outputs])
        return look_up(tokens, self.plan.owners.to(tokens.device))

    def _argument(self, name: str, x: Any, index: Tensor) -> Any:
        """Make a named argument for separate sequences."""
        visible = self.visible or Visible()
        if x is None or name in visible.whole:
            return x
        if name in visible.keys:  # (B * H, 1, L) or (B, H, 1, L), each row alike
            each = x[: len(x) // self.plan.shape[0], ..., : index.shape[1]]
            return each.repeat(len(index), *[1] * (x.ndim - 1))
        return self._gather(x, index)

    def _gather(self, x: Any, index: Tensor) -> Any:
        """Put separate sequences in place of the rows in a tensor, or in all those of a container."""
        B, L = self.plan.shape
        if isinstance(x, dict):
            return {key: self._gather(each, index) for key, each in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(self._gather(each, index) for each in x)
        if isinstance(x, Parted):
            return x.outputs[self.batch]
        if isinstance(x, BlockMask) or (isinstance(x, Tensor) and x.ndim == 4 and x.shape[-2:] == (L, L)):
            return self._mask(x, index)
        if not isinstance(x, Tensor) or x.ndim < 2:
            return x
        if x.shape == (L, L) != (B, L):  # a number for each pair of columns, such as their distance
            return x[: index.shape[1], : index.shape[1]]
        if x.shape[:2] == (1, L) and B > 1:
            x = x.expand(B, *x.shape[1:])
        if x.shape[:2] == (B, L):
            return look_up(x.flatten(0, 1), index.to(x.device))
        if x.ndim > 2 and x.shape[1:3] == (B, L):  # one entry for each axis of positions, or for each head
            return torch.stack([look_up(each.flatten(0, 1), index.to(x.device)) for each in x])
        return x

    def _mask(self, given: Any, index: Tensor) -> Any:
        """Make the mask of separate sequences, in place of whatever stood there for the row."""
        if isinstance(given, dict):
            return {name: None if each is None else self._mask(each, index) for name, each in given.items()}
        if self.visible is None:
            return None
        tokens = self.plan.masks[self.batch]
        if self.visible.flat:
            return torch.ones_like(index, dtype=torch.bool) if tokens is None else tokens
        allowed = visible_mask(self.visible, index.shape[1], index.device).expand(len(index), 1, -1, -1)
        if tokens is not None:
            allowed = allowed & tokens[:, None, None]
        if self.visible.hides:
            return ~allowed
        if "attention_mask" in self.visible.keys and given.is_floating_point():
            # Each token sees itself: the row's mask holds there what it adds to a key.
            added = given[:1].diagonal(dim1=-2, dim2=-1)[..., None, : index.shape[1]]
            return torch.where(allowed, added, torch.finfo(given.dtype).min)
        if self.dense == "sdpa":
            return allowed
        dtype = next(x.dtype for x in tensors_in((self.args, self.kwargs)) if x.is_floating_point())
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
