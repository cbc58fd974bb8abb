"""Make calls of rows, and tell them from others."""

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from flexpatch.calls import without_cache
from flexpatch.devices import heads_of
from flexpatch.dispatch import backend_at, mask_dtype
from flexpatch.errors import UnsupportedModelError
from flexpatch.fa4 import check_fa4, check_fa4_call, takes
from flexpatch.internals import SCALES_BY_INDEX, attention_dtype, decoder_of, text_config
from flexpatch.layouts import media_of
from flexpatch.masks import mask_of
from flexpatch.plan import Plan, plan_of
from flexpatch.refusals import scaling_limit
from flexpatch.registry import FULL, Adapter
from flexpatch.rows import Rows

# Names the attribute of a call's ids that holds its mask, on the way from a model to its backbone.
MASK = "flexpatch_mask"
# Names the attribute of dense masks by which a row's is told from a caller's own.
OWN = "flexpatch_rows"
# Names the attribute of a row's only mask that holds the plan of a model with mixers beside its attention.
PLAN = "flexpatch_plan"


def row_inputs(inner: PreTrainedModel, rows: Rows, adapter: Adapter, asked: str, few: bool = False) -> dict[str, Any]:
    """Make the arguments with which a model runs ``rows``.

    Args:
        inner: A patched model.
        rows: Packed rows on its device.
        adapter: The record of its architecture.
        asked: The backend that ``apply`` was given.
        few: Whether block masks have one of few lengths (:func:`flexpatch.masks.bucket`).

    Returns:
        ``input_ids`` and ``position_ids`` (B, L) int64, ``attention_mask`` (a mask, or a dict of masks by layer type)
        and ``use_cache=False``.

    Raises:
        FlexpatchError, UnsupportedModelError: If the backend, or this release of transformers, cannot run the rows.
    """
    config, device = text_config(inner), rows.input_ids.device
    limit = scaling_limit(config)
    if limit is not None and SCALES_BY_INDEX and rows.input_ids.shape[1] > limit:
        raise UnsupportedModelError(
            f"rows of more than {limit} tokens, from where on this model scales queries by their position, are not "
            f"exact in transformers {transformers.__version__}: upgrade it to 5.4 or later, or make shorter rows"
        )
    windows = adapter.windows(config)
    layer_types = dict.fromkeys(config.layer_types) if adapter.masks == "by_layer_type" else [FULL]
    if adapter.unshared:
        layer_types = [t for t in windows if t not in adapter.unmasked and adapter.masks not in ("none", "own")]
    if backend_at(inner, device, asked) == "fa4":
        check_fa4()  # a pickled model may come from another machine
        check_fa4_call(device, attention_dtype(inner, device), [windows[layer] for layer in layer_types], rows.depth)
    dtype = mask_dtype(inner, device, asked)
    record = media_of(inner.config)
    two_way = () if record is None or rows.last is None else record.block_layers
    deep = _is_deep(inner, rows, asked)
    masks = {layer: mask_of(rows, windows[layer], dtype, layer in two_way, deep, few) for layer in layer_types}
    for each in masks.values():
        if isinstance(each, Tensor):
            setattr(each, OWN, True)
    plan = plan_of(rows) if adapter.unshared else None
    each_mask: dict[str, Any] = masks | dict.fromkeys(adapter.unmasked, plan)
    mask = each_mask if adapter.masks == "by_layer_type" else masks.get(FULL, plan)
    if adapter.masks == "single" and plan is not None and mask is not plan:
        setattr(mask, PLAN, plan)  # no layer type has a place for it
    positions = rows.position_ids
    if record is not None and record.first_position:
        positions = positions + record.first_position  # rope rounds as in an unpatched call
    inputs = dict(input_ids=rows.input_ids, position_ids=positions, attention_mask=mask, use_cache=False)
    if adapter.masks == "none":
        del inputs["position_ids"]
    return inputs


def _is_deep(inner: PreTrainedModel, rows: Rows, asked: str) -> bool:
    """Tell whether a row's layers run on FlashAttention-4's kernels wherever they can, by ``backend="auto"``."""
    device = rows.input_ids.device
    if asked != "auto" or rows.last is not None or backend_at(inner, device, asked) != "flex":
        return False
    return takes(rows, device, attention_dtype(inner, device), heads_of(decoder_of(inner)))


def carry_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let a call's ids carry its mask, because RWKV hands its backbone none: a forward pre-hook of such models.

    Args:
        model: A model without attention.
        args, kwargs: Of its call.

    Returns:
        Its arguments; ``None`` for a call without a mask.
    """
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None or mask is None:
        return None
    carrier = ids.detach()  # another object: the caller's own carries nothing
    vars(carrier).update(vars(ids) | {MASK: mask})
    return args, kwargs | {"input_ids": carrier}


def carried_mask(call: dict[str, Any]) -> Any:
    """Return the mask that a call's ids carry; ``None`` for a call that has one, or may make a cache."""
    wanted = call.get("attention_mask") is None and without_cache(call)
    return getattr(call.get("input_ids"), MASK, None) if wanted else None


def a_mask(call: Mapping[str, Any]) -> Any:
    """Return the mask of a call, or one of its masks by layer type; a plan if there are no masks."""
    mask = call.get("attention_mask")
    return next(iter(mask.values())) if isinstance(mask, dict) else mask


def plan_in(call: Mapping[str, Any]) -> Plan | None:
    """Return the separate sequences of a row's call; ``None`` for models whose mixers all take the row."""
    mask = call.get("attention_mask")
    each = mask.values() if isinstance(mask, dict) else (mask,)
    return next((plan for plan in each if isinstance(plan, Plan)), getattr(mask, PLAN, None))


def without_plan(call: dict[str, Any]) -> dict[str, Any]:
    """Return a row's call as the model takes it: layers that take no mask get none."""
    mask = call.get("attention_mask")
    if isinstance(mask, Plan):
        return {name: value for name, value in call.items() if name != "attention_mask"}
    if isinstance(mask, dict):
        return call | {"attention_mask": {t: None if isinstance(m, Plan) else m for t, m in mask.items()}}
    return call


def is_row_call(call: Mapping[str, Any]) -> bool:
    """Tell whether a call was made by :func:`row_inputs`."""
    mask = a_mask(call)
    return isinstance(mask, (BlockMask, Plan)) or getattr(mask, OWN, False)
