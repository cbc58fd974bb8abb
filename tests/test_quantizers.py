"""Every quantizer of transformers, and layers put in by hand: exact, within stock's own error, or refused.

Decisions are tested with stand-ins, which have the names and attributes of real layers. Where a package is installed,
its own layers show why: under one scale for all tokens of a call an answer changes others, under scales of each token
none does.
"""

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.quantizers import batch, inner_layers, keeps_apart, leaks, linears, logprobs, model_of, rounds_no_more
from packaging.version import Version
from parameterized import parameterized
from torch import nn
from transformers.quantizers import auto

import flexpatch
from flexpatch import UnsupportedModelError
from flexpatch.quantized_layers import LAYERS, layer_fault
from flexpatch.quantizers import BY_HAND, METHODS, PARTLY, REFUSED, check_quantization, quantizer_table

ROWWISE = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch's FP8 products on CPUs take one scale alone before 2.13"
)


# --- What transformers registers ------------------------------------------------------------------------------------


def test_every_method_of_transformers_is_decided() -> None:
    """A method that is new to transformers fails here, until somebody has read its code."""
    assert set(auto.AUTO_QUANTIZER_MAPPING) <= set(METHODS)
    assert set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING) <= set(METHODS)


def test_every_quantized_layer_of_transformers_is_decided() -> None:
    folder = Path(transformers.__file__).parent
    others = {"executorch.py", "moe.py", "peft.py"}  # their modules hold whole models, or are of no quantizer
    known, found = {name for rules in LAYERS.values() for name in rules}, set()
    for file in (folder / "integrations").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            bases = {ast.unparse(base).split(".")[-1] for base in getattr(node, "bases", ())}
            if bases & {"Module", "Linear", "Embedding", "FP8Linear"} and file.name not in others:
                found.add(node.name)
    assert found <= known
    assert len(found) >= 8, "the layers of the quantizers are found where they are looked for"


@parameterized.expand([(each,) for each in METHODS])
def test_methods(method: str) -> None:
    """By their settings alone, which a saved model has as a dictionary."""
    model = model_of()
    name, *bits = method.rsplit("_", 1) if method.startswith("bitsandbytes") else (method,)
    model.config.quantization_config = {"quant_method": name, "load_in_4bit": bits == ["4bit"]}
    if METHODS[method].verdict != REFUSED:
        check_quantization(model)
        return
    with pytest.raises(UnsupportedModelError, match=f"'{method}'.*bfloat16"):
        flexpatch.apply(model)
    assert not flexpatch.is_applied(model)


@parameterized.expand([True, False])
def test_an_unknown_method_is_refused(as_dict: bool) -> None:
    model = model_of()
    settings = {"quant_method": "brand_new"}
    model.config.quantization_config = settings if as_dict else SimpleNamespace(**settings)
    with pytest.raises(UnsupportedModelError, match=r"'brand_new'.*does not know.*quantizer_table.*del model\.config"):
        flexpatch.apply(model)
    del model.config.quantization_config
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**settings))
    with pytest.raises(UnsupportedModelError, match="'brand_new'"):
        flexpatch.apply(model)
    del model.hf_quantizer
    flexpatch.apply(model)


def test_rounded_activations_of_auto_round_are_refused() -> None:
    model = model_of()
    model.config.quantization_config = dict(quant_method="auto-round", bits=4, act_bits=16)
    check_quantization(model)
    model.config.quantization_config["act_bits"] = 8
    with pytest.raises(UnsupportedModelError, match=r"'auto-round': act_bits=8 .*act_bits=16"):
        check_quantization(model)


def test_table() -> None:
    lines = quantizer_table().splitlines()
    assert len(lines) == 2 + len(METHODS) + len(BY_HAND) + 1
    assert {line.count("|") for line in lines} == {6}
    for name, decision in (METHODS | BY_HAND).items():
        assert (decision.verdict in (PARTLY, REFUSED)) == bool(decision.setting), f"{name} lacks its way out"


# --- Layers and weights, by stand-ins -------------------------------------------------------------------------------


