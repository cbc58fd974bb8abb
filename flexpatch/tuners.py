"""Decides whether adapters of peft act on each token alone. Adapters that are not known to do so are refused.

The decisions are lists of names in peft's registry, so peft is not imported.
"""

from typing import Any

from torch import nn

from flexpatch.errors import UnsupportedModelError

# Tuners whose layers act on each token alone, forward and backward, by peft's names (``PeftType``). A tuner's layers
# are in the package of that name. ``tests/test_tuners.py`` checks every entry against the unpatched model.
EXACT = {
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD"),
    *(
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
    ),
    *(
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ),
}
_OWN_TOKENS = "puts tokens of its own in front of every sequence, which a row of several sequences has no place for"
REFUSED = {
    "CARTRIDGE": _OWN_TOKENS,
    "CPT": _OWN_TOKENS,
    "LILY": "averages its router over all tokens of a call, so that one answer changes another",
    "MULTITASK_PROMPT_TUNING": _OWN_TOKENS,
    "POLY": "takes a task for each sequence of a batch and draws noise for it, and a row holds several sequences",
    "PREFIX_TUNING": _OWN_TOKENS,
    "PROMPT_TUNING": _OWN_TOKENS,
    "PVERA": "draws noise for each token in training, which answers would share on shared tokens",
    "P_TUNING": _OWN_TOKENS,
    "SHADOW": "runs a second model over the batch, beside the row that the layers see",
    "XLORA": "mixes its adapters by scalings of the batch, which do not fit the row that the layers see",
}

# Variants of LoRA, by the classes that apply them to a layer.
EXACT_VARIANTS = {
    *("ArrowLinearVariant", "BdLoraLinearVariant", "DoraEmbeddingVariant", "DoraLinearVariant", "KasaLinearVariant"),
    *("MiCAEmbeddingVariant", "MiCALinearVariant", "QALoraLinearVariant"),
}
REFUSED_VARIANTS = {
    "ALoraLinearVariant": "switches on behind its invocation tokens, of which it finds one in a row",
    "MontecloraLinearVariant": "draws noise in training, once for all answers of a call",
    "VeloraLinearVariant": (
        "projects activations in backward by their average over all tokens of a call. "
        "VeloraConfig(init_type='random') does not"
    ),
}
# Projections of VeLoRA that do not depend on a call's tokens.
EXACT_VELORA = {"random"}

# Initialisations of LoRA's weights. All take place before training, except MiCA, which is a variant.
EXACT_INITS = {
    *("true", "false", "gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica"),
}

# Files of peft's LoRA whose layers were read. The layers for quantizers add LoRA's product to the quantizer's product.
LORA_FILES = {
    *(
        "aqlm",
        "arrow",
        "awq",
        "bnb",
        "dora",
        "eetq",
        "gptq",
        "hqq",
        "inc",
        "layer",
        "model",
        "te",
        "torchao",
        "variants",
    ),
}
# Files with the base classes of all tuners.
_COMMON = {"_buffer_dict", "lycoris_utils", "mixed", "tuners_utils"}

_UNKNOWN = "is unknown to this version of flexpatch, and nobody has shown that it acts on each token alone"
_WAY_OUT = (
    "Use one that does, such as LoRA, DoRA or VeRA (print(flexpatch.tuners.tuner_table()) lists all), or train this "
    "one unpatched: flexpatch.remove(model)"
)


def check_tuners(model: nn.Module) -> None:
    """Refuse a model with adapters that act on more than one token.

    Args:
        model: A model of transformers, bare or wrapped, with or without adapters.

    Raises:
        UnsupportedModelError: For such an adapter. The message names it, its fault, and an alternative.
    """
    for name, module in model.named_modules():
        if why := refusal(module):
            raise UnsupportedModelError(f"'{name or type(module).__name__}': {why}")


def refusal(module: nn.Module) -> str | None:
    """Find the reason to refuse one module.

    Called for every module before every call, so it must cost little. It reads names of classes and settings alone, so
    peft is not imported, and every version of peft will do.

    Args:
        module: Any module. Its children are not checked.

    Returns:
        The adapter's fault, and the way out; ``None`` if the module is exact.
    """
    has = module.__dict__
    adapts, why = _verdict(type(module))
    if adapts and why is None:
        why = _layer_refusal(module)
    if why is None and (settings := has.get("peft_config") or has.get("_peft_config")):
        why = next(filter(None, (_settings_refusal(name, each) for name, each in settings.items())), None)
    return why


def as_given(module: nn.Module) -> str | None:
    """Find hooks of peft on one module that need the batch as it was given. Peft sets them for single calls.

    Args:
        module: Any module. Its children are not checked.

    Returns:
        The reason, as the end of "batches that run as given: ..."; ``None`` if there are no such hooks.
    """
    has = module.__dict__
    for hook in has["_forward_pre_hooks"].values():
        if "adapter_names" in (getattr(hook, "keywords", None) or {}):
            return "with adapter_names, which give each sequence an adapter of its own"
    for hook in has["_forward_hooks"].values():
        # EVA and CorDA start LoRA's weights from the inputs of layers. A row would count shared tokens once.
        if str(getattr(hook, "__module__", None)).startswith("peft.tuners."):
            return f"while {hook.__module__} collects the inputs of layers"
    return None


