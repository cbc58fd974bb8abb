"""Decides for each class of quantized layers and weights whether it keeps tokens apart.

A layer keeps tokens apart if it leaves activations as they are, or rounds each token by its own scale or by a constant.
With one scale for all tokens of a call, an answer changes the rounding of others. Classes are recognised by their names
and their files' names, because no quantizer's package is imported. A class of a quantizer's package that is not listed
is refused until somebody has read its code.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import Parameter

# Takes a layer or a weight. Returns its fault and an alternative; None if it keeps tokens apart.
Rule = Callable[[Any], str | None]

ONE_SCALE = "rounds activations by one scale for all tokens of a call, so one answer would change others"
TORCHAO_WAY = "Give the torchao configuration granularity=PerRow(), or quantize weights alone (Int8WeightOnlyConfig)"
FLOAT8_WAY = (
    'Use torchao\'s Float8LinearConfig.from_recipe_name("rowwise") or "rowwise_with_gw_hp", or train in bfloat16'
)
BFLOAT16 = (
    "Train torch's own layers in bfloat16 (accelerate: mixed_precision=\"bf16\"), or in FP8 with accelerate's "
    'AORecipeKwargs(config=torchao\'s Float8LinearConfig.from_recipe_name("rowwise"))'
)
COMPRESSED_WAY = "Use a scheme whose activations are dynamic per group, static, or not quantized"
QUARK_WAY = "Use groups of features (ch_axis=-1), or static scales"
WEIGHTS_WAY = "Use a scheme that quantizes weights alone, or load the model in bfloat16"


def _exact(layer: Any) -> str | None:
    return None


def _refused(what: str, way: str) -> Rule:
    return lambda layer: f"{what}. {way}"


def word(value: Any) -> str:
    """Return the text of a value; of an enum's member, the text of its value."""
    return str(getattr(value, "value", value))


def _rows_alone(granularity: Any) -> bool:
    """Return whether torchao's granularity gives each token its own scales. All dimensions but the last are tokens."""
    kind = type(granularity).__name__
    blocks = getattr(granularity, "block_size", ())
    along_features = kind == "PerRow" and getattr(granularity, "dim", -1) == -1
    return along_features or kind in ("PerToken", "PerGroup") or (kind == "PerBlock" and set(blocks[:-1]) == {1})


def _torchao_weight(weight: Any) -> str | None:
    wanted = getattr(weight, "act_quant_kwargs", None)
    if wanted is None or getattr(weight, "act_quant_scale", None) is not None:
        return None  # weights alone, or a constant
    if type(wanted).__name__ == "QuantizeTensorToMXKwargs":
        return None  # blocks of 32 features
    if getattr(wanted, "use_dynamic_per_tensor_scale", None) is not None:
        whole = wanted.use_dynamic_per_tensor_scale
        return f"{ONE_SCALE}. Pass use_dynamic_per_tensor_scale=False, or quantize weights alone" if whole else None
    granularity = getattr(wanted, "granularity", None)
    return None if _rows_alone(granularity) else f"(granularity {granularity}) {ONE_SCALE}. {TORCHAO_WAY}"


def _torchao_intx(weight: Any) -> str | None:
    wanted = getattr(weight, "activation_quantization", None)
    per_token = wanted is None or word(wanted) == "int8_asym_per_token"
    return None if per_token else f"(activation_quantization {word(wanted)}) {ONE_SCALE}. {TORCHAO_WAY}"


def _torchao_function(weight: Any) -> str | None:
    """Find the fault of a weight of torchao before 0.16, which has a function that rounds activations."""
    name = getattr(getattr(weight, "input_quant_func", None), "__name__", "")
    granularity = (getattr(weight, "quant_kwargs", None) or {}).get("activation_granularity")
    known = ("_int8_asymm_per_token_quant", "_int8_symm_per_token_quant", "_int8_symm_per_token_reduced_range_quant")
    if name in known or _rows_alone(granularity):
        return None
    return (
        f"(activations through {name or 'an unknown function'}, granularity {granularity}) {ONE_SCALE}. {TORCHAO_WAY}"
    )


