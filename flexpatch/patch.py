"""Apply and remove the patch: the public verbs.

``apply`` gives a model an attention implementation of its own, whose name tells the original one, and its backbone
three hooks. The first folds an ordinary batch into one row, the second brings the hidden states back into the batch's
layout, the third makes log-probs of them where asked. No class is altered.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from flexpatch.branching import choose
from flexpatch.checkpointing import renamed
from flexpatch.compiled import check_forwards, compile_layers
from flexpatch.counts import Savings
from flexpatch.dispatch import (
    backend_at,
    check_backend,
    check_original,
    check_ranks,
    dense_original,
    is_ours,
    is_patched,
    original_of,
    take_attention,
)
from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.forward import BackboneHook, hook_of, register_hooks, remove_hooks
from flexpatch.internals import (
    AnyModel,
    attention_name,
    backbone_of,
    device_of,
    layers_of,
    only_pretrained,
    pretrained,
    set_attention,
    text_config,
)
from flexpatch.mixers import check_mixers
from flexpatch.quantizers import check_quantization
from flexpatch.refusals import check_dropout, check_mode
from flexpatch.registry import adapter_for
from flexpatch.row_images import own_inputs
from flexpatch.rows import Rows
from flexpatch.trainers import is_trainer, models_of, warn_of_another
from flexpatch.tuners import check_tuners

log = logging.getLogger(__name__)
AnyModelOrTrainer = TypeVar("AnyModelOrTrainer")


def apply(
    model: AnyModelOrTrainer,
    *,
    backend: str = "auto",
    fold: bool = True,
    compile: bool = False,
    mixers: str = "auto",
    recompute_layers: int | str | None = None,
    shared_dropout: bool = False,
    checkpointing: int | str | None = None,
) -> AnyModelOrTrainer:
    """Let ``model`` compute shared prefixes once, in ordinary padded batches and in packed rows.

    An ordinary forward over a padded (N, S) batch without a cache runs as one row of prefix trees if that leaves at
    least a tenth of its tokens out. Callers see the same hidden states, logits and gradients as before. Calls with a
    cache, generation among them, stay bit-identical. Works before or after ``peft.get_peft_model``, and is idempotent:
    a later call sets all options anew. :func:`remove` undoes it.

    Args:
        model: A causal language model of transformers, bare or wrapped (peft, DDP). Or a trainer after it was built:
            all models that it holds are patched, and none makes a cache that was not asked for.
        backend: ``"flex"``: compiled FlexAttention; ``"fa4"``: the same on FlashAttention-4's kernels (where
            flash-attn-4 is installed), faster for prompts of thousands of tokens, in 16 bits, without soft caps or
            windows, and with gradients whose last bits differ from run to run; ``"dense"``: the model's own attention
            under an L x L mask, for devices on which flex cannot train; ``"auto"``: flex on XPU and on CUDA cards that
            its kernels fit (deep rows on FlashAttention-4's where that is installed), dense elsewhere.
        fold: Fold ordinary batches. Without it they run as they are given.
        compile: Compile decoder layers for rows on the flex backend, whose lengths are then padded to a few (at most a
            quarter longer). All other calls stay uncompiled. Each length compiles for 10 to 50 s: worth it for
            full rows of one budget, such as packed batches.
        mixers: Layers that no mask can cut (scans, convolutions) run ``"branched"`` on the row, from their parents'
            states, or ``"unshared"`` on separate sequences. ``"auto"``: branched where that is known to be exact.
        recompute_layers: How many layers, from the first, to recompute in backward where the model's gradient
            checkpointing is on. ``"partly"``: all layers, but for their matrix products and attention. ``"auto"``: as
            little as memory allows, measured over the first optimizer steps (CUDA; all, with a warning, under ZeRO-3,
            whose ranks must agree); ``None``: all, as the model would.
        shared_dropout: Accept dropout in training. Tokens that are computed once then have one draw; unpatched, they
            have one for each answer. Without this consent dropout is refused.
        checkpointing: The former name of ``recompute_layers``. Deprecated.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: If this architecture or configuration would not be exact; of a trainer, its policy's. Its
            other models then run as they are, with a warning.
        FlexpatchError: For unknown options.
    """
    if checkpointing is not None:
        recompute_layers = renamed(recompute_layers, checkpointing)
    options: dict[str, Any] = dict(backend=backend, fold=fold, compile=compile, mixers=mixers)
    options |= dict(recompute_layers=recompute_layers, shared_dropout=shared_dropout)
    if is_trainer(model):
        _apply_to_trainer(model, options)
    else:
        _apply(model, options)  # type: ignore[arg-type]  # an error of its own for what is neither
    return model


def _apply_to_trainer(trainer: Any, options: dict[str, Any]) -> None:
    """Patch all models of a trainer."""
    if hook_of(trainer.model) is None:
        warn_of_another(trainer)
    for name, model in models_of(trainer).items():
        try:
            _apply(model, options, trains=name == "model")
        except UnsupportedModelError as error:
            if name == "model":
                raise
            message = f"flexpatch: the trainer's {name} runs as it is: {error}"
            warnings.warn(message, FlexpatchWarning, 3)
        else:
            hook = hook_of(model)
            assert hook is not None
            hook.folding.of_trainer = True


def _apply(model: nn.Module, options: dict[str, Any], trains: bool = False) -> None:
    """Patch one model. ``trains``: whether it is known to be a trainer's policy."""
    backend, compile, recompute_layers = (options[name] for name in ("backend", "compile", "recompute_layers"))
    hook = BackboneHook(**options)
    pretrained(model)
    check_tuners(model)
    inner = only_pretrained(model)
    config = text_config(inner)
    adapter, original = adapter_for(inner.config), original_of(attention_name(inner))
    check_original(original, adapter)
    check_quantization(model)
    check_dropout(model, trains=trains, shared_dropout=options["shared_dropout"])
    check_ranks(model, call=False)
    check_backend(inner, backend)  # the last: it may warn
    backbone = backbone_of(inner)
    layers = layers_of(backbone)
    if (compile or recompute_layers is not None) and not layers:
        raise UnsupportedModelError(f"{type(inner).__name__} has no list of decoder layers to compile or recompute")
    check_mixers(backbone, config, adapter, compile=compile)
    branched = choose(backbone, adapter, hook.way)  # before anything changes: it may raise
    if compile:
        check_forwards(layers)
    if adapter.masks != "own":
        take_attention(inner, original)
    hook.dense = dense_original(inner, adapter)
    previous = hook_of(inner)
    if previous is not None:
        hook.folding.counts, hook.folding.of_trainer = previous.folding.counts, previous.folding.of_trainer
    remove_hooks(inner)
    if compile:
        compile_layers(layers)
    register_hooks(inner, hook, adapter, branched)
    if previous is None or previous.folding.backend != backend:
        log.info(
            "flexpatch: %s rows run on the %s backend on %s", type(inner).__name__, backend_of(inner), device_of(inner)
        )


def remove(model: AnyModelOrTrainer) -> AnyModelOrTrainer:
    """Undo :func:`apply`: the model, or each model of a trainer, is as it was before.

    Returns:
        ``model``; one that was never patched is returned as it is.
    """
    for each in models_of(model).values() if is_trainer(model) else [model]:
        _remove(each)  # type: ignore[arg-type]
    return model


def _remove(model: nn.Module) -> None:
    inner = only_pretrained(model)
    name = attention_name(inner)
    if is_ours(name):
        set_attention(inner, original_of(name))
    remove_hooks(inner)


@contextmanager
def disabled(model: AnyModel) -> Iterator[AnyModel]:
    """Run ``model`` unpatched within a ``with`` block: ordinary batches are not folded.

    For calls in which a hook inside the layers must see the batch as it was given, such as steering, probing or
    patching activations of single sequences. Rows of your own run as ever.

    Args:
        model: A model; one that was never patched runs as it is.
    """
    hook = hook_of(only_pretrained(model))
    if hook is None:
        yield model
        return
    hook.disabled += 1
    try:
        yield model
    finally:
        hook.disabled -= 1


def is_applied(model: nn.Module) -> bool:
    """Tell whether ``model`` was patched by :func:`apply`."""
    return hook_of(pretrained(model)) is not None


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the options that ``model`` was patched with, as :func:`apply` takes them; ``None`` without a patch."""
    hook = hook_of(pretrained(model))
    return None if hook is None else hook.settings()


def backend_of(model: nn.Module) -> str:
    """Return ``"flex"``, ``"fa4"`` or ``"dense"``: the backend of a patched model's rows where it is now.

    Raises:
        FlexpatchError: If the model is not patched.
    """
    inner = pretrained(model)
    return backend_at(inner, device_of(inner), _hook(inner).folding.backend)


def _hook(inner: nn.Module) -> BackboneHook:
    """Find the hook of a model that takes rows."""
    hook = hook_of(inner)
    if hook is None or not is_patched(pretrained(inner), hook.dense):
        raise FlexpatchError("this model does not take packed rows yet: call flexpatch.apply(model) first")
    return hook


def model_inputs(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """Make the keyword arguments with which ``model(**kwargs)`` runs ``rows``.

    Args:
        model: A model after :func:`apply`.
        rows: Packed rows on the model's device.

    Returns:
        ``input_ids`` and ``position_ids`` (B, L) int64, ``attention_mask`` (a mask, or a dict of masks by layer type)
        and ``use_cache=False``; tensors of images where rows have some.

    Raises:
        FlexpatchError: If the model is not patched, the rows are on another device, an id is outside the vocabulary, or
            images do not match their placeholders (the message names the sample).
        UnsupportedModelError: For active dropout, router auxiliary losses, or sequences on both sides of longrope's
            switching length.
    """
    inner = pretrained(model)
    if not isinstance(rows, Rows):
        raise FlexpatchError(
            f"expected packed rows, got {type(rows).__name__}: flexpatch.Collator(tokenizer)(examples), or "
            "flexpatch.build_rows([trees])"
        )
    hook = _hook(inner)
    device = device_of(inner)
    if rows.input_ids.device != device:
        raise FlexpatchError(
            f"the rows are on {rows.input_ids.device}, the model on {device}: pass rows.to(model.device)"
        )
    check_ranks(inner)
    if (reason := check_mode(model, shared_dropout=hook.folding.shared_dropout)) is not None:
        raise FlexpatchError(f"rows cannot run {reason}")
    return own_inputs(inner, rows, adapter_for(inner.config), hook.folding.backend)


def savings(model: nn.Module, last: int | None = None) -> Savings:
    """Return what folding saved. Reference passes and evaluation count too.

    Args:
        model: A model after :func:`apply`.
        last: How many of the latest batches to count; ``None``: all that are kept, at most 10,000.

    Returns:
        Tokens given and computed, and why batches ran as they were given. It prints as a sentence.

    Raises:
        FlexpatchError: If the model does not fold batches, or for ``last < 1``.
    """
    inner = pretrained(model)
    hook = hook_of(inner)
    if hook is None and is_ours(attention_name(inner)):
        raise FlexpatchError(
            "this model was built from a patched one's settings, such as a trainer's own reference, and has no hooks: "
            "all its batches run as they are given. Call flexpatch.apply on it too (flexpatch.apply(trainer.ref_model))"
        )
    if hook is None or not hook.fold:
        raise FlexpatchError("this model does not fold batches: call flexpatch.apply(model) first")
    if last is not None and last < 1:
        raise FlexpatchError(f"last={last}; expected at least 1, or None for all")
    return Savings.of(list(hook.folding.counts)[-(last or 0) :])
