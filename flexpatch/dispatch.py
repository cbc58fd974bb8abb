"""Give layers what a row needs, and send each attention call to the kernel that takes it.

``apply`` sets an attention implementation whose name tells the model's original one, such as ``flexpatch_sdpa``. A
block mask goes to FlexAttention. Everything else (generation, caches, batches as they are given, dense masks) goes to
the original, unchanged.

This module and ``internals`` alone import names from below the top level of transformers.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from flexpatch import parallelism
from flexpatch.arrival import CALL, Kernel, Row, row_of
from flexpatch.attention import check_fa4_model, flex
from flexpatch.devices import Choice, choose, heads_of, tell
from flexpatch.errors import FlexpatchWarning, UnsupportedModelError
from flexpatch.fa4 import check_fa4
from flexpatch.internals import attention_dtype, attention_name, decoder_of, device_of, set_attention, text_config
from flexpatch.registry import Adapter, adapter_for, marks

# transformers prepares masks for FlashAttention where a name holds "flash", as a FlashAttention original's does.
PREFIX = "flexpatch_"
BACKENDS = ("auto", "flex", "fa4", "dense")
# Implementations whose names are known from the import on. Kernels of a hub are made known by ``apply``.
ORIGINALS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def is_ours(name: str) -> bool:
    """Tell whether an attention implementation is one that :func:`flexpatch.apply` sets."""
    return name.startswith(PREFIX)


def original_of(name: str) -> str:
    """Return the original that an attention implementation's name tells; a name that is not ours tells itself."""
    return name.removeprefix(PREFIX)


def is_patched(inner: PreTrainedModel, dense: str) -> bool:
    """Tell whether a model has the attention implementation that :func:`flexpatch.apply` left it with.

    Args:
        inner: The model.
        dense: Name of the attention function that takes dense masks of rows. Attention of a model's own keeps it.

    Returns:
        Whether it does.
    """
    name = attention_name(inner)
    return is_ours(name) or (name == dense and adapter_for(inner.config).masks == "own")


def is_flash(original: str) -> bool:
    """Tell whether an implementation is FlashAttention of some kind, as transformers tells it: by its name."""
    return "flash" in original


def dense_original(inner: PreTrainedModel, adapter: Adapter) -> str:
    """Choose the attention function that takes dense masks of rows.

    Args:
        inner: A patched model.
        adapter: The record of its architecture.

    Returns:
        ``"sdpa"`` or ``"eager"``: the original, or the architecture's own where that is FlashAttention.
    """
    original = original_of(attention_name(inner))
    return adapter.implementations[0] if is_flash(original) else original


def check_original(original: str, adapter: Adapter) -> None:
    """Refuse an attention implementation that is not right for ordinary calls of this architecture.

    FlashAttention is let pass: transformers has decided, when the model was loaded, whether it is right.

    Args:
        original: The model's own implementation, such as ``"sdpa"``.
        adapter: The record of its architecture.

    Raises:
        UnsupportedModelError: Naming one that is.
    """
    if original not in adapter.implementations and (adapter.masks == "own" or not is_flash(original)):
        right = adapter.implementations[0]
        way = f"load it with attn_implementation='{right}'"  # attention of a model's own takes no other name later
        raise UnsupportedModelError(
            f"attn_implementation='{original}' cannot be kept for the ordinary calls of this architecture; "
            + (way if adapter.masks == "own" else f"call model.set_attn_implementation('{right}') first")
        )


