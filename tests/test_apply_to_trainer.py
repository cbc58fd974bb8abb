"""One line for a trainer: all models that it holds are patched, and dropout is accepted or refused before it trains."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from parameterized import parameterized
from torch import nn
from transformers import ImageGPTConfig, ImageGPTModel, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

import flexpatch
from flexpatch import FlexpatchWarning, UnsupportedModelError
from flexpatch.callbacks import Flexpatch
from flexpatch.models import tiny_model
from flexpatch.patch import settings_of
from flexpatch.trainers import models_of


class Trainer:
    """Holds models as trainers do."""

    def __init__(self, model: nn.Module, **models: Any) -> None:
        self.model = self.model_wrapped = model
        vars(self).update(models)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 151, (1, 30), generator=generator).repeat(4, 1)
    ids[:, 24:] = torch.randint(3, 151, (4, 6), generator=generator)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def with_dropout(model: Any = None, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama") if model is None else model, config, **settings)


def test_all_models_are_found_once() -> None:
    policy, reference, teacher, rewards = (tiny_model("llama") for _ in range(4))
    trainer = Trainer(policy, ref_model=reference, teacher_model=teacher, reward_funcs=[rewards, len], same=policy)
    assert list(models_of(trainer)) == ["model", "ref_model", "teacher_model", "reward_funcs[0]"]
    assert flexpatch.apply(trainer, backend="dense") is trainer
    assert all(flexpatch.is_applied(model) for model in (policy, reference, teacher, rewards))
    assert flexpatch.remove(trainer) is trainer
    assert not any(flexpatch.is_applied(model) for model in (policy, reference, teacher, rewards))


def test_references_fold_though_a_cache_is_their_default() -> None:
    """Nobody reads it. A model that no trainer holds keeps its cache, and then nothing folds."""
    stock = tiny_model("llama").eval()
    alone, reference = flexpatch.apply(copy.deepcopy(stock)), copy.deepcopy(stock)
    flexpatch.apply(Trainer(tiny_model("llama"), ref_model=reference))
    with torch.no_grad():
        with pytest.warns(FlexpatchWarning, match="whose cache may be wanted"):
            assert alone(**batch()).past_key_values is not None
        output = reference(**batch())
        assert (output.logits - stock(**batch()).logits).abs().max() < 1e-6
        flexpatch.apply(reference)  # once more, by itself: the trainer still holds it
        reference(**batch())
    assert output.past_key_values is None
    assert (flexpatch.savings(alone).folded, flexpatch.savings(reference).folded) == (0, 2)


def test_generation_of_a_trainers_policy_is_untouched() -> None:
    stock = tiny_model("llama").eval()
    policy = flexpatch.apply(Trainer(copy.deepcopy(stock))).model
    given = dict(**batch(), max_new_tokens=4, do_sample=False)
    assert torch.equal(policy.generate(**given), stock.generate(**given))


def test_a_refused_policy_is_an_error_and_another_refused_model_a_warning() -> None:
    other = ImageGPTModel(ImageGPTConfig(n_layer=1, n_embd=16, n_head=2, vocab_size=151))
    policy = tiny_model("llama")
    with pytest.warns(FlexpatchWarning, match="the trainer's teacher_model runs as it is: no adapter for model type"):
        flexpatch.apply(Trainer(policy, teacher_model=other))
    assert flexpatch.is_applied(policy) and not flexpatch.is_applied(other)
    with pytest.raises(UnsupportedModelError, match="no adapter for model type 'imagegpt'"):
        flexpatch.apply(Trainer(other, ref_model=policy))


def test_dropout_of_the_policy_is_refused_before_it_trains() -> None:
    """In evaluation mode too, as models are until a trainer trains them; of all weights, or of adapters."""
    whole = tiny_model("llama").eval()
    whole.model.layers[0].dropout = nn.Dropout(0.1).eval()
    for policy in (whole, with_dropout().eval()):
        with pytest.raises(UnsupportedModelError, match=r"dropout 0.\d in .*shared_dropout=True"):
            flexpatch.apply(Trainer(policy))
        assert not flexpatch.is_applied(policy)
    flexpatch.apply(whole)  # nobody has said that it trains
    flexpatch.apply(Trainer(tiny_model("llama"), ref_model=with_dropout().eval().requires_grad_(False)))


def lone() -> dict[str, torch.Tensor]:
    """A batch whose rows have nothing in common."""
    return dict(input_ids=torch.arange(3, 123).view(4, 30), attention_mask=torch.ones(4, 30, dtype=torch.int64))


@parameterized.expand(["lora_dropout", "NEFTune"])
def test_what_comes_after_apply_is_refused_in_the_first_batch_of_a_training(what: str) -> None:
    """Though nothing folds yet: trainers add adapters and noise to a patched model, and their batches are shuffled."""
    model = flexpatch.apply(tiny_model("llama"))
    if what == "NEFTune":
        model.get_input_embeddings().neftune_noise_alpha = 5.0
    else:
        model = with_dropout(model=model)
    model.eval()(**lone(), use_cache=False)
    model.train()
    one = {name: tensor[:1] for name, tensor in lone().items()}
    model(**one, use_cache=False)  # batches of one row have nothing to share, ever
    with torch.no_grad():
        model(**lone(), use_cache=False)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=what):
            model(**lone(), use_cache=False)
    assert flexpatch.savings(model).batches == 3


def test_a_training_without_anything_to_refuse_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look takes time, and batches that run as they are given need it no more."""
    looks: list[None] = []
    monkeypatch.setattr("flexpatch.folding.check_mode", lambda *_, **__: looks.append(None))
    model = flexpatch.apply(tiny_model("llama")).train()
    for _ in range(3):
        model(**lone(), use_cache=False)
    assert len(looks) == 1 and flexpatch.savings(model).folded == 0
    model(**batch(), use_cache=False)
    assert len(looks) == 2 and flexpatch.savings(model).folded == 1