_verdicts: dict[type, tuple[bool, str | None]] = {}


def _verdict(kind: type) -> tuple[bool, str | None]:
    """Look up the verdict of :func:`_judge` on a class. Each class is judged once."""
    if kind not in _verdicts:
        _verdicts[kind] = _judge(kind)
    return _verdicts[kind]


def _judge(kind: type) -> tuple[bool, str | None]:
    """Return whether a class is peft's or derives from one, and the reason to refuse it or ``None``."""
    if not any(each.__module__.startswith("peft.") for each in kind.__mro__):
        return False, None
    # FSDP derives classes from the layers that it shards, so the class that defines ``forward`` decides.
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    path = owner.__module__.split(".")
    layer = f"{kind.__module__}.{kind.__qualname__}"
    plain = path[0] == "torch" and (owner is nn.Module or kind.__module__.startswith("peft."))
    if plain or (path[0] == "peft" and (path[1] != "tuners" or path[2] in _COMMON)):
        return True, None  # containers, renamed layers of torch, and wrappers that only call layers
    if path[0] != "peft":
        return True, f"the layer {layer}, which derives from peft's, {_UNKNOWN}. {_WAY_OUT}"
    if any(each.__name__ == "Conv1d" for each in kind.__mro__):
        return True, f"peft's layer {layer} convolves neighbouring tokens of a row. Leave it out of target_modules"
    if path[2] == "lora" and path[3] not in LORA_FILES:
        return True, f"peft's layer {layer} {_UNKNOWN}. {_WAY_OUT}"
    why = _tuner_refusal(path[2].upper())
    return True, why and f"peft's layer {layer} ({path[2].upper()}) {why}. {_WAY_OUT}"


def _tuner_refusal(tuner: str) -> str | None:
    return None if tuner in EXACT else REFUSED.get(tuner, _UNKNOWN)


def _settings_refusal(adapter: str, settings: Any) -> str | None:
    tuner = getattr(settings.peft_type, "value", str(settings.peft_type))
    if why := _tuner_refusal(tuner):
        return f"peft adapter '{adapter}' ({tuner}) {why}. {_WAY_OUT}"
    start = str(getattr(settings, "init_lora_weights", True)).lower().split("_niter_")[0]
    if start in EXACT_INITS:
        return None
    return f"peft adapter '{adapter}' ({tuner}) with init_lora_weights='{start}' {_UNKNOWN}. {_WAY_OUT}"


def _layer_refusal(layer: nn.Module) -> str | None:
    has = layer.__dict__
    # X-LoRA replaces a layer's ``forward`` by a method of another class.
    forward = getattr(has.get("forward"), "__self__", layer)
    if forward is not layer and (why := _verdict(type(forward))[1]):
        return why
    for adapter, variant in (has.get("lora_variant") or {}).items():
        name = type(variant).__name__
        exact = name in EXACT_VARIANTS and type(variant).__module__.startswith("peft.")
        velora = (has.get("lora_velora_init_type") or {}).get(adapter)
        if not (exact or (name == "VeloraLinearVariant" and velora in EXACT_VELORA)):
            return f"peft adapter '{adapter}' (LoRA's {name}) {REFUSED_VARIANTS.get(name, _UNKNOWN)}. {_WAY_OUT}"
    # Dropout layers of torch are checked in refusals.py, for all modules.
    rates = {name: has[name] for name in ("module_dropout", "rank_dropout") if isinstance(has.get(name), dict)}
    if type(layer).__name__.startswith("MultiplicativeDropout"):
        rates["p"] = {"": has["p"]}
    active = {name: max(rate.values(), default=0.0) for name, rate in rates.items() if any(rate.values())}
    if layer.training and active:
        return f"peft's dropout {active} is active, which is drawn once for all answers of a call. Set it to 0.0"
    return None


def tuner_table() -> str:
    """List exact and refused tuners as a Markdown table, for the documentation.

    Returns:
        A row for each known tuner of peft's registry, and for each known variant of LoRA.
    """
    rows = [(tuner, "exact", "") for tuner in sorted(EXACT)]
    rows += [(tuner, "refused", why) for tuner, why in REFUSED.items()]
    rows.sort()
    variants = [(f"LORA: {name.removesuffix('Variant')}", "exact", "") for name in sorted(EXACT_VARIANTS)]
    variants += [(f"LORA: {name.removesuffix('Variant')}", "refused", why) for name, why in REFUSED_VARIANTS.items()]
    rows += [*sorted(variants), ("anything else", "refused", _UNKNOWN)]
    lines = [f"| {tuner} | {verdict} | {why} |" for tuner, verdict, why in rows]
    return "\n".join(["| peft's name | packed rows and folded batches | why |", "|---|---|---|", *lines])
