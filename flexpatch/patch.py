"""apply, remove and model inputs: the only file that touches transformers' internals.

``apply`` gives a model an attention implementation of its own, ``flexpatch_<original>``. A block mask goes to
FlexAttention; everything else (generation, caches, ordinary batches) goes to the original implementation, unchanged.
The name is the only state: nothing is attached to the model, no class and no module is altered.

What is relied on: ``AttentionInterface`` and ``AttentionMaskInterface`` accept new names;
``PreTrainedModel.set_attn_implementation`` sets them; a 4-D mask, or a dict of them keyed by ``config.layer_types``,
reaches the attention function untouched; ``position_ids`` reaches rope untouched.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from flexpatch.attention import flex
from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.masks import mask_of
from flexpatch.registry import FULL, Adapter, adapter_for, ropes
from flexpatch.tree import Rows

PREFIX = "flexpatch_"
BACKENDS = ("auto", "flex", "dense")
# Implementations that accept a dense 4-D mask, and so can serve both backends.
ORIGINALS = ("sdpa", "eager")

log = logging.getLogger(__name__)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def apply(model: AnyModel, *, backend: str = "auto") -> AnyModel:
    """Let ``model`` run packed rows. Ordinary calls and generation stay bit-identical.

    Works before or after ``peft.get_peft_model``, and is idempotent. Undone by :func:`remove`.

    Args:
        model: A causal language model of transformers, bare or wrapped (peft, DDP).
        backend: ``"flex"``: compiled FlexAttention; ``"dense"``: the model's own attention under an L x L mask, for
            devices on which flex cannot train; ``"auto"``: flex on CUDA and XPU, dense elsewhere.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: If this architecture or configuration would not be exact.
        FlexpatchError: For an unknown backend.
    """
    if backend not in BACKENDS:
        raise FlexpatchError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    inner = _pretrained(model)
    adapter = adapter_for(text_config(inner))
    current = inner.config._attn_implementation
    original = _parse(current)[1] if current.startswith(PREFIX) else current
    if original not in adapter.implementations:
        raise UnsupportedModelError(
            f"attn_implementation='{original}' cannot be kept for the ordinary calls of this architecture; call "
            f"model.set_attn_implementation('{adapter.implementations[0]}') first"
        )
    inner.set_attn_implementation(f"{PREFIX}{backend}_{original}")
    if inner.config._attn_implementation == original:
        raise UnsupportedModelError(f"{type(inner).__name__} does not take its attention from transformers' registry")
    if current != inner.config._attn_implementation:
        device = inner.get_input_embeddings().weight.device
        chosen = "flex" if _mask_dtype(inner, device) is None else "dense"
        log.info("flexpatch: %s rows run on the %s backend on %s", type(inner).__name__, chosen, device)
    return model


def remove(model: AnyModel) -> AnyModel:
    """Undo :func:`apply`. A model that was never patched is returned as it is."""
    inner = _pretrained(model)
    if is_applied(inner):
        inner.set_attn_implementation(_parse(inner.config._attn_implementation)[1])
    return model


def is_applied(model: nn.Module) -> bool:
    """Whether ``model`` takes packed rows."""
    return backend_of(model) is not None


def backend_of(model: nn.Module) -> str | None:
    """The ``backend`` that ``model`` was patched with; ``None`` if it is not patched."""
    name = str(_pretrained(model).config._attn_implementation)
    return _parse(name)[0] if name.startswith(PREFIX) else None


def model_inputs(model: nn.Module, rows: Rows, *, adapter: Adapter | None = None) -> dict[str, Any]:
    """Keyword arguments that make ``model(**kwargs)`` run ``rows``.

    Args:
        model: A model after :func:`apply`.
        rows: Packed rows on the model's device.
        adapter: Instead of the registered one; the verifier breaks masks with it on purpose.

    Returns:
        ``input_ids`` and ``position_ids`` (B, L), ``attention_mask`` (a mask, or a dict of masks by layer type) and
        ``use_cache=False``.

    Raises:
        FlexpatchError: If the model is not patched, the rows are on another device, or an id is outside the vocabulary
            (the message names the sample).
        UnsupportedModelError: For active dropout, router auxiliary losses, or sequences on both sides of longrope's
            switching length.
    """
    inner = _pretrained(model)
    config = text_config(inner)
    if not is_applied(inner):
        raise FlexpatchError("this model does not take packed rows yet: call flexpatch.apply(model) first")
    device = inner.get_input_embeddings().weight.device
    if rows.input_ids.device != device:
        raise FlexpatchError(
            f"the rows are on {rows.input_ids.device}, the model on {device}: pass rows.to(model.device)"
        )
    _check_call(model, config, rows)
    dtype = _mask_dtype(inner, device)
    adapter = adapter or adapter_for(config)
    windows = adapter.windows(config)
    if adapter.masks == "by_layer_type":
        mask: Any = {layer: mask_of(rows, windows[layer], dtype) for layer in dict.fromkeys(config.layer_types)}
    else:
        mask = mask_of(rows, windows[FULL], dtype)
    return dict(input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=mask, use_cache=False)


def text_config(model: nn.Module) -> Any:
    """The configuration of the transformers model inside ``model``.

    Raises:
        UnsupportedModelError: For a multimodal model, whose vision or audio towers would be patched with it.
    """
    inner = _pretrained(model)
    if inner.config.get_text_config() is not inner.config:
        raise UnsupportedModelError(
            f"{type(inner).__name__} is a multimodal model; load its text model instead, for example with "
            "AutoModelForCausalLM.from_pretrained(name, config=config.get_text_config())"
        )
    return inner.config


def eager_experts(model: AnyModel) -> AnyModel:
    """Let mixture-of-experts layers run in any dtype; their grouped matrix products have no float64."""
    inner = _pretrained(model)
    if inner._can_set_experts_implementation():
        inner.set_experts_implementation("eager")
    return model


def weights(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter-free forward of ``model`` depends on: its settings, and its base weights by name.

    peft renames a wrapped layer's weight and keeps a trained copy of replaced modules; both are undone here, so a base
    model has the same fingerprint before and after ``get_peft_model`` and while its adapters train.
    """
    inner = _pretrained(model)
    settings = inner.config.to_dict()
    settings["_attention"] = inner.config._attn_implementation
    settings["_device"] = inner.get_input_embeddings().weight.device.type
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    tensors = {}
    for name, tensor in inner.state_dict().items():
        if prefix is None or not (prefix in name or ".modules_to_save." in name):
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return settings, tensors


