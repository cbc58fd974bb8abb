"""Adapters of peft on several architectures, in eval mode, on trees of all shapes; ``test_tuners.py`` has the rest."""

import copy
from typing import Any

import peft
import pytest
import torch
from helpers.oracle import BOUNDS, CONTROL, Result, random_ids, see_siblings, separate, trees
from parameterized import parameterized
from torch import nn

import flexpatch
from flexpatch import build_rows
from flexpatch.models import tiny_model

# Float64 but for what rounds to float32 within: transformers' norms, lifted nowhere here.
FOLDED = (1e-6, 1e-6)


def lora(**settings: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | settings)


KINDS: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("llama", lora()),
    "dora": ("llama", lora(use_dora=True)),
    "dora of windows": ("gemma3_text", lora(use_dora=True)),
    "lora bias": ("qwen2", lora(lora_bias=True, bias="all")),
    "norms trained": ("qwen3", lora(modules_to_save=["input_layernorm", "norm"])),
    "tied head trained": ("gemma", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "experts": ("mixtral", lora(target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
}


def adapted(kind: str) -> nn.Module:
    """With adapters that matter: at their start most are as if not there."""
    model_type, settings = KINDS[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(model_type), copy.deepcopy(settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@parameterized.expand([(each,) for each in KINDS])
def test_packed_rows(kind: str) -> None:
    """Log-probs and gradients of what is trained; without adapters, the base model's."""
    model = adapted(kind)
    true = Result.of(model, separate(model, trees()))
    with torch.no_grad(), model.disable_adapter():
        base = separate(model, trees()).tokens
    assert (true.tokens - base).abs().max() > CONTROL * BOUNDS[0], "the adapters must matter"
    rows = build_rows([trees()])
    flexpatch.apply(model)
    Result.packed(model, rows).matches(true)
    Result.packed(model, see_siblings(rows)).differs(true)
    with torch.no_grad(), model.disable_adapter():
        reference = flexpatch.answer_logprobs(model, rows).tokens
    assert (reference - base).abs().max() <= BOUNDS[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpatch.folding.gains", lambda *args: True)
    model = adapted(kind)
    prompt, *answers = random_ids(20, 9, 5)
    tree = [flexpatch.Tree.of(prompt, *answers)]
    true = Result.of(model, flexpatch.separate_logprobs(model, tree))
    flexpatch.apply(model)
    Result.of(model, flexpatch.separate_logprobs(model, tree)).matches(true, FOLDED)
    assert flexpatch.savings(model).folded == 1