def layer(path: str, **attributes: Any) -> nn.Module:
    """A linear layer whose class has the name of another package's."""
    module, name = path.rsplit(".", 1)
    made = type(name, (nn.Linear,), {"__module__": module})(128, 128, bias=False)
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def weight(path: str, **attributes: Any) -> nn.Module:
    """A linear layer whose weight's class has the name of another package's."""
    module, name = path.rsplit(".", 1)
    made = nn.Linear(128, 128, bias=False)
    made.weight = made.weight.detach().as_subclass(type(name, (nn.Parameter,), {"__module__": module}))
    vars(made.weight).update(attributes)
    return made


def of(name: str, **attributes: Any) -> Any:
    """An object of a class of that name."""
    return type(name, (), attributes)()


def cast(granularity: str, kind: str = "dynamic") -> Any:
    return SimpleNamespace(
        scaling_type=SimpleNamespace(value=kind), scaling_granularity=SimpleNamespace(value=granularity)
    )


def activations(**settings: Any) -> Any:
    return SimpleNamespace(input_activations=SimpleNamespace(**settings), output_activations=None)


def quantizer(kind: str, **spec: Any) -> nn.Module:
    made = type(kind, (nn.Module,), {})()
    made.quant_spec = SimpleNamespace(**spec)
    return made


PER_ROW, PER_TENSOR = of("PerRow", dim=-1), of("PerTensor")
FLOAT8 = "torchao.quantization.quantize_.workflows.float8.float8_tensor.Float8Tensor"
INT8 = "torchao.quantization.quantize_.workflows.int8.int8_tensor.Int8Tensor"
INTX = "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor.IntxUnpackedToInt8Tensor"
NVFP4 = "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor"
OLD = "torchao.quantization.linear_activation_quantized_tensor.LinearActivationQuantizedTensor"
TRAINING = "torchao.float8.float8_linear.Float8Linear"
QAT = "torchao.quantization.qat.linear.FakeQuantizedLinear"


def fake(granularity: Any, **settings: Any) -> nn.Module:
    made = nn.Module()
    made.config = SimpleNamespace(granularity=granularity, **settings)
    return made


