"""Decides whether answers may share a row under a quantizer, from a model's settings and layers.

Each method that transformers registers has a decision here; other methods are refused. ``quantized_layers`` decides
for single layers. ``quantizer_table`` prints all decisions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flexpatch.errors import UnsupportedModelError
from flexpatch.quantized_layers import layer_fault, word

UNTOUCHED = "as they are"
PER_TOKEN = "rounded, a scale for each token"
CONSTANT = "rounded, constant scales"
AS_SET = "as its settings say"
EXACT, REFUSED = "exact", "refused"
WITHIN = "within stock's own error"
PARTLY = "exact, or refused"
TESTED, READ, DOCUMENTED = "tests", "its code", "its documentation"


@dataclass(frozen=True)
class Decision:
    """Decision on one quantization method.

    Attributes:
        activations: Treatment of activations.
        verdict: ``EXACT``, ``WITHIN``, ``PARTLY`` or ``REFUSED``.
        shown_by: Evidence for the verdict.
        setting: Exact setting or alternative, if the method is refused in part or wholly.
        fault: Takes the settings. Returns their fault, or ``None``. Layers are checked besides.
    """

    activations: str
    verdict: str
    shown_by: str
    setting: str = ""
    fault: Callable[[Any], str | None] = lambda settings: None


def _rounds_activations(settings: Any) -> str | None:
    bits = _get(settings, "act_bits")
    if bits is None or bits >= 16:
        return None
    return f"act_bits={bits} rounds activations in ways nobody has read. Use a scheme with act_bits=16, such as W4A16"


def _whole(why: str) -> Callable[[Any], str]:
    return lambda settings: f"{why}. Load the model in bfloat16, or with BitsAndBytesConfig(load_in_4bit=True)"


# Decisions by transformers' name of the method.
METHODS: dict[str, Decision] = {
    "aqlm": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "auto-round": Decision(AS_SET, PARTLY, DOCUMENTED, "`act_bits=16`", _rounds_activations),
    "awq": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "bitnet": Decision(PER_TOKEN, WITHIN, TESTED),
    "bitsandbytes_4bit": Decision(UNTOUCHED, EXACT, TESTED),
    "bitsandbytes_8bit": Decision(PER_TOKEN, PARTLY, TESTED, "`llm_int8_threshold=0.0`"),
    "compressed-tensors": Decision(AS_SET, PARTLY, TESTED, "activations dynamic per token or group, static, or none"),
    "eetq": Decision(UNTOUCHED, EXACT, READ),
    "fbgemm_fp8": Decision(PER_TOKEN, WITHIN, READ),
    "fouroversix": Decision(
        "rounded, one scale for a call", REFUSED, DOCUMENTED, "another method",
        _whole("activations and gradients are rounded to 4 bits by one scale for a call"),
    ),
    "fp8": Decision("rounded per token and block of features, or constant scales", WITHIN, READ),
    "fp_quant": Decision(PER_TOKEN, PARTLY, READ, '`backward_dtype="bf16"`'),
    "gemma": Decision(CONSTANT, EXACT, TESTED),
    "gguf": Decision("as they are; rounded per token in calls of up to 8 tokens", WITHIN, READ),
    "gptq": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "higgs": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "hqq": Decision(UNTOUCHED, EXACT, TESTED),
    "metal": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "mxfp4": Decision(UNTOUCHED, EXACT, READ),
    "mxfp8": Decision("rounded per token and block of features", WITHIN, DOCUMENTED),
    "nvfp4": Decision(
        "rounded or not, by the number of tokens", REFUSED, DOCUMENTED, "another method",
        _whole("its kernels round activations to 4 bits or not at all, by how many tokens a call has"),
    ),
    "quanto": Decision("as they are, or constant scales", EXACT, TESTED),
    "quark": Decision(AS_SET, PARTLY, READ, "activations per group of features, static, or none"),
    "sinq": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "spqr": Decision(UNTOUCHED, EXACT, DOCUMENTED),
    "torchao": Decision(AS_SET, PARTLY, TESTED, "`granularity=PerRow()`, or weights alone"),
    "vptq": Decision(UNTOUCHED, EXACT, DOCUMENTED),
}  # fmt: skip
# Decisions on layers that reach a model without a quantizer of transformers.
BY_HAND: dict[str, Decision] = {
    "torchao's FP8 training, accelerate's `AORecipeKwargs`": Decision(
        AS_SET, PARTLY, TESTED, 'recipes `"rowwise"` and `"rowwise_with_gw_hp"` (within stock\'s own error)'
    ),
    "torchao's quantization-aware training": Decision(AS_SET, PARTLY, TESTED, "activations per token or row"),
    "TransformerEngine, accelerate's `TERecipeKwargs`": Decision(
        "scales of a call and of earlier ones", REFUSED, READ, "bfloat16, or torchao's row-wise recipes"
    ),
    "MS-AMP, accelerate's `MSAMPRecipeKwargs`": Decision(
        "one scale for a call", REFUSED, DOCUMENTED, "bfloat16, or torchao's row-wise recipes"
    ),
    "`torch.ao.quantization` (dynamic, static, QAT)": Decision(
        "one scale for a call", REFUSED, TESTED, "torchao, per row"
    ),
    "gptqmodel's QQQ layers": Decision(PER_TOKEN, WITHIN, READ),
    "DeepSpeed's `QuantizedLinear`": Decision(UNTOUCHED, EXACT, READ),
    "ModelOpt, Brevitas, NNCF, Neural Compressor, GemLite": Decision("unknown", REFUSED, "nobody", "another method"),
}

UNKNOWN = (
    "flexpatch does not know it, and it may round activations by other answers' tokens. Load the model in bfloat16 or "
    "with another method (flexpatch.quantizers.quantizer_table() lists them); if its weights are not quantized, del "
    "model.config.quantization_config"
)


def check_quantization(model: nn.Module) -> None:
    """Refuse a model whose quantizer, layers or weights may round one answer's tokens by another answer's.

    Args:
        model: Any module.

    Raises:
        UnsupportedModelError: For a method or a layer that is unknown, or whose settings are not exact.
    """
    for method, settings in _methods(model):
        decision = METHODS.get(method)
        fault = UNKNOWN if decision is None else decision.fault(settings)
        if fault is not None:
            raise UnsupportedModelError(f"quantization method '{method}': {fault}")
    for name, layer in model.named_modules():
        if (fault := layer_fault(layer)) is not None:
            raise UnsupportedModelError(f"'{name}' ({type(layer).__name__}) {fault}")
    for name in _given_flat_tokens(model):
        raise UnsupportedModelError(
            f"'{name}' rounds activations by compressed-tensors' strategy 'token', but is given (tokens, features), "
            "for which that makes one scale for all tokens. Use a scheme whose activations are dynamic per group or "
            "static, or leave such layers out (ignore=[...])"
        )


def _methods(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """List the quantization methods in a model's settings, by transformers' names, with their settings."""
    for module in model.modules():
        has = module.__dict__
        for holder in (has.get("config"), has.get("hf_quantizer")):
            settings = getattr(holder, "quantization_config", None)
            method = _get(settings, "quant_method")
            method = str(getattr(method, "value", method))
            if method == "bitsandbytes":
                method += "_4bit" if _get(settings, "load_in_4bit") else "_8bit"
            if settings is not None:
                yield method, settings


def _get(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _given_flat_tokens(model: nn.Module) -> Iterator[str]:
    """List layers with scales for each token that are given (token, feature) inputs, and so have one scale for all.

    Output layers are, because log-probs are computed in chunks of tokens. Experts are in any model.
    """
    for name, layer in model.named_modules():
        if not _scales_flat_tokens(layer):
            continue
        parts = name.split(".")
        blocks = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        among_experts = any("expert" in part or "moe" in part for part in parts) or any(
            "expert" in child for block in blocks for child, _ in block.named_children()
        )
        if among_experts or "lm_head" in parts:
            yield name


def _scales_flat_tokens(layer: nn.Module) -> bool:
    """Return whether a layer scales each token of (batch, token, feature) inputs, but all tokens of (token, feature).

    The strategy "token" of compressed-tensors does.
    """
    has = layer.__dict__
    scheme = has.get("quantization_scheme") if has.get("quantization_enabled", True) else None
    wanted = [getattr(scheme, name, None) for name in ("input_activations", "output_activations")]
    return any(
        getattr(each, "dynamic", False) is not False and word(getattr(each, "strategy", None)) == "token"
        for each in wanted
        if each is not None
    )


def quantizer_table() -> str:
    """List all decisions as a Markdown table, for the documentation."""
    rows = ["| quantizer | activations | answers that share a row | exact setting | shown by |", "|" + " --- |" * 5]
    for names in (METHODS, BY_HAND):
        for name, made in names.items():
            label = f"`{name}`" if names is METHODS else name
            rows.append(f"| {label} | {made.activations} | {made.verdict} | {made.setting} | {made.shown_by} |")
    rows.append("| any other | unknown | refused | a method of this table | |")
    return "\n".join(rows)
