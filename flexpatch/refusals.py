"""Reject model states, and rows, in which sharing a prefix would change results. Errors name the way out."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.quantized_layers import layer_fault
from flexpatch.registry import adapter_for, decoder_config
from flexpatch.rows import Rows
from flexpatch.settings import ropes
from flexpatch.tuners import as_given, refusal

# Names under which modules keep the rates of dropout that is no module: ``functional.dropout`` takes them.
RATES = (
    *("attention_dropout", "residual_dropout", "dropout", "hidden_dropout", "activation_dropout", "attn_dropout_p"),
    *("dropout_rate", "resid_pdrop"),
)


def check_mode(model: nn.Module, *, shared_dropout: bool = False) -> str | None:
    """Refuse modules that do not act on each token alone.

    Args:
        model: A model, or its backbone.
        shared_dropout: Let dropout pass: tokens that are computed once have one draw.

    Returns:
        The reason for which this one call has to run as it is given (peft's hooks for it); ``None`` without one.

    Raises:
        UnsupportedModelError: For active dropout, NEFTune or router noise, peft adapters that look at more than one
            token, quantized layers with one scale for all tokens, or reentrant checkpointing of layers that share keys
            and values.
    """
    todo = [model]
    shares, reentrant = False, False
    reason = None
    # Before every call, so it must cost little: attributes that a module lacks are slow to ask for, and so are names.
    while todo:
        module = todo.pop()
        has = module.__dict__
        todo += [child for child in has["_modules"].values() if child is not None]
        if type(module).__module__ == "torch.nn.modules.container":
            continue  # half of all modules under LoRA
        if module.training:
            if not shared_dropout and (rate := dropout_of(module)):
                raise _dropout_error(model, module, rate)
            if has.get("attention_dropout"):
                raise UnsupportedModelError(
                    f"attention_dropout {has['attention_dropout']} in '{_name(model, module)}' is active: kernels of "
                    "rows draw none. Set it to 0.0"
                )
            if has.get("neftune_noise_alpha"):
                raise UnsupportedModelError(
                    f"NEFTune noise on '{_name(model, module)}' is active: its size depends on the length of a row, "
                    "and answers would share one draw. Leave neftune_noise_alpha unset"
                )
            if noise := has.get("jitter_noise") or has.get("moe_jitter_eps"):
                setting = "router_jitter_noise" if has.get("jitter_noise") else "ffn_config.moe_jitter_eps"
                raise UnsupportedModelError(
                    f"router jitter noise {noise} in '{_name(model, module)}' is active: answers would share one draw "
                    f"on shared tokens. Set config.{setting} = 0.0 before the model is built"
                )
            shares = shares or has.get("is_kv_shared_layer", False)
            if has.get("gradient_checkpointing"):
                reentrant = reentrant or _is_reentrant(has.get("_gradient_checkpointing_func"))
        if has["_forward_hooks"] or has["_forward_pre_hooks"]:
            reason = reason or as_given(module)
        if (fault := layer_fault(module)) is not None:  # FP8 of accelerate's prepare, for one, comes after apply
            raise UnsupportedModelError(f"'{_name(model, module)}' ({type(module).__name__}) {fault}")
        # A folded batch is seen by the backbone alone, above which peft keeps its settings: layers must tell.
        if why := refusal(module):
            raise UnsupportedModelError(f"'{_name(model, module) or type(module).__name__}': {why}")
    if shares and reentrant:
        raise UnsupportedModelError(
            "this model's last layers use keys and values of earlier ones, which get no gradient through reentrant "
            "checkpointing, unpatched either: model.gradient_checkpointing_enable({'use_reentrant': False})"
        )
    return reason


def dropout_of(module: nn.Module) -> float:
    """Return the rate of a module's own dropout. Modules keep it whatever the configuration says by now."""
    if isinstance(module, nn.Dropout):
        return module.p
    return next(filter(None, map(module.__dict__.get, RATES)), 0.0)


def check_dropout(model: nn.Module, *, trains: bool, shared_dropout: bool) -> None:
    """Refuse dropout of a model that is going to train: at ``apply``, before hours of generation.

    Args:
        model: The model.
        trains: Whether it is known to train. Otherwise it counts as training in its training mode, or with adapters:
            some weights trainable, others frozen.
        shared_dropout: Let it pass, as in :func:`check_mode`.

    Raises:
        UnsupportedModelError: Naming the module.
    """
    if shared_dropout:
        return
    trainable = {parameter.requires_grad for parameter in model.parameters()}
    for module in model.modules():
        if (rate := dropout_of(module)) and True in trainable and (trains or module.training or False in trainable):
            raise _dropout_error(model, module, rate)


def _dropout_error(model: nn.Module, module: nn.Module, rate: float) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"dropout {rate} in '{_name(model, module)}' is active in training: answers would share one draw on shared "
        "tokens, which the unpatched model does not. Set it to 0.0 (for LoRA: LoraConfig(lora_dropout=0.0)), or accept "
        "it: flexpatch.apply(model, shared_dropout=True)"
    )