EXACT: dict[str, Callable[[], nn.Module]] = {
    "weights alone": lambda: weight(FLOAT8, act_quant_kwargs=None),
    "fp8, a scale for each row": lambda: weight(FLOAT8, act_quant_kwargs=SimpleNamespace(granularity=PER_ROW)),
    "fp8, blocks of features": lambda: weight(
        FLOAT8, act_quant_kwargs=SimpleNamespace(granularity=of("PerBlock", block_size=(1, 128)))
    ),
    "int8, a scale for each row": lambda: weight(INT8, act_quant_kwargs=SimpleNamespace(granularity=PER_ROW)),
    "int8, a constant": lambda: weight(
        INT8, act_quant_kwargs=SimpleNamespace(granularity=PER_TENSOR), act_quant_scale=torch.ones(1)
    ),
    "intx": lambda: weight(INTX, activation_quantization="int8_asym_per_token"),
    "mx": lambda: weight(
        "torchao.prototype.mx_formats.mx_tensor.MXTensor", act_quant_kwargs=of("QuantizeTensorToMXKwargs")
    ),
    "nvfp4, a constant": lambda: weight(NVFP4, act_quant_kwargs=SimpleNamespace(use_dynamic_per_tensor_scale=False)),
    "old torchao, int8": lambda: weight(
        OLD, input_quant_func=SimpleNamespace(__name__="_int8_symm_per_token_reduced_range_quant"), quant_kwargs={}
    ),
    "old torchao, fp8": lambda: weight(
        OLD, input_quant_func=SimpleNamespace(__name__="f"), quant_kwargs={"activation_granularity": PER_ROW}
    ),
    "fp8 training by rows": lambda: layer(
        TRAINING, config=SimpleNamespace(cast_config_input=cast("axiswise"), cast_config_grad_output=cast("axiswise"))
    ),
    "fp8 training, not": lambda: layer(
        TRAINING,
        config=SimpleNamespace(
            cast_config_input=cast("tensorwise", "disabled"), cast_config_grad_output=cast("tensorwise", "disabled")
        ),
    ),
    "QAT per token": lambda: layer(QAT, activation_fake_quantizer=fake(of("PerToken"), is_dynamic=True)),
    "QAT, weights": lambda: layer(QAT, activation_fake_quantizer=None),
    "compressed-tensors per group": lambda: layer(
        "torch.nn.modules.linear.Linear", quantization_scheme=activations(dynamic=True, strategy="group")
    ),
    "compressed-tensors, constant": lambda: layer(
        "torch.nn.modules.linear.Linear", quantization_scheme=activations(dynamic=False, strategy="tensor")
    ),
    "compressed-tensors, off": lambda: layer(
        "torch.nn.modules.linear.Linear",
        quantization_scheme=activations(dynamic=True, strategy="tensor"),
        quantization_enabled=False,
    ),
    "quark, frozen": lambda: layer(
        "quark.torch.quantization.nn.modules.quantize_linear.QuantLinear",
        _input_quantizer=quantizer("FrozenScaledFakeQuantize", qscheme="per_tensor"),
    ),
    "quark per group": lambda: layer(
        "quark.torch.quantization.nn.modules.quantize_linear.QuantLinear",
        _input_quantizer=quantizer("DynamicScaledFakeQuantize", qscheme="per_group", ch_axis=-1),
    ),
    "FP-Quant": lambda: layer("fp_quant.module.linear.FPQuantLinear", config=SimpleNamespace(backward_dtype="bf16")),
    "GPTQModel": lambda: layer("gptqmodel.nn_modules.qlinear.marlin.MarlinLinear"),
    "HQQ": lambda: layer("hqq.core.quantize.HQQLinear"),
    "fp8 of transformers": lambda: layer("transformers.integrations.finegrained_fp8.FP8Linear"),
    "TransformerEngine's norm": lambda: layer("transformer_engine.pytorch.module.layernorm.LayerNorm"),
    "a user's own layer": lambda: layer("my_project.layers.Scaled"),
}
INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fp8, one scale": (
        lambda: weight(FLOAT8, act_quant_kwargs=SimpleNamespace(granularity=PER_TENSOR)),
        r"PerTensor.*one scale for all tokens.*PerRow\(\)",
    ),
    "fp8, a scale for each feature": (
        lambda: weight(FLOAT8, act_quant_kwargs=SimpleNamespace(granularity=of("PerRow", dim=0))),
        r"one scale.*PerRow\(\)",
    ),
    "fp8, blocks of tokens": (
        lambda: weight(FLOAT8, act_quant_kwargs=SimpleNamespace(granularity=of("PerBlock", block_size=(128, 128)))),
        r"PerBlock.*one scale",
    ),
    "int8, one scale": (
        lambda: weight(INT8, act_quant_kwargs=SimpleNamespace(granularity=PER_TENSOR)),
        r"PerTensor.*one scale.*PerRow\(\)",
    ),
    "intx, new": (lambda: weight(INTX, activation_quantization="int8_per_tensor"), r"int8_per_tensor.*one scale"),
    "nvfp4": (
        lambda: weight(NVFP4, act_quant_kwargs=SimpleNamespace(use_dynamic_per_tensor_scale=True)),
        r"one scale.*use_dynamic_per_tensor_scale=False",
    ),
    "old torchao": (
        lambda: weight(
            OLD, input_quant_func=SimpleNamespace(__name__="f"), quant_kwargs={"activation_granularity": PER_TENSOR}
        ),
        r"through f, granularity.*PerTensor.*one scale",
    ),
    "new weight of torchao": (lambda: weight("torchao.new.NewTensor"), r"torchao\.new\.NewTensor.*does not know"),
    "fp8 training": (
        lambda: layer(
            TRAINING,
            config=SimpleNamespace(cast_config_input=cast("tensorwise"), cast_config_grad_output=cast("tensorwise")),
        ),
        r'cast_config_input.*one scale.*from_recipe_name\("rowwise"\)',
    ),
    "fp8 training, gradients": (
        lambda: layer(
            TRAINING,
            config=SimpleNamespace(cast_config_input=cast("axiswise"), cast_config_grad_output=cast("tensorwise")),
        ),
        r"cast_config_grad_output.*one scale",
    ),
    "fp8 training, other settings": (lambda: layer(TRAINING), r"cast_config_input: None.*one scale"),
    "QAT": (lambda: layer(QAT, activation_fake_quantizer=fake(PER_TENSOR)), r"PerTensor.*one scale.*PerToken\(\)"),
    "QAT, first call": (
        lambda: layer(QAT, activation_fake_quantizer=fake(of("PerToken"), is_dynamic=False)), r"one scale.*PerToken\(\)"
    ),
    "compressed-tensors": (
        lambda: layer(
            "torch.nn.modules.linear.Linear", quantization_scheme=activations(dynamic=True, strategy="tensor")
        ),
        r"strategy 'tensor'.*one scale.*static",
    ),
    "quark": (
        lambda: layer(
            "quark.torch.quantization.nn.modules.quantize_linear.QuantLinear",
            _input_quantizer=quantizer("DynamicScaledFakeQuantize", qscheme="per_channel", ch_axis=1),
        ),
        r"DynamicScaledFakeQuantize.*one scale.*static",
    ),
    "FP-Quant": (
        lambda: layer("fp_quant.module.linear.FPQuantLinear", config=SimpleNamespace(backward_dtype="mxfp4")),
        r'random signs.*backward_dtype="bf16"',
    ),
    "TransformerEngine": (
        lambda: layer("transformer_engine.pytorch.module.linear.Linear"), r'FP8.*mixed_precision="bf16".*"rowwise"'
    ),
    "MS-AMP": (lambda: layer("msamp.nn.linear.FP8Linear"), r'FP8.*mixed_precision="bf16"'),
    "NVFP4 of transformers": (lambda: layer("transformers.integrations.nvfp4.NVFP4Linear"), r"4 bits or not at all"),
    "GPTQModel with activations": (
        lambda: layer("gptqmodel.nn_modules.qlinear.w4a_floatx.W4AFP8Linear"),
        r"W4AFP8Linear.*does not know.*weights alone",
    ),
    "SwitchBack": (lambda: layer("bitsandbytes.nn.triton_based_modules.SwitchBackLinear"), r"does not know"),
    "outliers": (
        lambda: layer("bitsandbytes.nn.modules.Linear8bitLt", state=SimpleNamespace(threshold=6.0)),
        r"llm_int8_threshold=6\.0.*llm_int8_threshold=0\.0",
    ),
}  # fmt: skip