def check_backend(inner: PreTrainedModel, asked: str) -> None:
    """Refuse a backend that cannot run a model where it is, and tell the user of a choice that he may not expect.

    Args:
        inner: The model.
        asked: One of ``BACKENDS``.

    Raises:
        FlexpatchError, UnsupportedModelError: With the way out.
    """
    config = text_config(inner)
    if asked == "fa4":
        check_fa4()
        if adapter_for(inner.config).masks in ("none", "own"):
            raise UnsupportedModelError(f"{type(inner).__name__} has no attention for its kernels: pass backend='auto'")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        check_fa4_model(head_dim, getattr(config, "attn_logit_softcapping", None))
    if asked != "dense" and len(set((getattr(inner, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedModelError(
            "device_map puts this model on several devices, but a block mask lives on one. Load it on one device (FSDP "
            "or DeepSpeed for several), or pass backend='dense'"
        )
    tell(_choice(inner, device_of(inner), asked), again=True)


def check_ranks(model: nn.Module, *, call: bool = True) -> None:
    """Refuse a model whose ranks hold parts of sequences.

    Args:
        model: Any module.
        call: Whether this is before a call: later calls of a model look less thoroughly than its first.

    Raises:
        UnsupportedModelError: If context or sequence parallelism is on.
    """
    check = parallelism.check_call if call else parallelism.check_parallelism
    check(model, ALL_ATTENTION_FUNCTIONS)


def backend_at(inner: PreTrainedModel, device: torch.device, asked: str) -> str:
    """Choose the backend of rows.

    It is chosen anew at each call, because a model may be moved after ``apply``. Its user is then told of a change.

    Args:
        inner: The model.
        device: Where the rows are.
        asked: The backend that ``apply`` was given.

    Returns:
        ``"flex"``, ``"fa4"`` or ``"dense"``.
    """
    return tell(_choice(inner, device, asked))


def _choice(inner: PreTrainedModel, device: torch.device, asked: str) -> Choice:
    return choose(asked, device, heads_of(decoder_of(inner)), attention_dtype(inner, device))


def mask_dtype(inner: PreTrainedModel, device: torch.device, asked: str) -> torch.dtype | None:
    """Choose the kind of mask that :func:`flexpatch.masks.mask_of` must build.

    Args:
        inner: A patched model.
        device: Where its rows are.
        asked: The backend that ``apply`` was given.

    Returns:
        The function's ``dtype``: ``None`` for a block mask, another for a dense one.
    """
    if backend_at(inner, device, asked) != "dense":
        return None
    return torch.bool if dense_original(inner, adapter_for(inner.config)) == "sdpa" else inner.dtype


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, *args: Any, original: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for a layer. q is (B, H, L, D), k and v are (B, G, L, D); the output is (B, L, H, D)."""
    call = kwargs.pop(CALL, None)
    if call is None and not torch.compiler.is_compiling():
        call = row_of(attention_mask)
    if isinstance(call, Row):
        call.check_attention(module, q, k, attention_mask)
    if isinstance(attention_mask, BlockMask):
        return flex(q, k, v, attention_mask, fa4=isinstance(call, Row) and call.fa4, **kwargs), None
    # Attention that is not causal is another's than tokens': Inkling 2 attends to its earlier layers by it.
    alone = call is None and len(q) > 1 and getattr(module, "is_causal", True)
    alone = alone and not kwargs.get("use_cache") and not torch.compiler.is_compiling()
    if alone and marks(module.config):
        warn_as_given("of a model built from a patched one's settings, such as a trainer's reference (apply to it),")
    if isinstance(call, Kernel):
        original = call.dense
    if kwargs.get("indices") is not None and not is_flash(original):
        attention_mask = _chosen(attention_mask, kwargs.pop("indices"), q.dtype)
    if (blocks := kwargs.pop("block_indices", None)) is not None:  # likewise, of MiniMax M3
        positions = kwargs["position_ids"].expand(len(q), -1)
        make: Any = module.indexer.build_block_mask  # type: ignore[union-attr, operator]
        attention_mask = make(blocks, attention_mask, k.shape[2], q.dtype, q.device, positions)
    function = _eager_of(module) if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
    named: Any = _NamedAs(module, original) if is_flash(original) else module
    return function(named, q, k, v, attention_mask, *args, **kwargs)


def _chosen(mask: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Take all keys but the chosen ones out of a mask. Models do so themselves for attention of the names that they
    know, and hand the choice to any other.

    Args:
        mask: (B, 1, L, S) bool, True where attention is allowed, or numbers to be added to scores.
        indices: (B, L, K) the chosen keys of each query.
        dtype: Of the queries.

    Returns:
        The mask, as theirs.
    """
    others = torch.ones_like(mask.expand(len(indices), *mask.shape[1:])[:, 0], dtype=torch.bool)
    others = others.scatter(-1, indices.long(), False)[:, None]
    return mask & ~others if mask.dtype == torch.bool else mask.masked_fill(others, torch.finfo(dtype).min)


class _NamedAs:
    """Stands in for an attention layer, with the original's name in its configuration: kernels are found by that."""

    def __init__(self, module: nn.Module, original: str) -> None:
        self._module, self._original = module, original

    @property
    def config(self) -> Any:
        return _Overlay(self._module.config, self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Overlay:
    """Stands in for a configuration, with another attention implementation."""

    def __init__(self, config: Any, original: str) -> None:
        self._config, self._attn_implementation = config, original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def warn_as_given(reason: str) -> None:
    """Say, once for each reason, that batches run as they are given."""
    warnings.warn(f"flexpatch: batches {reason} run as they are given", FlexpatchWarning, 2)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """Find the eager attention in the file that defines ``module``'s class. Its bases are searched too, because FSDP2
    and others swap a module's class for a subclass that is defined elsewhere."""
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(f"no eager attention found for {type(module).__name__}; load the model with 'sdpa'")


def register_name(original: str, masks: Mapping[str, Callable[..., Any]] = ALL_MASK_ATTENTION_FUNCTIONS) -> str:
    """Make the name known that tells an original.

    The mask function too: without it transformers would pass no mask at all to ordinary calls, padding included.

    Args:
        original: An attention implementation that transformers knows.
        masks: Mask functions by name.

    Returns:
        The name.
    """
    name = f"{PREFIX}{original}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, original=original))
        AttentionMaskInterface.register(name, masks[original if original in masks else "flash_attention_2"])
    return name


def take_attention(inner: PreTrainedModel, original: str) -> None:
    """Give a model the attention implementation whose name tells its original.

    Args:
        inner: The model.
        original: Its own.

    Raises:
        UnsupportedModelError: If it does not take it.
    """
    set_attention(inner, register_name(original))
    if attention_name(inner) == original:
        raise UnsupportedModelError(f"{type(inner).__name__} does not take its attention from transformers' registry")


# At import, so that an unpickled patched model works in a process that never called apply.
for _original in ORIGINALS:
    register_name(_original)
