"""Run convolutions and scans along the trees of a row, by the functions that modeling files have for sequences.

A **convolution** runs on the row as it is; tokens near the beginning of a segment are then recomputed from their own
ancestors. A **scan** runs level by level, each segment from its parent's final state: in calls with ``cu_seqlens``
where the kernel takes these, otherwise in padded groups of similar lengths, whose padding leaves a state as it is.

Shapes: B rows, L tokens a row, C channels, H heads, G segments of a group, S tokens of the longest of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexpatch.fold import lookup
from flexpatch.segments import Group, Segments

# Mamba-2's kernels take powers of two from here on as chunk sizes.
SMALLEST_CHUNK = 16


def convolve(
    segments: Segments,
    original: Callable[..., Any],
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> Tensor:
    """Run a causal convolution over the tokens of each sequence.

    Args:
        segments: Of the row.
        original: The modeling file's function.
        hidden_states: (B, C, L).
        weight: (C, tokens that it sees).
        bias: (C,).
        activation: Its name.
        **others: Arguments of the layer; the convolution needs none of them.

    Returns:
        (B, C, L).
    """
    out = original(hidden_states, weight, bias, activation=activation)
    if weight.shape[-1] == 1:
        return out
    tokens, ancestors = (each.on(hidden_states.device) for each in segments.windows(weight.shape[-1]))
    inputs = lookup(hidden_states.transpose(1, 2).flatten(0, 1), ancestors.clamp(min=0))
    inputs = inputs.masked_fill((ancestors < 0)[..., None], 0.0).transpose(1, 2).contiguous()
    again = original(inputs, weight, bias, activation=activation)[:, :, -1]
    flat = out.transpose(1, 2).flatten(0, 1).index_copy(0, tokens, again)
    return flat.unflatten(0, (out.shape[0], out.shape[2])).transpose(1, 2)


def delta_rule(
    segments: Segments,
    original: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Run a gated delta rule along each sequence. Zeros in all its inputs leave a state as it is.

    Args:
        segments: Of the row.
        original: The modeling file's function.
        query, key, value: (B, L, H, ...).
        g: (B, L, H) or (B, L, H, ...), logarithm of the decay.
        beta: (B, L, H).
        initial_state, output_final_state, cu_seqlens: Of calls with a cache or of separate sequences: unused.
        **others: Settings of the function.

    Returns:
        (B, L, H, ...), and no state.
    """
    assert initial_state is None and cu_seqlens is None and not output_final_state, "rows run without a cache"
    varlen = query.device.type != "cpu" and takes(original, "cu_seqlens")

    def run(inputs: list[Tensor], initial: Tensor | None, group: Group) -> Any:
        query, key, value, g, beta = inputs
        bounds: dict[str, Any] = {}
        if varlen:
            bounds = dict(cu_seqlens=group.bounds.on(query.device), cu_seqlens_cpu=torch.from_numpy(group.bounds.array))
        return original(
            query, key, value, g=g, beta=beta, initial_state=initial, output_final_state=group.keeps, **bounds, **others
        )

    return by_level(segments, [query, key, value, g, beta], run, varlen=varlen), None


def state_space(
    segments: Segments,
    original: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    **others: Any,
) -> Tensor:
    """Run Mamba-2's scan along each sequence. Inputs and steps of zero leave a state as it is.

    Bias, softplus and limits of the steps are applied here: they would give padding a step.

    Args:
        segments: Of the row.
        original: The modeling file's function.
        hidden_states: (B, L, H, ...).
        dt: (B, L, H), steps.
        A: (H,).
        B, C: (B, L, groups, ...).
        chunk_size: Tokens that the function takes at once.
        dt_bias: (H,).
        dt_softplus: Whether steps pass through a softplus.
        dt_limit: Limits of steps.
        initial_states, return_final_states: Of calls with a cache: unused.
        **others: Settings of the function.

    Returns:
        (B, L, H, ...).
    """
    assert initial_states is None and not return_final_states, "rows run without a cache"
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))  # as kernels do
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def run(inputs: list[Tensor], initial: Tensor | None, group: Group) -> Any:
        hidden_states, dt, B, C = inputs
        size = min(chunk_size, max(SMALLEST_CHUNK, 1 << (group.shape[1] - 1).bit_length()))
        found = original(
            hidden_states, dt, A, B, C, size, initial_states=initial, return_final_states=group.keeps, **others
        )
        return found if group.keeps else (found, None)

    return by_level(segments, [hidden_states, dt, B, C], run, varlen=False)


def by_level(segments: Segments, inputs: list[Tensor], run: Callable[..., Any], *, varlen: bool) -> Tensor:
    """Run a scan over all segments, each after its parent.

    Args:
        segments: Of the row.
        inputs: (B, L, ...) each.
        run: Takes inputs (G, S, ...), or (1, tokens, ...) with ``varlen``, initial states and the group. It returns
            outputs and final states.
        varlen: Whether segments stand behind each other, without padding.

    Returns:
        (B, L, ...) outputs.
    """
    schedule = segments.varlen if varlen else segments.bucketed
    device, rows = inputs[0].device, inputs[0].shape[:2]
    index, padding = schedule.index.on(device), rows.numel()
    slots = []
    for x in inputs:
        flat = x.flatten(0, 1).flatten(1)
        found = lookup(flat, index) if varlen else lookup(F.pad(flat, (0, 0, 0, 1)), index, padding)
        slots.append(found.unflatten(-1, x.shape[2:]).split(schedule.sizes))
    outputs: list[Tensor] = []
    states = torch.empty(0)
    for groups in schedule.levels:
        kept = []
        for group in groups:
            shape = (1, -1) if varlen else group.shape
            own = [x[len(outputs)].unflatten(0, shape) for x in slots]
            initial = None if group.parents is None else segments.initial(states, group)
            output, final = run(own, initial, group)
            outputs.append(output.flatten(0, 1))
            if group.keeps:
                kept.append(final)
        states = torch.cat(kept) if kept else states
    flat = torch.cat(outputs)
    return lookup(flat.flatten(1), schedule.back.on(device)).unflatten(-1, flat.shape[1:]).unflatten(0, rows)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether the kernel behind a modeling file's function takes an argument.

    Args:
        function: The modeling file's function. transformers chose its kernel as the file was imported.
        name: The argument's.

    Returns:
        Whether it does.
    """
    return name in (kept_by(function).get("applicable_params") or inspect.signature(function).parameters)


def kept_by(function: Any) -> dict[str, Any]:
    """Return what a modeling file's function keeps: the function that transformers chose, torch's own, and others.

    Args:
        function: The function; or the module that the package ``kernels`` made of it.

    Returns:
        Variables of its closure, by name.
    """
    if isinstance(function, nn.Module):
        return kept_by(kept_by(type(function).forward).get("func"))
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