def _float8_training(layer: Any) -> str | None:
    """Find the fault of torchao's Float8Linear.

    The gradient of a shared token is rounded once, as a sum over answers, which errs no more than rounding each answer.
    """
    config = getattr(layer, "config", None)
    for name in ("cast_config_input", "cast_config_grad_output"):
        cast = getattr(config, name, None)
        off = word(getattr(cast, "scaling_type", None)) == "disabled"
        if not off and word(getattr(cast, "scaling_granularity", None)) != "axiswise":
            return f"({name}: {cast}) {ONE_SCALE}. {FLOAT8_WAY}"
    return None


def _fake_quantized(layer: Any) -> str | None:
    """Find the fault of torchao's layers for quantization-aware training."""
    config = getattr(layer.__dict__["_modules"].get("activation_fake_quantizer"), "config", None)
    alone = config is None or (
        _rows_alone(getattr(config, "granularity", None)) and getattr(config, "is_dynamic", True)
    )
    return None if alone else f"({config}) {ONE_SCALE}. Give its activation_config granularity PerToken() or PerRow()"


def _outliers(layer: Any) -> str | None:
    """Find the fault of LLM.int8 (arXiv 2208.07339), where an outlier of one token changes all tokens."""
    threshold = getattr(layer.__dict__.get("state"), "threshold", 0.0)
    if not threshold:
        return None
    return (
        f"is 8-bit with llm_int8_threshold={threshold}: outliers of one answer would change how all tokens of its row "
        "are rounded. Load the model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits"
    )


def _scheme(scheme: Any) -> str | None:
    """Find the fault of compressed-tensors' settings, an attribute of any layer. Settings of weights never matter."""
    for name in ("input_activations", "output_activations"):
        wanted = getattr(scheme, name, None)
        if wanted is None or getattr(wanted, "dynamic", True) is False:
            continue
        strategy = word(getattr(wanted, "strategy", None))
        if strategy not in ("token", "group", "tensor_group"):
            return f"({name}: dynamic, strategy '{strategy}') {ONE_SCALE}. {COMPRESSED_WAY}"
    return None


def _quark(layer: Any) -> str | None:
    has = layer.__dict__
    for name in ("input_quantizer", "output_quantizer", "_input_quantizer", "_output_quantizer"):
        quantizer = has["_modules"].get(name) or has.get(name)
        if quantizer is None or type(quantizer).__name__ in ("FrozenScaledFakeQuantize", "StaticScaledRealQuantizer"):
            continue  # untouched, or a constant
        spec = next(
            (s for s in (getattr(quantizer, n, None) for n in ("quant_spec", "qspec")) if s is not None), quantizer
        )
        if word(getattr(spec, "qscheme", None)) != "per_group" or getattr(spec, "ch_axis", None) != -1:
            return f"({name}: {type(quantizer).__name__}) {ONE_SCALE}. {QUARK_WAY}"
    return None


def _fp_quant(layer: Any) -> str | None:
    backward = word(getattr(getattr(layer, "config", None), "backward_dtype", None))
    if backward == "bf16":
        return None
    return f'draws random signs in backward (backward_dtype="{backward}"). Use FPQuantConfig(backward_dtype="bf16")'


def _named(*names: str, rule: Rule = _exact) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


