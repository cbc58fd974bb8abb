"""Options of trainers: a packed trainer against TRL's on the unpatched model, which is given the same bins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.needs import needs
from helpers.oracle import float64_norm, float64_rope
from helpers.trl_matrix import broken_fold
from helpers.trl_runs import Packed, Unprepared, rows, train, weights
from parameterized import parameterized
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from trl import DPOTrainer

from flexpatch.bins import BinDataset, BinSampler, pair_lengths
from flexpatch.models import tiny_model

pytestmark = [
    pytest.mark.usefixtures("nothing_cached", "all_in_float64"),
    needs("trl", "1.16", "older ones have other options"),
]

BUDGET = 200
# Differences of logged numbers, relative where they exceed one (losses are added up in float32), and of weights,
# relative to what training changed.
EQUAL, BROKEN = (1e-6, 1e-10), 1e-3
CLOCKS = ("runtime", "per_second", "preparation_time")


@pytest.fixture
def all_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", float64_rope)
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


class SameBins(Unprepared, DPOTrainer):
    """TRL's trainer, whose batches are the bins of the packed one: a step of one bin needs no weights."""

    def get_train_dataloader(self) -> Any:
        bins = BinSampler(pair_lengths(self.train_dataset, None), BUDGET, 1, self.args.seed)
        loader = DataLoader(
            BinDataset(self.train_dataset, bins),
            sampler=bins,
            collate_fn=lambda some: self.data_collator(some[0]),  # type: ignore[arg-type]
        )
        return self.accelerator.prepare(loader)


class Stop(TrainerCallback):
    """Ends the first epoch after a step, and the training in the next one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = True
        control.should_training_stop = state.global_step == 2
        control.should_evaluate = control.should_log = True


def once(stock: Callable[..., Any], trainer: Any) -> None:
    stock(trainer)


def twice(stock: Callable[..., Any], trainer: Any) -> None:
    """Train, and once more; between them evaluate and predict."""
    stock(trainer)
    found = [trainer.evaluate(), trainer.predict(trainer.eval_dataset).metrics]
    stock(trainer)
    trainer.state.log_history += found


def resumed(stock: Callable[..., Any], trainer: Any) -> None:
    stock(trainer)
    stock(trainer, resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))


EVALUATED = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3)
BEST = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="some_loss")
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
REENTRANT = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True))

CASES: dict[str, dict[str, Any]] = {
    "evaluated": EVALUATED | dict(eval_on_start=True, eval_accumulation_steps=1, logging_steps=3, lora=True),
    "best": EVALUATED | BEST | dict(callbacks=lambda: [EarlyStoppingCallback(1)], lora=True),
    "twice": dict(action=twice, include_num_input_tokens_seen="non_padding"),
    "resumed": dict(action=resumed, save_strategy="steps", save_steps=2, ignore_data_skip=True, lora=True),
    "synchronised_and_stopped": dict(sync_ref_model=True, ref_model_sync_steps=1, callbacks=lambda: [Stop()]),
    "several_losses": dict(
        loss_type=["sigmoid", "ipo"], loss_weights=[0.7, 0.3], f_divergence_type="js_divergence", ld_alpha=0.5,
        use_weighting=True,
    ),
    "reentrant": REENTRANT | dict(lora=True),
    "precomputed": EVALUATED | dict(precompute_ref_log_probs=True, lora=True),
}  # fmt: skip


def run(
    kind: type, folder: Path, action: Any = once, callbacks: Any = None, lora: bool = False, **settings: Any
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Train on a few bins an epoch: all that was logged but clocks, and what training changed."""
    torch.manual_seed(0)
    given: dict[str, Any] = dict(eval_dataset=dict(some=rows(3), others=rows(2)), optimizers=(None, None))
    given["callbacks"] = callbacks and callbacks()
    if action is twice:
        given["eval_dataset"] = rows(3)
    if lora:
        given |= dict(ref_model=None, peft_config=LORA)
    if kind is SameBins:
        given = dict(model=tiny_model("llama"), ref_model=tiny_model("llama", 1)) | given
    else:
        given["token_budget"] = BUDGET
    before: list[torch.Tensor] = []

    def act(trainer: Any) -> None:
        before.append(weights(trainer.model))
        action(kind.train, trainer)

    settings = dict(num_train_epochs=2, learning_rate=0.03, optim="sgd") | settings
    trainer = train(type(kind.__name__, (kind,), dict(train=act)), folder, settings=settings, pairs=8, **given)
    logs = [{name: x for name, x in log.items() if not name.endswith(CLOCKS)} for log in trainer.state.log_history]
    return logs, weights(trainer.model) - before[0]


def off(ours: tuple[Any, torch.Tensor], true: tuple[Any, torch.Tensor]) -> tuple[float, float]:
    """How far logged numbers and trained weights are off."""
    assert [log.keys() for log in ours[0]] == [log.keys() for log in true[0]] and len(true[0]) > 2
    pairs = [(a[name], b[name]) for a, b in zip(ours[0], true[0], strict=True) for name in b]
    return max(abs(a - b) / max(1, abs(b)) for a, b in pairs), float((ours[1] - true[1]).norm() / true[1].norm())


@parameterized.expand(CASES)
def test_packed_is_stock_on_the_same_bins(case: str) -> None:
    true = run(SameBins, Path("stock"), **CASES[case])
    ours = run(Packed, Path("packed"), **CASES[case])
    logged, trained = off(ours, true)
    assert logged < EQUAL[0] and trained < EQUAL[1]


def test_a_broken_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = run(SameBins, Path("stock"), **EVALUATED)
    monkeypatch.setattr("flexpatch.folding.fold_batch", broken_fold)
    assert min(off(run(Packed, Path("packed"), **EVALUATED), true)) > BROKEN
