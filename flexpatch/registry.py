"""The adapter record and the table of all records.

An architecture is data: which mask its layers take, which window each layer type has, which rope types are exact,
and why some of its relatives are refused. Nothing in a record is code of the model.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, NamedTuple

from packaging.version import Version

from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.layouts import media_of
from flexpatch.settings import inexact_setting

FULL = "full_attention"
SLIDING = "sliding_attention"
# The oldest release of transformers that this library takes.
EVERY = "5.0"
INSTALLED = Version(metadata.version("transformers"))
# Functions of modeling files whose states can be branched along a row's trees.
CONVOLUTION = "convolution"
DELTA_RULE = "delta rule"
STATE_SPACE = "state space"
BRANCHES = CONVOLUTION, DELTA_RULE, STATE_SPACE


def no_windows(config: Any) -> dict[str, int | None]:
    """The window rule of a model whose every layer sees the whole past."""
    return {FULL: None}


def sliding_windows(config: Any) -> dict[str, int | None]:
    """The window rule of a model that has one window, in its layers of that type alone."""
    return {FULL: None, SLIDING: config.sliding_window}


def never(config: Any) -> None:
    """The rule of a family without exceptions."""


class LogitTransform(NamedTuple):
    """The change that a model makes to its head's output: logits = softcap(scale * output).

    Attributes:
        scale: A factor.
        softcap: Logits x become softcap * tanh(x / softcap); ``None``: as they are.
        wide: Whether the model converts its head's output to float32 before.
    """

    scale: float = 1.0
    softcap: float | None = None
    wide: bool = False


UNCHANGED = LogitTransform()


class Visible(NamedTuple):
    """The keys that a query of a separate sequence sees, of those before it.

    Attributes:
        window: At most so many, the query's own among them; ``None``: all.
        chunk: Those of its own chunk alone, of so many tokens; ``None``: chunks do not matter.
        flat: Whether the module takes the mask of a batch (N, S), and makes that of queries and keys itself.
        hides: Whether the module takes masks that are True where attention is not allowed.
        keys: Names of arguments (..., L) that add to the scores of keys by position, as ALiBi does; of separate
            sequences they are the row's first. ``"attention_mask"``: the mask holds such numbers too.
        whole: Names of arguments that are passed as they are.
    """

    window: int | None = None
    chunk: int | None = None
    flat: bool = False
    hides: bool = False
    keys: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def no_mask(module: Any) -> Visible | None:
    """The rule of a mixer that takes no mask, such as a scan."""
    return None


def causal(module: Any) -> Visible | None:
    """The rule of attention whose every query sees the whole past."""
    return Visible()


def unchanged_logits(config: Any) -> LogitTransform:
    """The logit transform of a model whose logits are its head's output."""
    return UNCHANGED


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Record of one family of architectures: all that flexpatch must know of it.

    Attributes:
        name: The family, as people write it.
        tiny: ``config.model_type`` served -> keyword arguments of small configurations. Tests and the verifier build
            random models from them, so every mask, window and rope variant of the family should appear. Multimodal
            types too, with a ``text_config``, if their text stack takes calls of text as the text model does.
        masks: ``"single"`` when the decoder takes one mask for all layers, ``"by_layer_type"`` when it takes a dict
            keyed by the entries of ``config.layer_types``, ``"none"`` when no layer is attention, ``"own"`` when its
            layers have attention of their own, out of transformers' registry: it is ``unshared``.
        windows: ``config`` -> window in tokens (``None``: unlimited) for each layer type. A ``"single"`` family has
            the one key ``"full_attention"``, whose window, if set, holds in every layer. A query at position p sees
            keys at positions > p - window, as in transformers.
        unmasked: Layer types whose layers take no mask of a row: their mixers are ``unshared``, or mix nothing.
        unshared: Mixers that no mask can cut (scans, convolutions, chosen keys): class name -> module -> what attention
            in it sees, :func:`no_mask` for none. Each runs on the separate sequences of a row, everything around it on
            the row. Tensors with one entry for each token may be any of its arguments, and its outputs.
        branched: Those of them whose states can be branched on the row instead, which is faster: class name -> the
            functions of its modeling file that it calls, each one of ``BRANCHES``.
        before_head: Modules by which the model changes hidden states, each token alone, before its head.
        logit_transform: ``config`` -> the change that the model makes to its head's output.
        ropes: Rope types whose frequencies are exact under restarted positions. ``"longrope"`` may be listed: calls
            that straddle its switching length are refused one by one.
        marks: Whether layers hand arguments that they do not know to attention. Where they do not, a row is known by
            its mask alone, and compiled layers are refused.
        restarts: Whether the model begins another sequence where ``position_ids`` restart, as masks of transformers do.
        begins: Where a sequence must begin in an ordinary batch to give what it gives alone: ``"anywhere"``; at
            ``"position"`` 0 where positions are absolute; in ``"column"`` 0 where a mixer counts columns. Other batches
            run as they are given.
        padding: Padding of a batch that changes nothing for ``unshared`` mixers, beside that on the right:
            ``"in_front"`` of a sequence; ``"masked"``: any, and restarts, for attention that takes a batch's mask as
            others do; ``"judged"``: in front, where all mixers are of files that set padding to zero. Other batches
            run as they are given.
        since: The release of transformers from which on the architecture was found exact. Older ones are refused.
        implementations: The attention implementations of the model's own that are right for it, in order of preference.
        reject: ``config`` -> why this configuration cannot be exact and what to do instead, or ``None``.
        longest: ``config`` -> how many tokens a sequence may have to be exact; ``None``: any number.
        refused: Known relatives that are never exact: ``model_type`` -> reason.
        limits: One line for the support table; empty if there are none.
    """

    name: str
    tiny: Mapping[str, Sequence[Mapping[str, Any]]]
    masks: Literal["single", "by_layer_type", "none", "own"]
    windows: Callable[[Any], Mapping[str, int | None]] = no_windows
    unmasked: tuple[str, ...] = ()
    unshared: Mapping[str, Callable[[Any], Visible | None]] = field(default_factory=dict)
    branched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    before_head: tuple[str, ...] = ()
    logit_transform: Callable[[Any], LogitTransform] = unchanged_logits
    ropes: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
    marks: bool = True
    restarts: bool = True
    begins: Literal["anywhere", "position", "column"] = "anywhere"
    padding: Literal["judged", "in_front", "masked"] = "judged"
    since: str = EVERY
    implementations: tuple[str, ...] = ("sdpa", "eager")
    reject: Callable[[Any], str | None] = never
    longest: Callable[[Any], int | None] = never
    refused: Mapping[str, str] = field(default_factory=dict)
    limits: str = ""


_adapters: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Add ``adapter`` to the table.

    Raises:
        FlexpatchError: If one of its model types already has an adapter, or it branches mixers that it does not name as
            unshared, or by functions that cannot be.
    """
    unknown_kinds = {kind for kinds in adapter.branched.values() for kind in kinds} - set(BRANCHES)
    if wrong := sorted(set(adapter.branched) - set(adapter.unshared) | unknown_kinds):
        raise FlexpatchError(
            f"the {adapter.name} adapter's branched has {', '.join(wrong)}: its keys are keys of unshared, its values "
            f"tuples of {', '.join(BRANCHES)}"
        )
    for model_type in (*adapter.tiny, *adapter.refused):
        if model_type in _adapters:
            raise FlexpatchError(
                f"model type '{model_type}' is already served by the {_adapters[model_type].name} adapter"
            )
    _adapters.update(dict.fromkeys((*adapter.tiny, *adapter.refused), adapter))
    return adapter


