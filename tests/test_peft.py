"""Adapters of peft beyond plain LoRA, and what else is trained: packed rows, folded batches against separate runs."""

import copy
from typing import Any

import peft
import pytest
import torch
from oracle import BOUNDS, CONTROL, Result, random_ids, see_siblings, separate, trees
from torch import nn

import flexpatch
from flexpatch import build_rows, patch
from flexpatch.models import tiny_model

# Float64 but for what rounds to float32 within: transformers' norms, lifted nowhere here.
FOLDED = (1e-6, 1e-6)


def lora(**settings: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | settings)


KINDS: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("llama", lora()),
    "rslora": ("llama", lora(use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "dora of windows": ("gemma3_text", lora(use_dora=True)),
    "lora bias": ("qwen2", lora(lora_bias=True, bias="all")),
    "lora of embeddings and head": ("llama", lora(target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"])),
    "dora of embeddings and head": (
        "llama",
        lora(use_dora=True, target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"]),
    ),
    "embeddings and head trained": ("llama", lora(modules_to_save=["embed_tokens", "lm_head"])),
    "norms trained": ("qwen3", lora(modules_to_save=["input_layernorm", "norm"])),
    "new tokens trained": ("llama", lora(trainable_token_indices={"embed_tokens": [4, 5, 6]})),
    "tied head trained": ("gemma", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "layers repeated": ("llama", lora(layer_replication=[[0, 3], [1, 4]])),
    "experts": ("mixtral", lora(target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    "ia3": (
        "llama",
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "vera": ("llama", peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "loha": ("llama", peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")),
    "oft": ("llama", peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")),
    "norm tuning": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM")),
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


@pytest.mark.parametrize("kind", KINDS)
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
    monkeypatch.setattr(patch, "_gains", lambda *args: True)
    model = adapted(kind)
    prompt, *answers = random_ids(20, 9, 5)
    tree = [flexpatch.Tree.of(prompt, *answers)]
    true = Result.of(model, flexpatch.separate_logprobs(model, tree))
    flexpatch.apply(model)
    Result.of(model, flexpatch.separate_logprobs(model, tree)).matches(true, FOLDED)
    assert flexpatch.savings(model).folded == 1
