"""apply, remove and model inputs: the only file that touches transformers' internals.

``apply`` gives a model an attention implementation of its own, whose name ends with the original's, and its backbone
three hooks. The first folds an ordinary batch into one row, the second unfolds the hidden states, the third makes
log-probs of them where asked. In attention a block mask goes to FlexAttention; everything else (generation, caches,
batches as they are) goes to the original implementation, unchanged. No class is altered. What the later hooks need
travels with the call's ``input_ids``; the first keeps counts of tokens, sizes of memory, and the latest batch with its
row, for the next call to compare its own batch with: nothing that a result depends on.

What is relied on: ``AttentionInterface`` and ``AttentionMaskInterface`` accept new names;
``PreTrainedModel.set_attn_implementation`` sets them; a 4-D mask, or a dict of them keyed by ``config.layer_types``,
reaches the attention function untouched; ``position_ids`` reaches rope untouched; other arguments reach the attention
function; a causal model calls ``base_model`` once, as a module, needs nothing but the hidden states it returns, and
passes on ``hidden_states``; its layers are ``GradientCheckpointingLayer``s in a list, with a flag each.
tests/test_internals.py has a test for each, tests/test_upgrades.py for what else it relies on, by name.
"""

import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from flexpatch.arrival import Row
from flexpatch.attention import check_fa4, check_fa4_call, check_fa4_model, flex
from flexpatch.checkpointing import Recomputation
from flexpatch.compiled import check_forwards, compile_layers, restore_forward
from flexpatch.devices import Choice, choose, heads_of, tell
from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.fold import (
    WORTH,
    Counts,
    Savings,
    check_ids,
    fold_batch,
    follow_columns,
    longest_hole,
    moved,
    see_themselves,
    unfold,
)
from flexpatch.masks import bucket, mask_of
from flexpatch.parallelism import check_call, check_parallelism
from flexpatch.quantizers import check_quantization
from flexpatch.refusals import check_mode, check_rows, longrope_limit, scaling_limit
from flexpatch.registry import FULL, PLAIN, Adapter, Head, adapter_for, decoder_config
from flexpatch.rows import Rows
from flexpatch.tuners import check_tuners

PREFIX = "flexpatch_"
# No name may hold "flash": transformers would take it for FlashAttention, and pass no masks.
BACKENDS = ("auto", "flex", "fa4", "dense")
# Implementations that accept a dense 4-D mask, and so can serve both backends.
ORIGINALS = ("sdpa", "eager")

# Transformers before 5.4 gave Ministral 3 a query's index in the row for its position. To be dropped with 5.3.
SCALES_BY_INDEX = Version(transformers.__version__) < Version("5.4")

# Marks calls that our hook has seen, for attention and for our hooks after the backbone. A model made from a patched
# one's configuration has the name and no hook. The values: run as given; rows; rows whose ids carry what is left to do.
SEEN = "flexpatch_seen"
GIVEN, ROWS, PENDING = "given", "rows", "pending"
# Names the argument by which attention checks that it got a row whole.
ROW = "flexpatch_row"

# Arguments of multimodal backbones: those that say which tokens are images, and what those show. The former, and
# labels, change nothing where there are no images.
TYPES = ("token_type_ids", "mm_token_type_ids")
IGNORED = {*TYPES, "labels"}
MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs")
IMAGES = "images, sound or video"
# What a call's cache is named: the second from transformers 5.24 on.
CACHES = ("past_key_values", "cache")
# Why a batch ran as it was given, without a warning: folding would keep more than ``WORTH`` of it.
LITTLE = "with too little to share"
# Names the attribute of dense masks that are a row's, and not a caller's own.
OWN = "flexpatch_rows"
# The value of a layer's ``gradient_checkpointing`` for one call that keeps its activations. It counts as False and can
# be told from a user's False, which stays after a call that was interrupted.
KEPT = 0