def adapters() -> dict[str, Adapter]:
    """Return all model types that an adapter serves, in order of registration."""
    importlib.import_module("flexpatch.adapters")  # here, because those files import this one
    return {model_type: adapter for model_type, adapter in _adapters.items() if model_type in adapter.tiny}


def refused_types() -> dict[str, str]:
    """Return the model types that an adapter refuses in every configuration, with its reason."""
    adapters()
    return {
        model_type: adapter.refused[model_type]
        for model_type, adapter in _adapters.items()
        if model_type in adapter.refused
    }


def decoder_config(config: Any) -> Any:
    """``config``, or the text configuration in that of a multimodal model.

    Raises:
        UnsupportedModelError: For an encoder-decoder, and for a multimodal model whose type no adapter serves. The
            message says what can be done with its text model, or why nothing can.
    """
    model_type = config.model_type
    if model_type in adapters() or media_of(config) is not None:
        return config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder: its encoder sees a prompt whole, apart from the answer, "
            "so no sequences begin alike. Train it unpatched"
        )
    try:
        text = config.get_text_config()
    except ValueError:  # transformers will not choose between several
        raise UnsupportedModelError(
            f"model type '{model_type}' is made of several text models, and no adapter serves it. Train it unpatched"
        ) from None
    if text is config or model_type in _adapters:
        return config
    kind = f"model type '{model_type}' is a multimodal model, which no adapter serves"
    try:
        adapter_for(text)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{kind}, and neither is its text model: {error}") from None
    raise UnsupportedModelError(
        f"{kind}; its text model is served: make text = AutoModelForCausalLM.from_config(config.get_text_config()), "
        "and give it the state_dict() of the loaded model's language model and that of its head. (from_pretrained of "
        "that class does not find the weights in this checkpoint, and draws them at random)"
    )


def adapter_for(config: Any) -> Adapter:
    """Return the adapter of a model configuration.

    Args:
        config: A ``transformers.PreTrainedConfig``, of a text model or of a multimodal one.

    Raises:
        UnsupportedModelError: If no adapter serves ``config.model_type``, or its adapter refuses this configuration.
    """
    record = media_of(config)
    if record is not None and (reason := record.unfit(config)) is not None:
        raise UnsupportedModelError(f"model type '{config.model_type}': {reason}")
    config = decoder_config(config)
    model_type = config.model_type
    adapter = _adapters.get(model_type)
    if adapter is None:
        raise unknown(model_type)
    reject = never if record is not None and record.text_blocks else adapter.reject
    reason = adapter.refused.get(model_type) or too_old(adapter) or reject(config) or inexact_setting(config, adapter)
    if reason is not None:
        raise UnsupportedModelError(f"model type '{model_type}': {reason}")
    return adapter


def marks(config: Any) -> bool:
    """Tell whether layers of a text model hand arguments that they do not know to attention."""
    adapter = _adapters.get(config.model_type)
    return adapter is not None and adapter.marks


def too_old(adapter: Adapter) -> str | None:
    """Return why the installed transformers does not run an adapter's models exactly; ``None`` if it does."""
    older = Version(adapter.since) > INSTALLED
    return f"exact from transformers {adapter.since} on, and {INSTALLED} is installed: upgrade it" if older else None


def unknown(model_type: str) -> UnsupportedModelError:
    """Make the refusal of a type that no adapter mentions."""
    return UnsupportedModelError(
        f"no adapter for model type '{model_type}'; known: {', '.join(sorted(adapters()))}. "
        "Write one (adapters/llama.py is the shortest), flexpatch.register() it, "
        f"and check it with 'python -m flexpatch.verify {model_type}'"
    )