@parameterized.expand([(each,) for each in EXACT])
def test_layers_that_keep_tokens_apart(case: str) -> None:
    assert layer_fault(EXACT[case]()) is None


@parameterized.expand([(each,) for each in INEXACT])
def test_layers_that_do_not(case: str) -> None:
    """At ``apply``; and before the first call that shares, where somebody puts them in afterwards."""
    make, words = INEXACT[case]
    model = model_of()
    kept = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = make()
    with pytest.raises(UnsupportedModelError, match=rf"(?s)'model\.layers\.1\.self_attn\.o_proj'.*{words}"):
        flexpatch.apply(model)
    assert not flexpatch.is_applied(model)
    model.model.layers[1].self_attn.o_proj = kept
    flexpatch.apply(model)
    ids, mask = batch()
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert flexpatch.savings(model).folded == 1
    model.model.layers[1].self_attn.o_proj = make()
    with pytest.raises(UnsupportedModelError, match=rf"(?s)o_proj'.*{words}"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    with pytest.raises(UnsupportedModelError, match=rf"(?s)o_proj'.*{words}"):
        flexpatch.model_inputs(model, flexpatch.build_rows([[flexpatch.Tree.of([3, 4], [5], [6])]]))


def test_weights_in_shards() -> None:
    """FSDP2 and tensor parallelism keep a quantized weight within a tensor of their own."""
    made = nn.Linear(128, 128)
    inside = weight(INT8, act_quant_kwargs=SimpleNamespace(granularity=PER_TENSOR)).weight
    made.weight = made.weight.detach().as_subclass(type("DTensor", (nn.Parameter,), {}))
    assert layer_fault(made) is None
    vars(made.weight)["_local_tensor"] = inside
    assert "one scale" in str(layer_fault(made))


def test_a_wrapper_around_a_model() -> None:
    """torchao's FP8 attention sits above the model it changes."""
    model = model_of()
    around = type("_FP8Wrapper", (nn.Module,), {"__module__": "torchao.prototype.attention.shared_utils.wrapper"})()
    around.inner = model
    with pytest.raises(UnsupportedModelError, match=r"_FP8Wrapper.*does not know"):
        flexpatch.apply(around)


def test_flat_tokens_of_compressed_tensors() -> None:
    """Its scales are of tokens only where inputs are (batch, token, feature): not among experts, nor in heads."""
    scheme = activations(dynamic=True, strategy="token")
    model = model_of()
    model.model.layers[0].mlp.up_proj.quantization_scheme = scheme
    check_quantization(model)
    model.lm_head.quantization_scheme = scheme
    with pytest.raises(UnsupportedModelError, match=r"'lm_head'.*'token'.*per group.*ignore="):
        check_quantization(model)
    experts = model_of("qwen2_moe")
    experts.model.layers[0].self_attn.q_proj.quantization_scheme = scheme
    check_quantization(experts)
    experts.model.layers[0].mlp.shared_expert.up_proj.quantization_scheme = scheme
    with pytest.raises(UnsupportedModelError, match=r"shared_expert\.up_proj'.*'token'"):
        check_quantization(experts)


# --- Real layers ----------------------------------------------------------------------------------------------------


def test_unquantized() -> None:
    keeps_apart(model_of())


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Layers that compile parts of themselves run without."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
def test_bitnet() -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    model = model_of()
    for name, old in linears(model):
        made = AutoBitLinear(old.in_features, old.out_features, bias=False, online_quant=True)
        made.weight = old.weight
        model.set_submodule(name, made)
    keeps_apart(model)


def test_constants_of_gemma() -> None:
    layers = pytest.importorskip("transformers.integrations.gemma_quant", reason="of newer transformers")
    model = model_of(dtype=torch.float64)
    for name, old in linears(model):
        made = layers.QuantizedLinear(old.in_features, old.out_features)
        scale = old.weight.detach().abs().amax(-1, keepdim=True) / 127
        made.weight.copy_((old.weight / scale).round())
        made.weight_scale.data = scale
        made.input_activation_scale.data.fill_(0.05)
        model.set_submodule(name, made)
    keeps_apart(model)


@ROWWISE
def test_fp8_of_compressed_tensors() -> None:
    """transformers' own layer, which needs no package."""
    layers = pytest.importorskip("transformers.integrations.compressed_tensors", reason="of newer transformers")
    model = model_of(dtype=torch.bfloat16)
    for name, old in linears(model):
        made = layers.CompressedTensorsFP8Linear(old.in_features, old.out_features)
        values, scales = layers.quantize_fp8_per_row(old.weight.detach())
        made.weight.data, made.weight_scale.data = values, scales[None]
        model.set_submodule(name, made)
    keeps_apart(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_ao() -> None:
    model = torch.ao.quantization.quantize_dynamic(model_of(), {nn.Linear}, dtype=torch.qint8)
    leaks(model, r"torch\.ao|one scale for all tokens.*Int8DynamicActivationInt8WeightConfig")


TORCHAO: dict[str, Callable[[Any], Any]] = {
    "int8, rows": lambda ao: ao.Int8DynamicActivationInt8WeightConfig(),
    "int8, weights": lambda ao: ao.Int8WeightOnlyConfig(),
    "intx": lambda ao: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "fp8, weights": lambda ao: ao.Float8WeightOnlyConfig(),
}


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao(kind: str, torchao: Any) -> None:
    model = model_of()
    torchao.quantize_(model, TORCHAO[kind](torchao), filter_fn=inner_layers)
    assert type(model.model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao.")
    keeps_apart(model)


def test_the_verifier_reads_torchaos_weights(torchao: Any) -> None:
    """They are tensors of a class for which few operations are defined; the truth has their numbers in float64."""
    model = model_of()
    torchao.quantize_(model, TORCHAO["int8, weights"](torchao), filter_fn=inner_layers)
    report = flexpatch.check_parity(model)
    assert report.passed, str(report)


def test_torchao_one_scale(torchao: Any) -> None:
    model = model_of()
    config = torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor())
    torchao.quantize_(model, config, filter_fn=inner_layers)
    leaks(model, r"q_proj'.*PerTensor.*one scale.*PerRow\(\)")


def fp8_weights(torchao: Any, granularity: Any) -> nn.Module:
    """torchao's fp8 inference, whose own function asks for a GPU."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    model, config = model_of(dtype=torch.bfloat16), Float8MMConfig(use_fast_accum=False)
    wanted = float8_tensor.QuantizeTensorToFloat8Kwargs(granularity=granularity, mm_config=config)
    for _, linear in linears(model):
        made = float8_tensor.Float8Tensor.from_hp(
            linear.weight.detach(), granularity=granularity, mm_config=config, act_quant_kwargs=wanted
        )
        linear.weight = nn.Parameter(made, requires_grad=False)
    return model


@ROWWISE
def test_torchao_fp8(torchao: Any) -> None:
    keeps_apart(fp8_weights(torchao, torchao.PerRow()))
    with pytest.raises(UnsupportedModelError, match=r"PerTensor.*one scale.*PerRow\(\)"):
        flexpatch.apply(fp8_weights(torchao, torchao.PerTensor()))


def qat(torchao: Any, activation_config: Any) -> nn.Module:
    model = model_of()
    weights = torchao.qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    config = torchao.qat.QATConfig(activation_config=activation_config, weight_config=weights, step="prepare")
    torchao.quantize_(model, config, filter_fn=inner_layers)
    return model


def test_torchao_qat(torchao: Any) -> None:
    keeps_apart(qat(torchao, torchao.qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)))
    keeps_apart(qat(torchao, torchao.qat.Float8FakeQuantizeConfig(granularity=torchao.PerRow())))
    leaks(qat(torchao, torchao.qat.Float8FakeQuantizeConfig(granularity=torchao.PerTensor())), "PerTensor.*one scale")


def trained_in_fp8(recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return convert_to_float8_training(model_of(), config=config, module_filter_fn=inner_layers)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_fp8_training_by_rows(recipe: str) -> None:
    rounds_no_more(trained_in_fp8(recipe))


@pytest.mark.usefixtures("torchao")
def test_fp8_training_by_one_scale() -> None:
    leaks(trained_in_fp8("tensorwise"), r'cast_config_input.*one scale.*from_recipe_name\("rowwise"\)')


@pytest.mark.usefixtures("torchao")
def test_accelerate_converts_after_apply() -> None:
    ao = pytest.importorskip("accelerate.utils.ao")
    model = flexpatch.apply(model_of())
    ids, mask = batch()
    with torch.no_grad():
        logprobs(model, ids, mask)
        ao.convert_model_to_fp8_ao(model)
        with pytest.raises(UnsupportedModelError, match=r"one scale.*rowwise"):
            logprobs(model, ids, mask)


@parameterized.expand([False, True])
def test_quanto(activated: bool) -> None:
    """Its scales are constants, found by calibration."""
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = model_of(dtype=torch.float64)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8 if activated else None, exclude="lm_head")
    if activated:
        with quanto.Calibration(), torch.no_grad():
            logprobs(model, *batch())
    quanto.freeze(model)
    keeps_apart(model)


def test_hqq() -> None:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model, config = model_of(), hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    for name, linear in linears(model):
        made = hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        model.set_submodule(name, made)
    keeps_apart(model)


def compressed(**settings: Any) -> nn.Module:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    args = quantization.QuantizationArgs
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=args(num_bits=8, strategy="channel"),
        input_activations=args(num_bits=8, **settings) if settings else None,
    )
    config = quantization.QuantizationConfig(
        config_groups={"all": scheme}, quantization_status=quantization.QuantizationStatus.FROZEN, ignore=["lm_head"]
    )
    model = model_of()
    quantization.apply_quantization_config(model, config)
    for _, linear in linears(model):
        linear.weight_scale.data = linear.weight.detach().abs().amax(-1, keepdim=True) / 127
        if getattr(linear, "input_scale", None) is not None:
            linear.input_scale.data.fill_(0.03)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(strategy="token", dynamic=True),
        dict(strategy="group", group_size=32, dynamic=True),
        dict(strategy="tensor", dynamic=False),
    ],
    ids=str,
)
def test_compressed_tensors(settings: dict[str, Any]) -> None:
    keeps_apart(compressed(**settings))


def test_compressed_tensors_one_scale() -> None:
    leaks(compressed(strategy="tensor", dynamic=True), r"strategy 'tensor'.*one scale")


def test_flat_tokens_share_a_scale() -> None:
    """Why compressed-tensors' scales of tokens are refused where inputs are (tokens, features)."""
    linear = compressed(strategy="token", dynamic=True).model.layers[0].mlp.up_proj
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    louder = x * torch.tensor([[1.0], [9.0]])
    with torch.no_grad():
        assert torch.equal(linear(x[None])[0, 0], linear(louder[None])[0, 0])
        assert not torch.equal(linear(x)[0], linear(louder)[0])