log = logging.getLogger(__name__)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def apply(
    model: AnyModel,
    *,
    backend: str = "auto",
    fold: bool = True,
    compile: bool = False,
    checkpointing: int | str | None = None,
) -> AnyModel:
    """Let ``model`` compute shared prefixes once, in ordinary padded batches and in packed rows.

    An ordinary forward over a padded (N, S) batch without a cache runs as one row of prefix trees if that leaves at
    least a tenth of its tokens out; callers see the same hidden states, logits and gradients as before. Calls with a
    cache, generation among them, stay bit-identical. Works before or after ``peft.get_peft_model``, and is idempotent:
    a later call sets all options anew. Undone by :func:`remove`.

    Args:
        model: A causal language model of transformers, bare or wrapped (peft, DDP).
        backend: ``"flex"``: compiled FlexAttention; ``"fa4"``: the same on FlashAttention-4's kernels (where
            flash-attn-4 is installed), faster for prompts of thousands of tokens, in 16 bits, without soft caps or
            windows, and with gradients whose last bits differ from run to run; ``"dense"``: the model's own attention
            under an L x L mask, for devices on which flex cannot train; ``"auto"``: flex on XPU and on CUDA cards that
            its kernels fit (docs/cards.md), dense elsewhere.
        fold: Whether to fold ordinary batches. Without it they run as they are given.
        compile: Compile decoder layers for rows on the flex backend, whose lengths are then padded to a few (at most a
            quarter longer), and keep all other calls uncompiled. Each length compiles for most of a minute: worth it
            for full rows of one budget, such as packed batches.
        checkpointing: Where the model's gradient checkpointing is on: how many layers, from the first, to compute
            again in backward. ``"auto"``: as few as memory allows, measured over the first optimizer step (CUDA; all,
            with a warning, under ZeRO-3, whose ranks have to do the same); ``None``: all, as the model would.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: If this architecture or configuration would not be exact.
        FlexpatchError: For unknown options.
    """
    if backend not in BACKENDS:
        raise FlexpatchError(f"backend={backend!r}; expected one of {', '.join(BACKENDS)}")
    hook = _RowHook(compile, None if checkpointing is None else Recomputation(checkpointing))
    _pretrained(model)
    check_tuners(model)
    inner = _only_pretrained(model)
    config = text_config(inner)
    adapter = adapter_for(config)
    decoder = _decoder(inner)
    if backend == "fa4":
        check_fa4()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        check_fa4_model(head_dim, getattr(config, "attn_logit_softcapping", None))
    current = config._attn_implementation
    original = _parse(current)[2] if current.startswith(PREFIX) else current
    if original not in adapter.implementations:
        raise UnsupportedModelError(
            f"attn_implementation='{original}' cannot be kept for the ordinary calls of this architecture; call "
            f"model.set_attn_implementation('{adapter.implementations[0]}') first"
        )
    if backend != "dense" and len(set((getattr(inner, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedModelError(
            "device_map puts this model on several devices, but a block mask lives on one. Load it on one device (FSDP "
            "or DeepSpeed for several), or pass backend='dense'"
        )
    check_quantization(model)
    check_parallelism(model, ALL_ATTENTION_FUNCTIONS)
    # Raises here, before anything is changed, if the backend cannot run where the model is.
    tell(_choice(inner, inner.get_input_embeddings().weight.device, backend), again=True)
    layers = _layers(inner.base_model)
    if (compile or checkpointing is not None) and not layers:
        raise UnsupportedModelError(f"{type(inner).__name__} has no list of decoder layers to compile or checkpoint")
    if compile:
        check_forwards(layers)
    _set_implementation(decoder, f"{PREFIX}{'fold' if fold else 'rows'}_{backend}_{original}")
    if config._attn_implementation == original:
        raise UnsupportedModelError(f"{type(inner).__name__} does not take its attention from transformers' registry")
    previous = _hook_of(inner)
    if previous is not None:
        hook.counts = previous.counts
    _unhook(inner)
    if compile:
        compile_layers(layers)
    inner.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    inner.base_model.register_forward_hook(_after_hook, with_kwargs=True, prepend=True, always_call=True)
    inner.base_model.register_forward_hook(_score_hook, with_kwargs=True)
    if current != config._attn_implementation:
        device = inner.get_input_embeddings().weight.device
        log.info("flexpatch: %s rows run on the %s backend on %s", type(inner).__name__, backend_of(inner), device)
    return model


def remove(model: AnyModel) -> AnyModel:
    """Undo :func:`apply`. A model that was never patched is returned as it is."""
    inner = _only_pretrained(model)
    if is_applied(inner):
        _set_implementation(_decoder(inner), _parse(_implementation(inner))[2])
    _unhook(inner)
    return model


@contextmanager
def disabled(model: AnyModel) -> Iterator[AnyModel]:
    """Run ``model`` unpatched within a ``with`` block: ordinary batches are not folded.

    For calls in which a hook inside the layers must see the batch as it was given, such as steering, probing or
    patching activations of single sequences. Rows of your own run as ever.

    Args:
        model: A model; one that was never patched runs as it is.
    """
    hook = _hook_of(_only_pretrained(model))
    if hook is None:
        yield model
        return
    hook.disabled += 1
    try:
        yield model
    finally:
        hook.disabled -= 1


def is_applied(model: nn.Module) -> bool:
    """Whether ``model`` takes packed rows."""
    return settings_of(model) is not None


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """The options that ``model`` was patched with; ``None`` if it is not patched."""
    inner = _pretrained(model)
    name, hook = str(_implementation(inner)), _hook_of(inner)
    if not name.startswith(PREFIX):
        return None
    kind, backend, _ = _parse(name)
    settings: dict[str, Any] = {"backend": backend, "fold": kind == "fold", "compile": False, "checkpointing": None}
    return settings if hook is None else settings | hook.options()


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
    if not isinstance(rows, Rows):
        raise FlexpatchError(
            f"expected packed rows, got {type(rows).__name__}: flexpatch.Collator(tokenizer)(examples), or "
            "flexpatch.build_rows([trees])"
        )
    config = text_config(inner)
    if not is_applied(inner):
        raise FlexpatchError("this model does not take packed rows yet: call flexpatch.apply(model) first")
    device = inner.get_input_embeddings().weight.device
    if rows.input_ids.device != device:
        raise FlexpatchError(
            f"the rows are on {rows.input_ids.device}, the model on {device}: pass rows.to(model.device)"
        )
    check_call(inner, ALL_ATTENTION_FUNCTIONS)
    if (reason := check_mode(model)) is not None:
        raise FlexpatchError(f"rows cannot run {reason}")
    check_rows(config, rows)
    return _inputs(inner, rows, adapter or adapter_for(config))


def _inputs(inner: PreTrainedModel, rows: Rows, adapter: Adapter) -> dict[str, Any]:
    config, device = text_config(inner), rows.input_ids.device
    limit = scaling_limit(config)
    if limit is not None and SCALES_BY_INDEX and rows.input_ids.shape[1] > limit:
        raise UnsupportedModelError(
            f"rows of more than {limit} tokens, from where on this model scales queries by their position, are not "
            f"exact in transformers {transformers.__version__}: upgrade it to 5.4 or later, or make shorter rows"
        )
    dtype = _mask_dtype(inner, device)
    windows = adapter.windows(config)
    layer_types = dict.fromkeys(config.layer_types) if adapter.masks == "by_layer_type" else [FULL]
    if _backend(inner, device) == "fa4":
        check_fa4()  # a pickled model may come from another machine
        check_fa4_call(device, _computes(inner, device), [windows[layer] for layer in layer_types], rows.depth)
    masks = {layer: mask_of(rows, windows[layer], dtype) for layer in layer_types}
    mask = masks if adapter.masks == "by_layer_type" else masks[FULL]
    for each in masks.values():
        if isinstance(each, Tensor):
            setattr(each, OWN, True)
    return dict(input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=mask, use_cache=False)


def run_rows(model: nn.Module, inputs: dict[str, Any], score: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``score`` makes of the last hidden states (B, L, D) of rows, instead of their logits.

    It is called within the model's forward, where parameters that an engine shards or offloads are at hand.

    Args:
        model: A model after :func:`apply`.
        inputs: From :func:`model_inputs`.
        score: Called once.

    Raises:
        FlexpatchError: If the model's hooks are gone.
    """
    ids = inputs["input_ids"].detach()  # another tensor object: the caller's own carries nothing
    after = _After(score=score)
    setattr(ids, _AFTER, after)
    # No position keeps its logits, so the head itself sees an empty tensor.
    output = model(**(inputs | {"input_ids": ids}), logits_to_keep=ids.new_empty(0))
    # Taken off the ids: the graph may keep those, and would keep itself.
    scored, after.score, after.scored = after.scored, None, None
    if scored is None:
        raise FlexpatchError("this model has flexpatch's settings, but not its hooks: call flexpatch.apply(model)")
    # Engines hook into what a forward returns, and may round it (accelerate's FSDP2, in bfloat16): gradients take the
    # way through it, values do not.
    returned = output.hidden_states[0]
    if returned.dtype == scored.dtype:
        return returned
    returned = returned.to(scored.dtype)
    return returned + (scored - returned).detach()


def head_of(model: nn.Module) -> tuple[nn.Module, Head]:
    """The layer that makes logits, and what the model does to them then.

    Raises:
        FlexpatchError: For a model without a head.
        UnsupportedModelError: If its logits are scaled or capped, and its adapter does not know.
    """
    inner = _pretrained(model)
    config = text_config(inner)
    head, form = inner.get_output_embeddings(), adapter_for(config).head(config)
    if head is None:
        raise FlexpatchError(f"{type(inner).__name__} makes no logits; load it with AutoModelForCausalLM")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if form == PLAIN and getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"config.{name}={getattr(config, name)} changes the logits of this model, but its adapter does not say "
                "how: give it head=lambda config: Head(...)"
            )
    return head, form


def text_config(model: nn.Module) -> Any:
    """The configuration of the transformers model inside ``model``; of a multimodal one, that of its text stack.

    Raises:
        UnsupportedModelError: For a multimodal model whose type no adapter serves.
    """
    return decoder_config(_pretrained(model).config)


def eager_experts(model: AnyModel) -> AnyModel:
    """Let mixture-of-experts layers run in any dtype; their grouped matrix products have no float64."""
    inner = _pretrained(model)
    if inner._can_set_experts_implementation():
        inner.set_experts_implementation("eager")
    return model


def is_torchao(tensor: Tensor) -> bool:
    """Whether a weight is torchao's: a tensor class of its own, for which few operations are defined."""
    return type(tensor).__module__.split(".")[0] == "torchao"


def dequantize(model: AnyModel) -> AnyModel:
    """Give layers whose weights a quantizer packed (bitsandbytes, torchao) the numbers that those stand for."""
    for name, parameter in list(model.named_parameters()):
        if is_torchao(parameter):
            layer, _, last = name.rpartition(".")
            numbers = parameter.detach().dequantize().to(parameter.dtype)
            setattr(model.get_submodule(layer), last, nn.Parameter(numbers, requires_grad=False))
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        _pretrained(model).dequantize()
    for name in packed:
        model.get_parameter(name).requires_grad_(False)
    return model


def weights(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter-free forward of ``model`` depends on: its settings, and its base weights by name.

    peft renames a wrapped layer's weight and keeps a trained copy of replaced modules; both are undone here, so a base
    model has the same fingerprint before and after ``get_peft_model`` and while its adapters train.
    """
    inner = _pretrained(model)
    settings = inner.config.to_dict()
    settings["_attention"] = _implementation(inner)
    settings["_device"] = inner.get_input_embeddings().weight.device.type
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    tensors = {}
    for name, tensor in inner.state_dict().items():
        if prefix is None or not (prefix in name or ".modules_to_save." in name):
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return settings, tensors


@dataclass
class _After:
    """What is left to do after a backbone. An attribute of the call's ``input_ids`` and not another argument: those
    reach every layer, compiled ones included."""

    length: int | None = None  # of a row that was padded for compiled layers
    unfold: tuple[Tensor, int | None] | None = None
    score: Callable[[Tensor], Tensor] | None = None
    scored: Tensor | None = None
    kept: list[GradientCheckpointingLayer] = field(default_factory=list)  # not computed again in backward
    measured: Callable[[bool], None] | None = None


_AFTER = "flexpatch_after"


@dataclass
class _Fold:
    """The latest batch, as given and folded; or why it was not."""

    counts: Counts
    folded: tuple[Rows, Tensor, int | None] | None = None
    key: Any = None
    arrays: Any = None


class _RowHook:
    """Forward pre-hook of a backbone: an ordinary batch goes in as one row. Keeps the latest batches' token counts."""

    def __init__(self, compile: bool = False, recomputation: Recomputation | None = None) -> None:
        self.counts: deque[Counts] = deque(maxlen=10_000)
        self.compile = compile
        self.recomputation = recomputation
        self.kept: list[GradientCheckpointingLayer] = []

    # Of the class, for models pickled by earlier versions.
    last: _Fold | None = None
    disabled = 0  # how many blocks of :func:`disabled` the model is in

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model, which start without a batch: masks hold functions that cannot be pickled."""
        return vars(self) | {"last": None, "disabled": 0}

    def options(self) -> dict[str, Any]:
        """Those that the attention's name does not tell."""
        return {
            "compile": self.compile,
            "checkpointing": None if self.recomputation is None else self.recomputation.setting,
        }

    def __call__(self, backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
        name, call = _implementation(backbone), _arguments(backbone, args, kwargs)
        if not name.startswith(PREFIX):
            changed = "of a model whose attention implementation was changed after flexpatch.apply (apply it again)"
            return self.given(kwargs, changed)
        if call is None:
            self.given(kwargs, "given to a forward whose wrapper hides the names of its arguments")
        if call is None or self.disabled or _is_exporting():
            return args, kwargs | {SEEN: GIVEN}
        rows = _is_rows(call)
        if not rows and name.startswith(f"{PREFIX}fold_") and _without_cache(call):
            call = self.fold(backbone, call)
        folded = getattr(call.get("input_ids"), _AFTER, None) is not None
        # A multimodal backbone has no such parameter, but hands all that it does not know to its text stack.
        known = {*_parameters(backbone), *call, *_parameters(_decoder(backbone))}
        if (folded or isinstance(_a_mask(call), BlockMask)) and "logits_to_keep" in known:
            # Given a number, Gemma 4 drops tokens before its last layers, and which ones it drops is wrong for rows.
            call["logits_to_keep"] = torch.empty(0, dtype=torch.long)
        if self.compile or self.recomputation is not None:
            call = self.prepare(backbone, call)
        pending = getattr(call.get("input_ids"), _AFTER, None) is not None
        if _is_rows(call):
            call[ROW] = Row(call["input_ids"].shape[1], call["attention_mask"])
        return (), call | {SEEN: PENDING if pending else ROWS if rows else GIVEN}

    def given(self, call: dict[str, Any], reason: str) -> None:
        """Count, and say once, that a batch runs as it was given."""
        _warn_unfolded(reason)
        tokens = next((x.shape[:2].numel() for x in map(call.get, ("input_ids", "inputs_embeds")) if x is not None), 0)
        # A reason's end in parentheses is what to do about it.
        self.counts.append(Counts(tokens, tokens, tokens, reason.split(" (")[0]))

    def prepare(self, backbone: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The call for compiled layers, and with as much recomputation as is set."""
        ids, block = call.get("input_ids"), _a_mask(call)
        if ids is None:
            return call
        after = getattr(ids, _AFTER, None) or _After()
        if self.compile and isinstance(block, BlockMask):
            length, padded = ids.shape[1], block.seq_lengths[0]
            if padded != bucket(length):
                raise FlexpatchError(f"the block mask is for rows of up to {padded} tokens, but these have {length}")
            # The mask has this length already; tokens past the row's end see only themselves.
            ids, positions = (F.pad(x, (0, padded - length)) for x in (ids, call["position_ids"]))
            call, after.length = call | {"position_ids": positions}, length
        elif self.compile and isinstance(block, Tensor) and block.ndim == 4:
            _warn("flexpatch: compile=True has no effect on the dense backend")
        _recompute(self.kept)  # an interrupted call may have left some
        if self.recomputation is not None and backbone.training and torch.is_grad_enabled():
            layers = _layers(backbone)
            if not layers:
                _warn("flexpatch: checkpointing has no effect: this model's layers were wrapped or replaced")
            layers = [layer for layer in layers if layer.gradient_checkpointing]
            if layers:
                count, after.measured = self.recomputation.plan(layers, ids, backbone)
                self.kept = after.kept = layers[count:]
            for layer in after.kept:
                layer.gradient_checkpointing = KEPT
        ids = ids.detach()
        setattr(ids, _AFTER, after)
        return call | {"input_ids": ids}

    @torch.compiler.disable
    def fold(self, backbone: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments, with its batch folded if that is exact and gains."""
        check_call(backbone, ALL_ATTENTION_FUNCTIONS)  # for every batch: ranks must agree
        config = text_config(backbone)
        ids, given = call.get("input_ids"), call.get("attention_mask")
        cache_by_default = call.get("use_cache") is None and getattr(config, "use_cache", None)
        if cache_by_default and backbone.training and torch.is_grad_enabled():
            # Not for batches that fold alone: whether a caller gets a cache must not depend on what a batch holds.
            call["use_cache"] = False
            if not any(layer.gradient_checkpointing for layer in _layers(backbone)):  # or stock drops caches too
                _warn(
                    "flexpatch: in training, calls without use_cache run with use_cache=False, so past_key_values is "
                    "None. Pass use_cache=True to get a cache, from calls that are not folded"
                )
        if given is None and ids is not None and len(ids) == 1 and call.get("position_ids") is None:
            return call  # one sequence has nothing to share
        if reason := _obstacle(backbone, config, call):
            self.given(call, f"with {reason}")
            return call
        assert ids is not None, "calls without ids have an obstacle"
        if given is not None and given.shape != ids.shape:
            raise FlexpatchError(f"attention_mask has shape {tuple(given.shape)}, but input_ids has {tuple(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):  # rounded to integers they would give some model's numbers
            raise FlexpatchError(f"input_ids are {ids.dtype}; token ids are torch.int64 or torch.int32")
        types = [call.get(name) for name in TYPES if config is not backbone.config]
        batch = [ids, None if given is None else given != 0, call.get("position_ids"), *types]
        # One copy for all: on a GPU each would wait for everything launched before.
        each = [x.expand_as(ids).to(ids.device, torch.int64) for x in batch if x is not None]
        arrays = torch.stack(each).numpy(force=True)
        # A dispatched model moves its inputs by itself: ids on the CPU do not mean that it computes there.
        home = backbone.get_input_embeddings().weight.device
        device = ids.device if ids.device.type != "cpu" or home.type == "meta" else home
        dtype = _mask_dtype(backbone, device)
        # Trainers run a batch through the policy and then the reference: it is folded once. Not under a mode that
        # watches operations (selective checkpointing), which expects the same ones every time.
        watched = is_in_torch_dispatch_mode()
        present = [x is not None for x in batch]
        key = (
            present, dtype, device, config.vocab_size, longrope_limit(config), scaling_limit(config),
            torch.is_inference_mode_enabled(), watched,
        )  # fmt: skip
        last = self.last
        if watched or last is None or last.key != key or not np.array_equal(last.arrays, arrays):
            last = self._folded(backbone, config, arrays, present, dtype, device)
            self.last = last = replace(last, key=key, arrays=arrays)
        if last.folded is not None and (reason := check_mode(backbone)) is not None:
            self.given(call, reason)
            return call
        if last.folded is not None:
            rows, index, padding = last.folded
            folded = call | dict.fromkeys(IGNORED & call.keys()) | _inputs(backbone, rows, adapter_for(config))
            if dtype is not None:
                rows.masks.clear()  # dense masks are too large to keep
            # Copies: a hook of others may change them in place, and the next call gets this fold again.
            folded |= {name: folded[name].clone() for name in ("input_ids", "position_ids")}
            setattr(folded["input_ids"], _AFTER, _After(unfold=(index, padding)))
            self.counts.append(last.counts)
            return folded
        if last.counts.reason == LITTLE:
            self.counts.append(last.counts)
        else:
            self.given(call, last.counts.reason or "")
        return call

    def _folded(
        self, backbone: PreTrainedModel, config: Any, arrays: Any, present: list[bool], dtype: Any, device: Any
    ) -> _Fold:
        rest = iter(arrays)
        ids: np.ndarray = next(rest)
        mask, positions, *types = (next(rest) if there else None for there in present[1:])
        mask = None if mask is None else mask != 0
        check_ids(ids, mask, config.vocab_size)

        def given(reason: str) -> _Fold:
            return _Fold(Counts(ids.size, ids.size, ids.size, reason))

        if any(each is not None and each.any() for each in types):
            return given(f"with {IMAGES}")
        if positions is not None and not follow_columns(positions, mask):
            return given("with position_ids that do not count a sequence's columns (packed rows, for example)")
        folded = fold_batch(ids, mask, lambda counts: _gains(config, counts, ids.shape[1], dtype))
        if folded is None:
            return given(LITTLE)
        if _parse(_implementation(backbone))[2] != "sdpa":
            see_themselves(folded)
            window = min(filter(None, adapter_for(config).windows(config).values()), default=None)
            if window is not None and longest_hole(mask) >= window:
                # Where no key is in reach, eager attention averages over the whole row of the batch.
                return given(f"with padding longer than a window of {window} inside a sequence, under eager attention")
        reach = ids.shape[1] if positions is None else int(positions.max()) + 1
        if (limit := longrope_limit(config)) is not None and (folded.rows.depth <= limit) != (reach <= limit):
            return given("with padding or position_ids beyond the length at which longrope switches its frequencies")
        limit = scaling_limit(config)
        longest = max(ids.shape[1], folded.rows.input_ids.shape[1]) if SCALES_BY_INDEX else reach
        if limit is not None and longest > limit and (SCALES_BY_INDEX or moved(positions, mask)):
            where = "at all" if SCALES_BY_INDEX else "and do not begin at position 0"
            return given(f"that reach beyond {limit}, from where on this model scales queries, {where},")
        return _Fold(folded.counts, (folded.rows.to(device), folded.index.to(device), folded.padding))


def _parameters(backbone: nn.Module) -> Mapping[str, Parameter]:
    """The parameters of a backbone's forward, self among them."""
    return signature(type(backbone).forward).parameters


def _arguments(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of a backbone's call by name; ``None`` if somebody's wrapper around its forward hides the names."""
    if not args:
        return dict(kwargs)
    parameters = _parameters(backbone).values()
    names = [parameter.name for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]
    return None if len(names) < len(args) else dict(zip(names, args, strict=False)) | kwargs


def _a_mask(call: dict[str, Any]) -> Any:
    """The mask of a call, or one of its masks by layer type."""
    mask = call.get("attention_mask")
    return next(iter(mask.values())) if isinstance(mask, dict) else mask


def _is_rows(call: dict[str, Any]) -> bool:
    """Whether a call's mask was made by :func:`_inputs`."""
    mask = _a_mask(call)
    return isinstance(mask, BlockMask) or getattr(mask, OWN, False)


def _without_cache(call: dict[str, Any]) -> bool:
    """Whether a call neither has a cache nor asks for one."""
    return not call.get("use_cache") and all(call.get(name) is None for name in CACHES)


def _gains(config: Any, counts: Counts, columns: int, mask_dtype: torch.dtype | None) -> bool:
    """Whether one row of ``counts.computed`` tokens costs at most ``WORTH`` of the batch.

    Block masks skip what is hidden. The dense backend computes all pairs of the row: to a layer of D hidden units a
    pair costs 4 D FLOPs, a token about 24 D^2.
    """
    if mask_dtype is None:
        return counts.computed <= WORTH * counts.padded
    token = 6 * config.hidden_size
    return counts.computed * (token + counts.computed) <= WORTH * counts.padded * (token + columns)


def _obstacle(backbone: PreTrainedModel, config: Any, call: dict[str, Any]) -> str | None:
    """What in a call cannot be folded exactly."""

    def asked(name: str) -> Any:
        return call[name] if call.get(name) is not None else getattr(config, name, None)

    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is None:
        return "inputs_embeds, which do not tell which tokens are equal"
    if ids.ndim != 2:
        return f"input_ids of {ids.ndim} dimensions"
    if being_recorded(ids):
        return "input_ids that are being traced or exported, or have no values"
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        return "an attention_mask of the caller's own (not one number for each token)"
    if asked("use_cache"):
        return "use_cache not given, whose cache may be wanted (pass False, or set model.config.use_cache = False)"
    positions = call.get("position_ids")
    if positions is not None and (positions.is_floating_point() or positions.shape not in (ids.shape, ids[:1].shape)):
        return "position_ids that are not integers, one for each token"
    for name in ("output_attentions", "output_router_logits"):
        if asked(name):
            return f"{name}=True"
    if asked("return_dict") is False:
        return "return_dict=False"
    multimodal = config is not backbone.config
    if multimodal and any(call.get(name) is not None for name in MEDIA):
        return IMAGES
    for name, value in call.items():
        known = name in ("input_ids", "attention_mask", "position_ids") or (multimodal and name in IGNORED)
        if isinstance(value, Tensor) and not known and value.ndim and len(value) == len(ids):
            return f"the argument {name}"
    return None


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Whether torch.export is at work. Asked outside graphs: torch 2.11 has torch.compile say that it is too."""
    return torch.compiler.is_exporting()


def being_recorded(ids: Tensor) -> bool:
    """Whether a call is being traced, exported or captured, or its ids have no values to look at.

    A fold depends on a batch's ids: whoever records one batch's operations would replay that fold on other ids.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or get_proxy_mode() is not None:
        return True
    if type(ids) not in (Tensor, nn.Parameter) or ids.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return True
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


def _warn_unfolded(reason: str) -> None:
    """Say, once for each reason, that batches run as they are given."""
    _warn(f"flexpatch: batches {reason} run as they are given")


def _warn(message: str) -> None:
    warnings.warn(message, FlexpatchWarning, 3)


def _after_hook(backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a backbone, before those of others: a row's hidden states come out in the caller's layout."""
    if output is not None and ROW in kwargs:
        kwargs[ROW].check_reached()
    after = _after_of(backbone, args, kwargs)
    if after is None:
        # None: the forward raised. Without any mark somebody has put other arguments in place of ours.
        if output is not None and kwargs.get(SEEN, PENDING if _is_rows(kwargs) else GIVEN) == PENDING:
            raise FlexpatchError(
                "something replaced input_ids between flexpatch's hook on the backbone and its forward, so the row's "
                "hidden states cannot be brought back into the batch's layout. Register that hook before "
                "flexpatch.apply(model), or apply with fold=False"
            )
        return None
    _recompute(after.kept)
    if after.measured is not None:
        after.measured(output is not None)
    if output is None or (after.length is None and after.unfold is None):
        return None

    def finish(hidden_BPD: Tensor) -> Tensor:
        hidden_BLD = hidden_BPD if after.length is None else hidden_BPD[:, : after.length]
        return hidden_BLD if after.unfold is None else unfold(hidden_BLD, *after.unfold)

    last = output.last_hidden_state
    output.last_hidden_state = finish(last)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(
            output.last_hidden_state if h is last else h if h is None else finish(h) for h in output.hidden_states
        )
    return output


def _score_hook(backbone: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a backbone, after those of others: what :func:`run_rows` asks for leaves as hidden states."""
    after = _after_of(backbone, args, kwargs)
    if after is None or after.score is None:
        return None
    after.scored = after.score(output.last_hidden_state)
    output.hidden_states = (after.scored,)
    return output


def _after_of(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> _After | None:
    """Find what is left to do after a call, wherever another hook has put its ids."""
    ids = kwargs.get("input_ids") if not args else (_arguments(backbone, args, kwargs) or {}).get("input_ids")
    return getattr(ids, _AFTER, None)


def _recompute(kept: list[GradientCheckpointingLayer]) -> None:
    """Give layers whose checkpointing was off for a call their setting back, unless somebody has set it since."""
    while kept:
        layer = kept.pop()
        if type(layer.gradient_checkpointing) is int:
            layer.gradient_checkpointing = True


def _layers(backbone: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers of a backbone."""
    lists = (child for child in _decoder(backbone).children() if isinstance(child, nn.ModuleList))
    return [layer for layers in lists for layer in layers if isinstance(layer, GradientCheckpointingLayer)]


def _unhook(inner: PreTrainedModel) -> None:
    """Take our hooks off. Found by what they are: a handle would be state, and a copied model would have none. In all
    modules: the backbone may have been wrapped since."""
    for module in inner.modules():
        hooks = module._forward_pre_hooks, module._forward_hooks
        flags = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs
        for registered, with_kwargs in zip(hooks, flags, strict=True):
            for key, hook in list(registered.items()):
                if isinstance(hook, _RowHook):
                    _recompute(hook.kept)
                if isinstance(hook, _RowHook) or hook in (_after_hook, _score_hook):
                    del registered[key], with_kwargs[key]
                    module._forward_hooks_always_called.pop(key, None)
        restore_forward(module)


def savings(model: nn.Module, last: int | None = None) -> Savings:
    """What folding saved over the ``last`` batches, at most 10,000. Reference passes and evaluation count too.

    Raises:
        FlexpatchError: If the model does not fold batches, or for ``last < 1``.
    """
    hook, settings = _hook_of(_pretrained(model)), settings_of(model) or {}
    if hook is None and settings:
        raise FlexpatchError(
            "this model was built from a patched one's settings, such as a trainer's own reference, and has no hooks: "
            "all its batches run as they are given. Call flexpatch.apply on it too (flexpatch.apply(trainer.ref_model))"
        )
    if hook is None or not settings.get("fold"):
        raise FlexpatchError("this model does not fold batches: call flexpatch.apply(model) first")
    if last is not None and last < 1:
        raise FlexpatchError(f"last={last}; expected at least 1, or None for all")
    return Savings.of(list(hook.counts)[-(last or 0) :])


def _hook_of(inner: PreTrainedModel) -> _RowHook | None:
    hooks = (hook for module in inner.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, _RowHook)), None)


def backend_of(model: nn.Module) -> str:
    """``"flex"``, ``"fa4"`` or ``"dense"``: what rows of a patched model run on where it is now."""
    inner = _pretrained(model)
    return _backend(inner, inner.get_input_embeddings().weight.device)


def _backend(inner: PreTrainedModel, device: torch.device) -> str:
    # Decided anew at each call: the model may have been moved since apply, and then its user is told.
    return tell(_choice(inner, device, _parse(_implementation(inner))[1]))


def _choice(inner: PreTrainedModel, device: torch.device, backend: str) -> Choice:
    return choose(backend, device, heads_of(_decoder(inner)), _computes(inner, device))


def _computes(inner: PreTrainedModel, device: torch.device) -> torch.dtype:
    """The dtype of attention."""
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else inner.dtype


def _mask_dtype(inner: PreTrainedModel, device: torch.device) -> torch.dtype | None:
    """The kind of mask :func:`flexpatch.masks.mask_of` must build: a block mask, or what the original takes."""
    if _backend(inner, device) != "dense":
        return None
    return torch.bool if _parse(_implementation(inner))[2] == "sdpa" else inner.dtype


def _parse(name: str) -> tuple[str, str, str]:
    """(``fold`` or ``rows``, backend, original implementation) of ``flexpatch_<fold or rows>_<backend>_<original>``."""
    kind, backend, original = name.removeprefix(PREFIX).split("_", 2)
    return kind, backend, original


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``."""
    if not isinstance(model, nn.Module):
        raise FlexpatchError(_no_model(model))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise FlexpatchError(f"{type(model).__name__} holds no transformers model; pass a PreTrainedModel, bare or wrapped")


def _only_pretrained(model: nn.Module) -> PreTrainedModel:
    """:func:`_pretrained`, where a second transformers model beside it would be left out without a word."""
    inner = _pretrained(model)
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
    wanted = "a loaded transformers model, bare or wrapped (peft, DDP)"
    if isinstance(given, str):
        return f"expected {wanted}, got the name {given!r:.60}: AutoModelForCausalLM.from_pretrained({given!r:.60})"
    if isinstance(given, type):
        return f"expected {wanted}, got the class {given.__name__}: pass an instance of it"
    if isinstance(getattr(given, "model", None), nn.Module):
        return f"expected {wanted}, got {type(given).__name__}: pass its .model"
    return f"expected {wanted}, got {type(given).__name__}"


def _decoder(inner: PreTrainedModel) -> PreTrainedModel:
    """``inner``, or the text stack of a multimodal model: the module with the text configuration."""
    config = inner.config.get_text_config()
    return next(m for m in inner.modules() if isinstance(m, PreTrainedModel) and m.config is config)


def _set_implementation(decoder: PreTrainedModel, name: str) -> None:
    """Set a decoder's attention, in layers that carry a copy of its configuration too (copied ones: peft's
    ``layer_replication``)."""
    before = _implementation(decoder)
    decoder.set_attn_implementation(name)
    for module in decoder.modules():
        config = module.__dict__.get("config")
        if config is not decoder.config and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = decoder.config._attn_implementation


def _implementation(inner: PreTrainedModel) -> str:
    """The name of the attention implementation of ``inner``'s text layers."""
    return inner.config.get_text_config()._attn_implementation


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any,
    *args: Any,
    original: str,
    folds: bool,
    fa4: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the registered names call. q is (B, H, L, D), k and v are (B, G, L, D); the output is (B, L, H, D)."""
    seen, row = kwargs.pop(SEEN, None), kwargs.pop(ROW, None)
    if row is not None:
        row.check_attention(module, q, k, attention_mask)
    if isinstance(attention_mask, BlockMask):
        return flex(q, k, v, attention_mask, fa4=fa4, **kwargs), None
    if folds and not seen and len(q) > 1 and not kwargs.get("use_cache") and not torch.compiler.is_compiling():
        _warn_unfolded(
            "of a model built from a patched one's settings, such as a trainer's reference (apply to it too),"
        )
    function = _eager_of(module) if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
    return function(module, q, k, v, attention_mask, *args, **kwargs)


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
            for kind in ("fold", "rows"):
                name = f"{PREFIX}{kind}_{backend}_{original}"
                settings: dict[str, Any] = dict(original=original, folds=kind == "fold", fa4=backend == "fa4")
                AttentionInterface.register(name, partial(_attention, **settings))
                AttentionMaskInterface.register(name, masks[original])


_register()
