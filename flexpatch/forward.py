"""Run one call through a backbone: stages change it on the way in, their exits change its output on the way out.

A **stage** takes the backbone and the call's arguments. It returns the arguments and an **exit**, which takes the
output (``None`` if the forward raised), or ``None`` for an exit that has nothing to do. Exits run in reverse. Our own
stages' exits run before other libraries' hooks on the backbone, which so see the caller's layout. A caller's exits
(:func:`flexpatch.scoring.run_rows`) run after those hooks.

Exits travel on the call's ``input_ids`` and nowhere else: other arguments reach every layer, compiled ones included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpatch.arrival import CALL, GIVEN, PENDING, Row
from flexpatch.branching import WAYS, Branches, unwrap, wrap
from flexpatch.calls import is_exporting, without_cache
from flexpatch.checkpointing import Recomputation
from flexpatch.compiled import pad_row, restore_forward
from flexpatch.dispatch import BACKENDS, is_patched
from flexpatch.errors import FlexpatchError
from flexpatch.folding import Exit, Folding
from flexpatch.internals import arguments_of, backbone_of, takes_argument
from flexpatch.mixers import mixers_of, skip_padding
from flexpatch.registry import Adapter
from flexpatch.row_calls import carried_mask, carry_mask, is_row_call, plan_in, without_plan
from flexpatch.unshare import Unsharing

# Names the attribute of a call's ``input_ids`` that holds its exits.
EXITS = "flexpatch_exits"
SWITCH = (False, True)


@dataclass
class Exits:
    """Exits of one call, each list in the order in which their stages ran.

    Attributes:
        own: Of our own stages.
        callers: Of whoever called the model.
    """

    own: list[Exit] = field(default_factory=list)
    callers: list[Exit] = field(default_factory=list)


class BackboneHook:
    """Forward pre-hook of a backbone. It holds all options of :func:`flexpatch.apply`, and is pickled with the model.

    Args:
        backend, fold, compile, mixers, recompute_layers, shared_dropout: As :func:`flexpatch.apply` takes them.

    Raises:
        FlexpatchError: For unknown options.
    """

    def __init__(
        self,
        *,
        backend: str,
        fold: bool,
        compile: bool,
        mixers: str,
        recompute_layers: int | str | None,
        shared_dropout: bool,
    ) -> None:
        switches = (("fold", fold, SWITCH), ("compile", compile, SWITCH), ("shared_dropout", shared_dropout, SWITCH))
        one_of = (("backend", backend, BACKENDS), ("mixers", mixers, WAYS), *switches)
        for name, value, known in one_of:
            if value not in known:
                raise FlexpatchError(f"{name}={value!r}; expected one of {', '.join(map(str, known))}")
        self.fold = fold
        self.compile = compile
        self.way = mixers
        self.folding = Folding(backend, shared_dropout, compile)
        self.recomputation = None if recompute_layers is None else Recomputation(recompute_layers)
        self.dense = ""  # the attention function that takes dense masks of rows; set by apply
        self.unsharing: Unsharing | None = None  # of a model with mixers that take separate sequences
        self.mixers = 0  # how many these are
        self.branches: Branches | None = None  # of a model with mixers that are branched on the row
        self.marks = True  # whether layers hand our argument to attention
        self.disabled = 0  # how many blocks of flexpatch.disabled the model is in

    def __getstate__(self) -> dict[str, Any]:
        """Leave blocks of ``flexpatch.disabled`` out of copies of a model."""
        return vars(self) | {"disabled": 0}

    def settings(self) -> dict[str, Any]:
        """Return the options, as :func:`flexpatch.apply` takes them."""
        recompute_layers = None if self.recomputation is None else self.recomputation.setting
        return dict(
            backend=self.folding.backend,
            fold=self.fold,
            compile=self.compile,
            mixers=self.way,
            recompute_layers=recompute_layers,
            shared_dropout=self.folding.shared_dropout,
        )

    def __call__(self, backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
        """Change the arguments of a backbone's call. Torch calls this before the backbone's forward."""
        if self.unsharing is not None:
            self.unsharing.end()  # an interrupted call may have left some
        if not is_patched(backbone, self.dense):
            changed = "of a model whose attention implementation was changed after flexpatch.apply (apply it again)"
            return self.folding.given(kwargs, changed)
        call = arguments_of(backbone, args, kwargs)
        if call is None:
            self.folding.given(kwargs, "given to a forward whose wrapper hides the names of its arguments")
        if call is None or self.disabled or is_exporting():
            return args, kwargs | {CALL: GIVEN}
        if (carried := carried_mask(call)) is not None:
            call["attention_mask"] = carried
        # Asked first, so that a compiled model's other calls (generation) keep one graph.
        folds = self.fold and without_cache(call) and not is_row_call(call)
        pads = self.compile and (folds or is_row_call(call))
        if folds or pads or (self.recomputation is not None and backbone.training and torch.is_grad_enabled()):
            call = self._enter(backbone, call, folds)
        exits = exits_of(backbone, (), call)
        pending = exits is not None
        if not is_row_call(call):
            if carried is not None:
                del call["attention_mask"]
            return (), call | {CALL: PENDING if pending else GIVEN}
        if takes_argument(backbone, call, "logits_to_keep"):
            # Given a number, Gemma 4 drops tokens before its last layers, and which ones it drops is wrong for rows.
            call["logits_to_keep"] = torch.empty(0, dtype=torch.long)
        plan, call = plan_in(call), without_plan(call)
        length, masks = call["input_ids"].shape[1], call.get("attention_mask")
        options: dict[str, Any] = dict(dense=self.dense, pending=pending, fa4=self.folding.backend == "fa4")
        row = Row(length, masks, **options, plan=plan, mixers=self.mixers)
        if not self.marks:
            row.mark_masks()
        if self.branches is not None and self.branches.kinds:
            row.kinds = self.branches.kinds
            wrap(self.branches.modules, row)
        if self.unsharing is not None:
            self.unsharing.begin(backbone, row)
            row.leave = self.unsharing.end
        return (), call | {CALL: row}

    @torch.compiler.disable
    def _enter(self, backbone: PreTrainedModel, call: dict[str, Any], folds: bool) -> dict[str, Any]:
        """Send a call through the stages that are set."""
        stages: list[Callable[..., tuple[dict[str, Any], Exit | None]]] = []
        stages += [self.folding] if folds else []
        stages += [pad_row] if self.compile else []
        stages += [self.recomputation] if self.recomputation is not None else []
        carried = exits_of(backbone, (), call)
        exits = Exits(callers=[] if carried is None else carried.callers)
        for stage in stages:
            call, leave = stage(backbone, call)
            if leave is not None:
                exits.own.append(leave)
        if exits.own or exits.callers:
            call["input_ids"] = with_exits(call["input_ids"], exits)
        return call


def with_exits(ids: Tensor, exits: Exits) -> Tensor:
    """Put exits on token ids.

    Args:
        ids: (B, L) int64.
        exits: The exits.

    Returns:
        Another tensor object that shares the numbers of ``ids``, and what else these carry.
    """
    carrier = ids.detach()
    vars(carrier).update(vars(ids) | {EXITS: exits})
    return carrier


def exits_of(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> Exits | None:
    """Find the exits of a call, wherever another hook has put its ids.

    Args:
        backbone: The backbone that is called.
        args: Its positional arguments.
        kwargs: Its other arguments.

    Returns:
        The exits; ``None`` if the ids carry none.
    """
    ids = kwargs.get("input_ids") if not args else (arguments_of(backbone, args, kwargs) or {}).get("input_ids")
    return getattr(ids, EXITS, None)


def run_own_exits(backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Run our own stages' exits: a forward hook of the backbone, before other libraries' hooks.

    Args:
        backbone, args, kwargs: Of the call, after all pre-hooks.
        output: Its output; ``None`` if the forward raised.

    Returns:
        ``output``, changed in place; ``None`` without exits.

    Raises:
        FlexpatchError: If something took the exits away.
        UnsupportedModelError: If attention never asked for the row.
    """
    mark = kwargs.get(CALL)
    if isinstance(mark, Row):
        mark.leave()
        if output is not None:
            mark.check_reached()
    exits = exits_of(backbone, args, kwargs)
    if exits is None:
        # Without any mark somebody has put other arguments in place of ours.
        pending = mark.pending if isinstance(mark, Row) else mark == PENDING or (mark is None and is_row_call(kwargs))
        if output is not None and pending:
            raise FlexpatchError(
                "something replaced input_ids between flexpatch's hook on the backbone and its forward, so the row's "
                "hidden states cannot be brought back into the batch's layout. Register that hook before "
                "flexpatch.apply(model), or apply with fold=False"
            )
        return None
    while exits.own:
        exits.own.pop()(output)
    return output


