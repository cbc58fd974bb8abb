"""Check the mixers that no mask can cut: both of their ways against each other, and with one thing wrong each.

A gradient that does not reach a parent's state changes no log-prob, so that control looks at gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flexpatch.forward import hook_of
from flexpatch.patch import apply
from flexpatch.plan import Plan, set_plan
from flexpatch.registry import CONVOLUTION
from flexpatch.report import Check
from flexpatch.rows import Rows
from flexpatch.segments import Group, Index, Segments
from flexpatch.trials import Gradients, distance, whole_trees


class Passes(NamedTuple):
    """Passes of a verification, over rows that are its own or broken on purpose.

    Attributes:
        logprobs: Rows -> (T,) token log-probs.
        gradients: Rows -> gradients of the DPO loss.
        error: Two (T,) log-probs -> nats.
    """

    logprobs: Callable[[Rows], Tensor]
    gradients: Callable[[Rows], Gradients]
    error: Callable[[Tensor, Tensor], float]


class FromZero(Segments):
    """Segments whose states all start from nothing."""

    def initial(self, states: Tensor, group: Group) -> Tensor | None:
        """Forget the parents.

        Args:
            states, group: As in :meth:`Segments.initial`.

        Returns:
            ``None``: zeros.
        """
        return None


class Detached(Segments):
    """Segments that give their parents no gradient."""

    def initial(self, states: Tensor, group: Group) -> Tensor | None:
        """Start from the right states, as constants.

        Args:
            states, group: As in :meth:`Segments.initial`.

        Returns:
            (G, ...) states.
        """
        return super().initial(states.detach(), group)


class ThroughSiblings(Segments):
    """Segments whose states run through all siblings before them. Convolutions are right.

    Args:
        ends: (B, L) int64, exclusive subtree ends.
        whole: (B, L) int64, those of naive packing.
    """

    def __init__(self, ends: np.ndarray, whole: np.ndarray) -> None:
        super().__init__(whole)
        self.right = Segments(ends)

    def windows(self, size: int) -> tuple[Index, Index]:
        """Return the right ones."""
        return self.right.windows(size)


class NeighboursOfTheRow(Segments):
    """Segments whose convolutions see their neighbours in the row."""

    def windows(self, size: int) -> tuple[Index, Index]:
        """Look at the tokens that stand before each."""
        tokens = super().windows(size)[0].array
        return Index(tokens), Index(np.maximum(tokens[:, None] - np.arange(size)[::-1], -1))


def broken_states(rows: Rows, kinds: Any) -> Iterator[tuple[str, Rows, bool]]:
    """Make rows along which states are branched wrongly.

    Args:
        rows: Packed rows.
        kinds: The kinds of functions that are branched.

    Returns:
        An iterator of what is wrong, the rows, and whether gradients alone tell.
    """
    ends = np.asarray(rows.ends.numpy(force=True), np.int64)
    if set(kinds) - {CONVOLUTION}:
        whole = np.asarray(whole_trees(rows).numpy(force=True), np.int64)
        yield "states run through siblings", _with(rows, segments=ThroughSiblings(ends, whole)), False
        yield "states start from zero", _with(rows, segments=FromZero(ends)), False
        yield "no gradient to parents' states", _with(rows, segments=Detached(ends)), True
    if CONVOLUTION in kinds:
        yield "convolutions not branched", _with(rows, segments=NeighboursOfTheRow(ends)), False


def broken_sequences(rows: Rows) -> Iterator[tuple[str, Rows, bool]]:
    """Make rows whose separate sequences are wrong. See :func:`broken_states`."""
    plan = Plan(rows.ends)
    longest = plan.batches[0].shape[1]
    slots = sum(index.numel() for index in plan.batches)
    yield "outputs of another sequence", _with(rows, owners=(plan.owners + longest) % slots), False
    index = torch.arange(rows.ends.numel(), device=rows.ends.device).view(rows.ends.shape)
    yield "mixers left on the row", _with(rows, batches=[index], owners=index), False


def _with(rows: Rows, **wrong: Any) -> Rows:
    """Copy rows with a plan that has other attributes."""
    plan = Plan(rows.ends)
    vars(plan).update(wrong)
    return set_plan(replace(rows), plan)


def check_ways(
    model: nn.Module,
    rows: Rows,
    options: dict[str, Any],
    passes: Passes,
    oracle: tuple[Tensor, Gradients],
    bounds: tuple[float, float],
    margin: float,
    exact: bool,
) -> Iterator[Check]:
    """Run all checks of a model's mixers.

    Args:
        model: A patched model.
        rows: Packed rows.
        options: The model was applied with these.
        passes: What to run rows with.
        oracle: True log-probs (T,) and gradients.
        bounds: Of log-probs and gradients.
        margin: How far beyond its bound an error must be that was made on purpose.
        exact: Whether the model is in float64. Otherwise two ways may be as far from each other as both from the truth.

    Returns:
        An iterator of checks; none for a model without such mixers.
    """
    hook = hook_of(model)
    assert hook is not None, "the model is patched"
    kinds = hook.branches.kinds if hook.branches is not None else {}

    def controls(broken: Iterator[tuple[str, Rows, bool]]) -> Iterator[Check]:
        for name, wrong, by_gradients in broken:
            if by_gradients:
                error, bound = distance(passes.gradients(wrong), oracle[1])[0], bounds[1]
            else:
                error, bound = passes.error(passes.logprobs(wrong), oracle[0]), bounds[0]
            what = "gradients" if by_gradients else "log-probs"
            yield Check(f"control, {what}: {name}", error, bound, "", margin)

    if not kinds:
        if hook.mixers:
            yield from controls(broken_sequences(rows))
        return
    branched, gradients = passes.logprobs(rows), passes.gradients(rows)
    yield from controls(broken_states(rows, kinds))
    apply(model, **options | {"mixers": "unshared"})
    factor = 1.0 if exact else 2.0
    error = passes.error(branched, passes.logprobs(rows))
    yield Check("log-probs, branched and unshared mixers", error, factor * bounds[0], "")
    error, worst = distance(gradients, passes.gradients(rows))
    yield Check("gradients, branched and unshared mixers", error, factor * bounds[1], f"worst in {worst}")
    yield from controls(broken_sequences(rows))
    apply(model, **options)
