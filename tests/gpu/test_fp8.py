"""FP8 and 8-bit kernels: scales of each token keep answers apart, and one scale for a call does not.

torchao's wheel is enough: ``pip download --no-deps torchao``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.quantizers import inner_layers, keeps_apart, leaks, linears, model_of, rounds_no_more
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

APART: dict[str, Callable[[Any], Any]] = {
    "fp8, rows": lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    "fp8, weights": lambda ao: ao.Float8WeightOnlyConfig(),
    "int8, rows": lambda ao: ao.Int8DynamicActivationInt8WeightConfig(),
    "int8, weights": lambda ao: ao.Int8WeightOnlyConfig(),
}
TOGETHER: dict[str, Callable[[Any], Any]] = {
    "fp8": lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor()),
    "int8": lambda ao: ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerTensor()),
}


def on_gpu() -> nn.Module:
    return model_of(dtype=torch.bfloat16).cuda()


@pytest.mark.parametrize("kind", APART)
def test_torchao(kind: str, torchao: Any) -> None:
    model = on_gpu()
    torchao.quantize_(model, APART[kind](torchao), filter_fn=inner_layers)
    keeps_apart(model)


@pytest.mark.parametrize("kind", TOGETHER)
def test_torchao_one_scale(kind: str, torchao: Any) -> None:
    model = on_gpu()

    def chosen(module: nn.Module, name: str) -> bool:
        # torchao 0.18 takes the one scale of a 128 x 128 weight for that of a block, and fails.
        return inner_layers(module, name) and module.weight.shape != (128, 128)

    torchao.quantize_(model, TOGETHER[kind](torchao), filter_fn=chosen)
    leaks(model, r"PerTensor.*one scale")


def trained_in_fp8(recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Numbers of tokens are no multiples of 16.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True)
    return convert_to_float8_training(on_gpu(), config=config, module_filter_fn=inner_layers)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_fp8_training_by_rows(recipe: str) -> None:
    rounds_no_more(trained_in_fp8(recipe))


@pytest.mark.usefixtures("torchao")
def test_fp8_training_by_one_scale() -> None:
    leaks(trained_in_fp8("tensorwise"), r"cast_config_input.*one scale")


def test_fp8_of_compressed_tensors() -> None:
    layers = pytest.importorskip("transformers.integrations.compressed_tensors")
    model = on_gpu()
    for name, old in linears(model):
        made = layers.CompressedTensorsFP8Linear(old.in_features, old.out_features).cuda()
        values, scales = layers.quantize_fp8_per_row(old.weight.detach())
        made.weight.data, made.weight_scale.data = values, scales[None]
        model.set_submodule(name, made)
    keeps_apart(model)