def run_callers_exits(backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Run a caller's exits: a forward hook of the backbone, after other libraries' hooks.

    Args:
        backbone, args, kwargs, output: Of the call, as those hooks left them.

    Returns:
        ``output``, changed in place.
    """
    exits = exits_of(backbone, args, kwargs)
    while exits is not None and exits.callers:
        exits.callers.pop()(output)
    return output


def hook_of(inner: nn.Module) -> BackboneHook | None:
    """Find the hook that :func:`flexpatch.apply` put on a model's backbone."""
    hooks = (hook for module in inner.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, BackboneHook)), None)


def register_hooks(
    inner: PreTrainedModel, hook: BackboneHook, adapter: Adapter, branched: dict[str, tuple[str, ...]]
) -> None:
    """Put all hooks on a model's backbone, and on mixers in it that take separate sequences.

    Args:
        inner: The model.
        hook: The one with the options.
        adapter: The record of its architecture.
        branched: The mixers that are branched (:func:`flexpatch.branching.choose`).
    """
    hook.marks = adapter.marks
    backbone = backbone_of(inner)
    if adapter.masks == "none" and backbone is not inner:
        inner.register_forward_pre_hook(carry_mask, with_kwargs=True)
    if adapter.unshared:
        unshared = {name: rule for name, rule in adapter.unshared.items() if name not in branched}
        hook.unsharing = Unsharing(unshared, hook.dense)
        every = list(mixers_of(backbone, adapter.unshared))
        hook.branches = Branches(branched, hook.unsharing)
        hook.branches.register(every)
        hook.mixers = len(hook.unsharing.register(backbone))
        if every and adapter.padding != "masked":
            hook.folding.padding_skipped = adapter.padding == "in_front" or skip_padding(every, adapter.unshared)
    backbone.register_forward_pre_hook(hook, with_kwargs=True)
    backbone.register_forward_hook(run_own_exits, with_kwargs=True, prepend=True, always_call=True)
    backbone.register_forward_hook(run_callers_exits, with_kwargs=True)


def remove_hooks(inner: nn.Module) -> None:
    """Take all hooks and replaced forwards off a model.

    Hooks are found by their types: a handle would be state, and a copied model would have none. All modules are
    searched, because the backbone may have been wrapped since.
    """
    for module in inner.modules():
        hooks = module._forward_pre_hooks, module._forward_hooks
        flags = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs
        for registered, with_kwargs in zip(hooks, flags, strict=True):
            for key, hook in list(registered.items()):
                if isinstance(hook, BackboneHook) and hook.recomputation is not None:
                    hook.recomputation.restore()
                if isinstance(hook, BackboneHook) and hook.unsharing is not None:
                    hook.unsharing.end()
                kinds = (Unsharing, Branches)
                ours = isinstance(hook, BackboneHook) or isinstance(getattr(hook, "__self__", None), kinds)
                if ours or hook in (carry_mask, run_own_exits, run_callers_exits):
                    del registered[key], with_kwargs[key]
                    module._forward_hooks_always_called.pop(key, None)
        restore_forward(module)
    unwrap()