def test_dropout_by_consent() -> None:
    """Equal tokens have equal draws; without dropout all is exact as ever."""
    model = flexpatch.apply(with_dropout(), backend="dense", shared_dropout=True).train()
    settings = settings_of(model)
    assert settings is not None and settings["shared_dropout"]
    logits = model(**batch(), use_cache=False).logits
    assert flexpatch.savings(model).folded == 1
    assert all(torch.equal(logits[0, :24], row[:24]) for row in logits[1:]), "one draw for shared tokens"
    unpatched = with_dropout().train()
    apart = unpatched(**batch(), use_cache=False).logits
    assert (apart[0, :24] - apart[1, :24]).abs().max() > 1e-3, "the unpatched model draws for each row"
    ours, stock = (m.eval()(**batch(), use_cache=False).logits for m in (model, unpatched))
    assert (ours - stock).abs().max() < 1e-6
    rows = flexpatch.build_rows([[flexpatch.Tree.of([3, 4, 5], [6], [7])]])
    assert flexpatch.answer_logprobs(model.train(), rows).answers.isfinite().all()


def test_attention_dropout_needs_more_than_consent() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    flexpatch.apply(model, shared_dropout=True).train()
    with pytest.raises(UnsupportedModelError, match=r"attention_dropout 0.1 in .* is active"):
        model(**batch(), use_cache=False)


def test_a_model_that_is_made_for_each_training(tmp_path: Path) -> None:
    """A trainer with ``model_init`` trains another model than it holds before."""

    def trained(make: Any, apply: bool = False, **given: Any) -> Any:
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        ids, mask = batch().values()
        data = [dict(input_ids=i, attention_mask=m, labels=i) for i, m in zip(ids, mask, strict=True)]
        trainer = HuggingFaceTrainer(None, args, train_dataset=data, model_init=make, **given)
        if apply:
            flexpatch.apply(trainer)
        trainer.train()
        return trainer.model

    with pytest.warns(FlexpatchWarning, match=r"makes another model by model_init.*return flexpatch.apply\(model\)"):
        assert not flexpatch.is_applied(trained(lambda: tiny_model("llama"), apply=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*model_init", FlexpatchWarning)
        for apply in (True, False):
            assert flexpatch.savings(trained(lambda: flexpatch.apply(tiny_model("llama")), apply)).folded == 1
        assert flexpatch.savings(trained(lambda: tiny_model("llama"), callbacks=[Flexpatch()])).folded == 1