def _is_reentrant(function: Any) -> bool:
    """Tell whether a layer's checkpointing function is known to be reentrant.

    transformers makes a ``functools.partial``; others wrap it in functions of their own (LLaMA-Factory, by default).
    One that hides its setting counts as not reentrant: nothing else of a layer tells.
    """
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        setting = (getattr(function, "keywords", None) or {}).get("use_reentrant")
        if setting is not None:
            return bool(setting)
        function = getattr(function, "func", None) or getattr(function, "__wrapped__", None)
    return False


def check_routers(layers: Iterable[nn.Module]) -> None:
    """Refuse router logits, which a call asks for, of layers of which reentrant checkpointing recomputes some.

    It runs them without gradients, also where hooks record a router's logits: an auxiliary loss would train the routers
    of other layers alone.

    Args:
        layers: Checkpointed layers.

    Raises:
        UnsupportedModelError: With the way out.
    """
    if any(_is_reentrant(vars(layer).get("_gradient_checkpointing_func")) for layer in layers):
        raise UnsupportedModelError(
            "router logits get no gradient in layers that reentrant checkpointing recomputes, unpatched either, but do "
            "in those that recompute_layers keeps: model.gradient_checkpointing_enable({'use_reentrant': False}), or "
            "leave recompute_layers unset"
        )


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def check_rows(config: Any, rows: Rows, placeholders: Sequence[int] = ()) -> None:
    """Refuse rows that this model cannot run exactly.

    Args:
        config: The configuration of the model, with that of its text stack.
        rows: Packed rows.
        placeholders: Ids that models never look up.

    Raises:
        FlexpatchError: For ids outside the vocabulary, naming the sample.
        UnsupportedModelError: For router auxiliary losses, or sequences on both sides of longrope's switching length.
    """
    adapter, config = adapter_for(config), decoder_config(config)
    for i, (sample, largest) in enumerate(zip(rows.samples, rows.largest_ids, strict=True)):
        if largest in placeholders:  # another id may be too large too
            own = rows.input_ids.flatten()[slice(*[*rows.starts, None][i : i + 2])].tolist()
            largest = max((token for token in own if token not in placeholders), default=0)
        if largest >= config.vocab_size:
            raise FlexpatchError(
                f"sample {sample}: id {largest} is outside the vocabulary of {config.vocab_size} tokens"
            )
    if rows.pad_id >= config.vocab_size:
        raise FlexpatchError(f"pad_id={rows.pad_id} is outside the vocabulary of {config.vocab_size} tokens")
    if (most := adapter.longest(config)) is not None and rows.depth > most:
        raise UnsupportedModelError(
            f"a sequence has {rows.depth} tokens, and this architecture is not exact with more than {most}: it chooses "
            "keys by numbers that equal tokens have in common, and settles ties by the shape of a batch"
        )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            "output_router_logits=True: the router's auxiliary loss would weigh a shared prompt once instead of once "
            "for each answer. Set model.config.output_router_logits = False"
        )
    if (limit := longrope_limit(config)) is not None:
        shortest = min([*rows.sequence_lengths, rows.depth])
        if shortest <= limit < rows.depth:
            raise UnsupportedModelError(
                f"longrope switches its frequencies at {limit} tokens for the whole call, but these sequences have "
                f"{shortest} to {rows.depth}: put shorter and longer ones in separate rows"
            )


def scaling_limit(config: Any) -> int | None:
    """Return the position from which on queries are scaled by where they are (Ministral 3); ``None``: nowhere."""
    limits = (r["original_max_position_embeddings"] for r in ropes(config).values() if r.get("llama_4_scaling_beta"))
    return min(limits, default=None)


def longrope_limit(config: Any) -> int | None:
    """Return the length above which longrope uses other frequencies for a whole call; ``None`` without longrope."""
    longrope = ropes(config).get("longrope")
    return None if longrope is None else longrope["original_max_position_embeddings"]