def _check_call(model: nn.Module, config: Any, rows: Rows) -> None:
    """Refuse what would be wrong for these rows, or in the model's present mode."""
    for sample, largest in zip(rows.samples, rows.largest_ids, strict=True):
        if largest >= config.vocab_size:
            raise FlexpatchError(
                f"sample {sample}: id {largest} is outside the vocabulary of {config.vocab_size} tokens"
            )
    for name, module in model.named_modules():
        # Attention layers keep the rate they were built with, whatever the configuration says by now.
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if rate and module.training:
            raise UnsupportedModelError(
                f"dropout {rate} in '{name}' is active: answers would share one draw on shared tokens, which the "
                "unpatched model does not. Set it to 0.0 (for LoRA: LoraConfig(lora_dropout=0.0))"
            )
        for adapter, settings in getattr(module, "peft_config", {}).items():
            if settings.is_prompt_learning or getattr(settings, "alora_invocation_tokens", None):
                raise UnsupportedModelError(
                    f"peft adapter '{adapter}' ({settings.peft_type}) adds tokens to a row or looks for some in it, "
                    "once for all answers. Use one that acts on each token alone, such as LoRA"
                )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            "output_router_logits=True: the router's auxiliary loss would weigh a shared prompt once instead of once "
            "for each answer. Set model.config.output_router_logits = False"
        )
    if (longrope := ropes(config).get("longrope")) is not None:
        limit = longrope["original_max_position_embeddings"]
        shortest = min([*rows.sequence_lengths, rows.depth])
        if shortest <= limit < rows.depth:
            raise UnsupportedModelError(
                f"longrope switches its frequencies at {limit} tokens for the whole call, but these sequences have "
                f"{shortest} to {rows.depth}: put shorter and longer ones in separate rows"
            )


def _mask_dtype(inner: PreTrainedModel, device: torch.device) -> torch.dtype | None:
    """The kind of mask :func:`flexpatch.masks.mask_of` must build: a block mask, or what the original takes."""
    backend, original = _parse(inner.config._attn_implementation)
    if backend == "flex" or (backend == "auto" and device.type in ("cuda", "xpu")):
        return None
    return torch.bool if original == "sdpa" else inner.dtype


def _parse(name: str) -> tuple[str, str]:
    """(backend, original implementation) of ``flexpatch_<backend>_<original>``."""
    backend, original = name.removeprefix(PREFIX).split("_", 1)
    return backend, original


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise FlexpatchError(f"{type(model).__name__} holds no transformers model; pass a PreTrainedModel, bare or wrapped")


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, original: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the registered names call. q is (B, H, L, D), k and v are (B, G, L, D); the output is (B, L, H, D)."""
    if isinstance(mask, BlockMask):
        return flex(q, k, v, mask, **kwargs), None
    function = _eager_of(module) if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
    return function(module, q, k, v, mask, *args, **kwargs)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file that defines ``module``'s class. Its bases are searched too, because FSDP2 and
    others swap a module's class for a subclass defined elsewhere."""
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(f"no eager attention found for {type(module).__name__}; load the model with 'sdpa'")


def _register(masks: Mapping[str, Callable[..., Any]] = ALL_MASK_ATTENTION_FUNCTIONS) -> None:
    """Make the names known. At import, so that an unpickled patched model works in a process that never called apply.

    The mask function too: without it transformers would pass no mask at all to ordinary calls, padding included.
    """
    for original in ORIGINALS:
        for backend in BACKENDS:
            name = f"{PREFIX}{backend}_{original}"
            AttentionInterface.register(name, partial(_attention, original=original))
            AttentionMaskInterface.register(name, masks[original])


_register()