NVFP4 = _refused(
    "rounds activations to 4 bits or not at all, by how many tokens a call has", "Load the model in bfloat16"
)
TRANSFORMERS = "transformers.integrations."
# Rules by the start of a class's module, then by the class. Other classes of these modules are refused.
LAYERS: dict[str, dict[str, Rule]] = {
    f"{TRANSFORMERS}bitnet": _named("BitLinear", "AutoBitLinear"),
    f"{TRANSFORMERS}compressed_tensors": _named("CompressedTensorsFP8Linear"),
    f"{TRANSFORMERS}eetq": _named("EetqLinear"),
    f"{TRANSFORMERS}fbgemm_fp8": _named("FbgemmFp8Linear", "FbgemmFp8Llama4TextExperts"),
    f"{TRANSFORMERS}finegrained_fp8": _named(
        "FP8Linear", "FP8GroupedLinear", "FP8Embedding", "FP8Experts", "FP8Expert"
    ),
    f"{TRANSFORMERS}gemma_quant": _named("QuantizedLinear", "QuantizedEmbedding"),
    f"{TRANSFORMERS}gguf": _named("GgufLinear", "GgufExperts", "GgufEmbedding"),
    f"{TRANSFORMERS}higgs": _named("HiggsLinear"),
    f"{TRANSFORMERS}metal_quantization": _named("MetalLinear"),
    f"{TRANSFORMERS}mxfp4": _named("Mxfp4GptOssExperts", "Mxfp4GptOssMLP"),
    f"{TRANSFORMERS}nvfp4": _named("NVFP4Linear", rule=NVFP4),
    "bitsandbytes": _named(
        *("Linear4bit", "LinearFP4", "LinearNF4", "Params4bit", "Int8Params", "StableEmbedding"),
        *("Embedding", "Embedding4bit", "Embedding8bit", "EmbeddingFP4", "EmbeddingNF4"),
    )
    | _named("Linear8bitLt", rule=_outliers),
    "torchao": _named(
        *("Int4Tensor", "Int4PlainInt32Tensor", "Int4TilePackedTo4dTensor", "Int4PreshuffledTensor", "NF4Tensor"),
        *("Int4MarlinSparseTensor", "AffineQuantizedTensor", "CodebookQuantizedTensor", "GGUFQuantizedTensor"),
        *("CodebookQuantizedPackedTensor", "UIntxBitPackedTensor", "WeightWithDynamicFloat8CastTensor"),
        *("WeightOnlyInt4Linear", "Int8DynActInt4WeightLinear", "IntxFakeQuantizer", "Float8FakeQuantizer"),
        *("Int4WeightFakeQuantizer", "FakeQuantizer", "FakeQuantizedEmbedding", "Int4WeightOnlyQATEmbedding"),
    )
    | _named("Float8Tensor", "Int8Tensor", "MXTensor", "NVFP4Tensor", rule=_torchao_weight)
    | _named("IntxUnpackedToInt8Tensor", "IntxOpaqueTensor", rule=_torchao_intx)
    | _named("LinearActivationQuantizedTensor", rule=_torchao_function)
    | _named("FakeQuantizedLinear", "Int8DynActInt4WeightQATLinear", "Int4WeightOnlyQATLinear", rule=_fake_quantized)
    | _named("Float8Linear", rule=_float8_training),
    "optimum.quanto": _named(
        *("QLinear", "QLayerNorm", "QConv2d", "WeightQBytesTensor", "WeightQBitsTensor", "AWQWeightQBitsTensor"),
        *("TinyGemmWeightQBitsTensor", "MarlinInt4WeightQBitsTensor", "MarlinF8QBytesTensor"),
    ),
    "compressed_tensors": _named("CompressedLinear", "HadamardTransform", "RandomMatrixTransform"),
    "hqq": _named("HQQLinear", "HQQLinearLoRA", "MarlinLinear", "HQQLinearBitBlas", "HQQLinearTorchWeightOnlynt4"),
    "gptqmodel": _named(
        *("TorchLinear", "TorchQuantLinear", "TorchFusedLinear", "TorchFusedQuantLinear", "TorchAtenLinear"),
        *("TritonV2Linear", "TritonV2QuantLinear", "MarlinLinear", "MarlinQuantLinear", "MacheteLinear"),
        *("ExllamaV2Linear", "ExllamaV2QuantLinear", "ExllamaQuantLinear", "BitblasLinear", "BitBLASQuantLinear"),
        *("AwqTorchLinear", "AwqTorchQuantLinear", "AwqGEMMLinear", "AwqGEMMQuantLinear", "AwqGEMMTritonLinear"),
        *("AwqGEMVLinear", "AwqGEMVQuantLinear", "AwqGEMVFastLinear", "AwqGEMVFastQuantLinear", "LLMAwqLinear"),
        *("AwqMarlinLinear", "AwqMarlinQuantLinear", "AwqExllamaV2Linear", "AwqExllamaV2QuantLinear"),
        *("AwqMacheteLinear", "TorchQuantEmbeddings"),
    )
    | _named("QQQLinear", "QQQTorchLinear", "QQQQuantLinear"),  # rounds each token by its largest feature
    "awq": _named("WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_GEMVFast", "WQLinear_Marlin", "ScaledActivation"),
    "auto_gptq": _named("QuantLinear"),
    "auto_round_extension": _named("QuantLinear", "QuantLinearGPTQ", "QuantLinearAWQ"),
    "aqlm": _named("QuantizedLinear"),
    "vptq": _named("VQuantLinear"),
    "spqr_quant": _named("QuantizedLinear"),
    "eetq": _named("EetqLinear", "W8A16Linear"),
    "sinq": _named("SINQLinear", "SINQExperts"),
    "fp_quant": _named("FPQuantLinear", rule=_fp_quant),
    "quark": _named("QuantLinear", "QParamsLinear", rule=_quark),
    # TransformerEngine's default recipe takes scales from earlier calls too, and its layers do not tell their recipe.
    "transformer_engine": _named("LayerNorm", "RMSNorm"),
    "intel_transformer_engine": _named("LayerNorm", "RMSNorm"),
    "deepspeed.linear": _named("QuantizedLinear", "QuantizedParameter", "LoRAOptimizedLinear", "OptimizedLinear"),
}  # fmt: skip
# Packages without a class that is known to be exact.
LAYERS |= {
    package: {}
    for package in (
        *("torch.ao.nn", "torch.ao.quantization", "msamp", "fouroversix", "auto_round", "gemlite", "modelopt"),
        *("brevitas", "nncf", "neural_compressor", "deepspeed.compression"),
    )
}

