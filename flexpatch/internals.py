"""Find things in a transformers model: its text stack, decoder layers, head, weights, and the arguments of its calls.

This module and ``dispatch`` alone import names from below the top level of transformers. They rely on these facts:

- ``AttentionInterface`` and ``AttentionMaskInterface`` accept new names, and ``set_attn_implementation`` sets them;
- a 4-D mask, or a dict of masks keyed by ``config.layer_types``, reaches the attention function untouched;
- ``position_ids`` reaches rope untouched, and arguments that a model does not know reach the attention function;
- a causal model calls ``base_model`` once, as a module, needs only the hidden states that it returns, and passes on
  ``hidden_states``;
- decoder layers are ``GradientCheckpointingLayer`` objects in a list, each with a flag of its own.

tests/test_internals.py has a probe for each of them.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from transformers.utils.output_capturing import _active_collector as COLLECTOR
except ImportError:  # transformers before 5.2 replaces the forwards of modules whose outputs it records
    COLLECTOR = None  # type: ignore[assignment]

from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.layouts import media_of
from flexpatch.registry import UNCHANGED, LogitTransform, adapter_for, decoder_config

# Settings by which models change their head's output.
LOGIT_SETTINGS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping", *(
    "logits_soft_cap", "output_logit_soft_cap"))  # fmt: skip
# Ministral 3 in transformers before 5.4 took a query's index in the row for its position. Drop this with 5.3.
SCALES_BY_INDEX = Version(transformers.__version__) < Version("5.4")

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def pretrained(model: nn.Module) -> PreTrainedModel:
    """Find the transformers model inside ``model``.

    Raises:
        FlexpatchError: If there is none. The message says what was given and how to load a model.
    """
    if (found := find_pretrained(model)) is None:
        raise FlexpatchError(_no_model(model))
    return found


def find_pretrained(model: Any) -> PreTrainedModel | None:
    """Return the first transformers model in a module; ``None`` if there is none, or it is no module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((m for m in modules if isinstance(m, PreTrainedModel)), None)


def only_pretrained(model: nn.Module) -> PreTrainedModel:
    """Find the one transformers model inside ``model``.

    Raises:
        FlexpatchError: If there is none, or a second one beside it, which would be left out without a word.
    """
    inner = pretrained(model)
    within = set(inner.modules())
    others = [name for name, m in model.named_modules() if isinstance(m, PreTrainedModel) and m not in within]
    if others:
        raise FlexpatchError(
            f"{type(model).__name__} holds several transformers models, '{others[0]}' beside the first: pass them one "
            "at a time"
        )
    return inner


def _no_model(given: Any) -> str:
    """Say what was given in place of a model, and how to come by one."""
    if isinstance(given, nn.Module):
        return f"{type(given).__name__} holds no transformers model; pass a PreTrainedModel, bare or wrapped"
    wanted = "a loaded transformers model, bare or wrapped (peft, DDP)"
    if isinstance(given, str):
        return f"expected {wanted}, got the name {given!r:.60}: AutoModelForCausalLM.from_pretrained({given!r:.60})"
    if isinstance(given, type):
        return f"expected {wanted}, got the class {given.__name__}: pass an instance of it"
    if isinstance(getattr(given, "model", None), nn.Module):
        return f"expected {wanted}, got {type(given).__name__}: pass its .model"
    return f"expected {wanted}, got {type(given).__name__}"


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the transformers model inside ``model``; of a multimodal one, its text stack's.

    Raises:
        UnsupportedModelError: For a multimodal model whose type no adapter serves.
    """
    return decoder_config(pretrained(model).config)


def decoder_of(inner: PreTrainedModel) -> PreTrainedModel:
    """Find the module with the text configuration: ``inner``, or the text stack of a multimodal model."""
    config = inner.config.get_text_config()
    return next(m for m in inner.modules() if isinstance(m, PreTrainedModel) and m.config is config)


def backbone_of(inner: PreTrainedModel) -> PreTrainedModel:
    """Find the module that makes hidden states: not ``base_model`` in Llama 4, and a part of that in OPT."""
    within = inner.children() if inner.base_model is inner and hasattr(inner, "lm_head") else ()
    base = next((child for child in within if isinstance(child, PreTrainedModel)), inner.base_model)
    parts = [*base.children(), base]
    return parts[0] if len(parts) == 2 and isinstance(parts[0], PreTrainedModel) else base


def layers_of(backbone: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """List the decoder layers of a backbone. Empty if another library wrapped or replaced them."""
    lists = (child for child in decoder_of(backbone).children() if isinstance(child, nn.ModuleList))
    return [layer for layers in lists for layer in layers if isinstance(layer, GradientCheckpointingLayer)]


def device_of(inner: PreTrainedModel) -> torch.device:
    """Return the device of the input embeddings, where token ids are expected."""
    table = inner.get_input_embeddings()  # ZeRO-3 takes a weight that is read by its name for used, and gathers it
    return next((p.device for p in table.parameters()), None) or table.weight.device


def attention_dtype(inner: PreTrainedModel, device: torch.device) -> torch.dtype:
    """Find the dtype in which attention computes.

    Args:
        inner, device: The model, and where it computes.

    Returns:
        The model's dtype, or that of autocast where it is on.
    """
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else inner.dtype


def attention_name(inner: PreTrainedModel) -> str:
    """Return the name of the attention implementation of ``inner``'s text layers."""
    return str(inner.config.get_text_config()._attn_implementation)


