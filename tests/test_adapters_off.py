"""A policy without its adapters as the reference of packed trainers: TRL's own numbers, with less to wait for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_runs import Packed, train
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import flexpatch
from flexpatch import adapters_off
from flexpatch.adapters_off import WithoutAdapters, make_reference
from flexpatch.models import tiny_model

LORA = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def trained(folder: Path, **arguments: Any) -> tuple[Any, list[float], Tensor]:
    """Train adapters for a few steps: the trainer, its losses and the adapters."""
    torch.manual_seed(0)
    settings = dict(num_train_epochs=1, gradient_accumulation_steps=2, optim="sgd")
    lora = LoraConfig(**LORA | arguments)
    given = dict(ref_model=None, peft_config=lora, optimizers=(None, None), token_budget=300)
    trainer = train(Packed, folder, settings=settings, **given)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_the_numbers_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, losses, adapters = trained(tmp_path)
    assert isinstance(trainer.ref_model, WithoutAdapters) and len(losses) > 2
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)

    # Its own way, by peft's context.
    monkeypatch.setattr("flexpatch.trl.make_reference", lambda trainer: None)
    stock, stock_losses, stock_adapters = trained(tmp_path)
    assert stock.ref_model is None
    assert losses == stock_losses and torch.equal(adapters, stock_adapters)

    # A reference that leaves the adapters on.
    monkeypatch.setattr("flexpatch.trl.make_reference", make_reference)
    monkeypatch.setattr(adapters_off.WithoutAdapters, "__call__", lambda self, **kwargs: self.trainer.model(**kwargs))
    assert trained(tmp_path)[1] != losses


def test_adapters_come_back_after_an_error(tmp_path: Path) -> None:
    trainer, *_ = trained(tmp_path)
    with pytest.raises(ValueError, match="input_ids"):
        trainer.ref_model()
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(layer.disable_adapters for layer in layers)
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


def test_adapters_that_the_user_switched_off_stay_off(tmp_path: Path) -> None:
    trainer, *_ = trained(tmp_path)
    trainer.model.base_model.disable_adapter_layers()
    trainer.ref_model(input_ids=torch.tensor([[5, 6, 7]]))
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert all(layer.disable_adapters for layer in layers)


class Trainer:
    """A trainer as far as the choice of its reference needs one."""

    def __init__(self, model: nn.Module, precompute: bool = False) -> None:
        self.model, self.ref_model = model, None
        self.args = type("Arguments", (), dict(precompute_ref_log_probs=precompute))
        self.accelerator = type("Accelerator", (), dict(unwrap_model=lambda self, model: model))()


def test_whose_reference_is_trl_s_matter() -> None:
    def lora() -> Any:
        return get_peft_model(flexpatch.apply(tiny_model("llama")), LoraConfig(**LORA))

    named = lora()
    named.add_adapter("ref", LoraConfig(**LORA))
    prompts = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    for trainer in (Trainer(named), Trainer(prompts), Trainer(tiny_model("llama")), Trainer(lora(), precompute=True)):
        make_reference(trainer)
        assert trainer.ref_model is None
    trainer = Trainer(lora())
    make_reference(trainer)
    assert isinstance(trainer.ref_model, WithoutAdapters)
    del trainer.ref_model  # a trainer of reward models
    make_reference(trainer)
    assert not hasattr(trainer, "ref_model")