# Rules for the other classes of some packages.
OTHERS: dict[str, Rule] = {
    "transformer_engine": _refused(
        "may compute in FP8, by scales from all tokens of a call and of earlier ones", BFLOAT16
    ),
    "intel_transformer_engine": _refused("may compute in FP8, by scales from all tokens of a call", BFLOAT16),
    "msamp": _refused("computes in FP8 by one scale for all tokens of a call", BFLOAT16),
    "torch.ao.nn": _refused(ONE_SCALE, "Use torchao's Int8DynamicActivationInt8WeightConfig(), which has one for each"),
    "torch.ao.quantization": _refused(ONE_SCALE, "Use torchao's QATConfig with activations per token"),
}


def _unknown(layer: Any) -> str:
    kind = type(layer)
    return (
        f"is of {kind.__module__}.{kind.__qualname__}, a quantized layer that flexpatch does not know: it may round "
        f"activations by other answers' tokens. {WEIGHTS_WAY}; flexpatch.quantizers.quantizer_table() lists what is "
        "exact"
    )


# Caches the rule of each class, because rules are looked up before every call.
_RULES: dict[type, Rule | None] = {}


def _rule(kind: type) -> Rule | None:
    """Look up the rule for a class of layers or weights; ``None`` for a class of no quantizer's."""
    if kind not in _RULES:
        _RULES[kind] = _find_rule(kind)
    return _RULES[kind]


def _find_rule(kind: type) -> Rule | None:
    for base in kind.__mro__:
        for start, rules in LAYERS.items():
            if f"{base.__module__}.".startswith(f"{start}."):
                return rules.get(base.__name__) or OTHERS.get(start, _unknown)
    return None


def layer_fault(layer: nn.Module) -> str | None:
    """Find the reason to refuse one layer.

    Called for every layer before every call that shares, so it must cost little.

    Args:
        layer: Any module. Its children are not checked.

    Returns:
        The layer's fault, and the way out; ``None`` if it keeps tokens apart, or is of no quantizer's.
    """
    has, kind = layer.__dict__, type(layer)
    rule = _RULES[kind] if kind in _RULES else _rule(kind)
    fault = None if rule is None else rule(layer)
    if fault is None and "quantization_scheme" in has and has.get("quantization_enabled", True):
        fault = _scheme(has["quantization_scheme"])
    for weight in has["_parameters"].values():
        if type(weight) is not Parameter and weight is not None and fault is None:
            weight = getattr(weight, "_local_tensor", weight)  # unwraps parameters of FSDP2 and tensor parallelism
            rule = _rule(type(weight))
            fault = None if rule is None else rule(weight)
    return fault