def set_attention(inner: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of ``inner``'s text layers.

    Layers may carry copies of the configuration (peft's ``layer_replication`` makes such): these are set too.

    Args:
        inner, name: The model, and a registered name.
    """
    decoder = decoder_of(inner)
    before = attention_name(decoder)
    if "flash" in name or adapter_for(inner.config).masks == "none":
        # The method would look for kernels of this name, and leaves models without attention as they are.
        decoder.config._attn_implementation = name
    else:
        decoder.set_attn_implementation(name)
    for module in decoder.modules():
        config = module.__dict__.get("config")
        if config is not decoder.config and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = decoder.config._attn_implementation


def head_of(model: nn.Module) -> tuple[nn.Module, LogitTransform]:
    """Return the layers that make logits, and the transform that the model applies to their output.

    Raises:
        FlexpatchError: For a model without a head.
        UnsupportedModelError: If its logits are scaled or capped, and its adapter does not say how.
    """
    inner = pretrained(model)
    config, adapter = decoder_config(inner.config), adapter_for(inner.config)
    transform, head = adapter.logit_transform(config), inner.get_output_embeddings()
    if head is None:
        raise FlexpatchError(f"{type(inner).__name__} makes no logits; load it with AutoModelForCausalLM")
    if (record := media_of(inner.config)) is not None and not record.text_logits:
        return head, UNCHANGED  # Aya Vision leaves out the scale of its text model's own class
    for name in LOGIT_SETTINGS:
        if transform == UNCHANGED and getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"config.{name}={getattr(config, name)} changes the logits of this model, but its adapter does not say "
                "how: give it logit_transform=lambda config: LogitTransform(...)"
            )
    layers = *map(inner.get_submodule, adapter.before_head), head
    return nn.Sequential(*layers) if adapter.before_head else head, transform


def parameters_of(backbone: nn.Module) -> Mapping[str, Parameter]:
    """Return the parameters of a backbone's forward by name, ``self`` among them."""
    return signature(type(backbone).forward).parameters


def arguments_of(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return all arguments of a backbone's call by name.

    Args:
        backbone, args, kwargs: The backbone that is called, and its positional and other arguments.

    Returns:
        A new dict; ``None`` if a wrapper around the forward hides the names of positional arguments.
    """
    if not args:
        return dict(kwargs)
    parameters = parameters_of(backbone).values()
    names = [parameter.name for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]
    return None if len(names) < len(args) else dict(zip(names, args, strict=False)) | kwargs


def takes_argument(backbone: PreTrainedModel, call: Mapping[str, Any], name: str) -> bool:
    """Tell whether a backbone takes an argument. Multimodal ones hand those that they do not know to their text stack.

    Args:
        backbone, call: The backbone that is called, and the call's arguments by name.
        name: Of the argument.

    Returns:
        Whether it does.
    """
    return name in call or name in parameters_of(backbone) or name in parameters_of(decoder_of(backbone))


def change_tokens(output: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Put ``change(tensor)`` in place of every tensor of a backbone's output that has one entry for each token.

    Args:
        output: A ``ModelOutput`` with ``last_hidden_state``, and perhaps ``hidden_states`` and ``router_logits``. It is
            changed in place.
        change: Takes and returns (B, L, ...). Called once for each tensor: a last hidden state that stands in both
            places stays one tensor.
    """
    last = output.last_hidden_state
    output.last_hidden_state = change(last)
    if output.get("router_logits") is not None:
        # One (B * L, experts) tensor for each layer, all rows behind each other.
        shaped = (None if r is None else r.reshape(*last.shape[:2], -1) for r in output.router_logits)
        output.router_logits = tuple(None if r is None else change(r).flatten(0, 1) for r in shaped)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(
            output.last_hidden_state if h is last else h if h is None else change(h) for h in output.hidden_states
        )


# --- weights ------------------------------------------------------------------------------------------------------


def eager_experts(model: AnyModel) -> AnyModel:
    """Let mixture-of-experts layers run in any dtype: their grouped matrix products have no float64.

    Returns:
        ``model``.
    """
    for inner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        if inner._can_set_experts_implementation():  # a multimodal class may not know, where its text model does
            inner.set_experts_implementation("eager")
    return model


def is_torchao(tensor: Tensor) -> bool:
    """Tell whether a weight is torchao's: a tensor class of its own, for which few operations are defined."""
    return type(tensor).__module__.split(".")[0] == "torchao"


def dequantize(model: AnyModel) -> AnyModel:
    """Unpack the weights of layers that bitsandbytes or torchao packed. The layers are changed in place.

    Returns:
        ``model``.
    """
    for name, parameter in list(model.named_parameters()):
        if is_torchao(parameter):
            layer, _, last = name.rpartition(".")
            numbers = parameter.detach().dequantize().to(parameter.dtype)
            setattr(model.get_submodule(layer), last, nn.Parameter(numbers, requires_grad=False))
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        pretrained(model).dequantize()
    for name in packed:
        model.get_parameter(name).requires_grad_(False)
    return model


def base_weights(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the weights that an adapter-free forward of ``model`` depends on.

    peft renames a wrapped layer's weight and keeps a trained copy of replaced modules. Both are undone here, so a base
    model has one fingerprint before and after ``get_peft_model``, and while its adapters train.

    Returns:
        The settings by name, JSON-like; the base weights by their names in the base model.
    """
    inner = pretrained(model)
    settings = inner.config.to_dict() | {"_attention": attention_name(inner), "_device": device_of(inner).type}
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    tensors = {}
    for name, tensor in inner.state_dict().items():
        if prefix is None or not (prefix in name or ".modules_to_save." in name):
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return settings, tensors
