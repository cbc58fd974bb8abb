"""Packed batches under TRL's DPOTrainer, and savings among a trainer's metrics."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.needs import needs
from helpers.processes import PROGRAMS, start_python, torchrun
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_runs import PAIRS, Packed, Stock, rows, train, unweighted, weights
from parameterized import parameterized
from programs import packed_ranks
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig
from trl.trainer import dpo_trainer

import flexpatch
from flexpatch import FlexpatchError
from flexpatch.callbacks import SavingsCallback
from flexpatch.models import tiny_model
from flexpatch.trl import PackedDPOTrainer, PackedRewardTrainer, pair_lengths

ROOT = Path(__file__).resolve().parent.parent


def test_a_step_of_packed_batches_is_a_step_of_all_pairs(tmp_path: Path) -> None:
    """One optimizer step over unequal bins against one batch of the same pairs, in float64."""
    before = weights(tiny_model("llama"))
    one = train(Stock, tmp_path, tiny_model("llama"), dict(per_device_train_batch_size=PAIRS, num_train_epochs=1))
    settings = dict(gradient_accumulation_steps=100, num_train_epochs=1)
    packed = train(Packed, tmp_path, settings=settings, token_budget=200)
    assert one.state.global_step == packed.state.global_step == 1
    sizes = [len(items) for items in packed.bins]
    assert len(sizes) > 3 and len(set(sizes)) > 1, "equal bins would need no weights"
    change = weights(one.model) - before
    assert change.norm() > 1e-3 * before.norm()
    assert (weights(packed.model) - weights(one.model)).norm() < 1e-6 * change.norm()
    assert packed.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], abs=1e-4)

    # Without the weights the same comparison fails.
    alike = train(unweighted(Packed, DPOTrainer), tmp_path, settings=settings, token_budget=200)
    assert (weights(alike.model) - weights(one.model)).norm() > 1e-2 * change.norm()


@pytest.mark.slow
def test_ranks_share_a_step(tmp_path: Path) -> None:
    """Two processes, with as many bins each as one process has in half: the same step.

    Fast tests have this under FSDP2 (test_engines.py), with other bins on each rank.
    """
    one, world, _ = packed_ranks.step(tmp_path)
    file = tmp_path / "2.pt"
    start_python([*torchrun(), str(PROGRAMS / "packed_ranks.py"), str(file)], tmp_path)
    two, worlds, bins = torch.load(file)
    assert (world, worlds) == (1, 2) and bins > 2
    before = weights(tiny_model("llama"))
    assert (one - two).norm() < 1e-6 * (one - before).norm()


@pytest.mark.usefixtures("flex_on_cpu")
def test_compiled_layers_and_less_recomputation(tmp_path: Path) -> None:
    """The same training, whatever is compiled or recomputed."""
    settings = dict(gradient_accumulation_steps=2, num_train_epochs=1, gradient_checkpointing=True)
    plain = train(Packed, tmp_path, settings=settings, token_budget=300)
    fast = flexpatch.apply(tiny_model("llama"), backend="flex", compile=True, recompute_layers=1)
    faster = train(Packed, tmp_path, fast, settings, token_budget=300)
    assert faster.state.global_step == plain.state.global_step > 1
    change = weights(plain.model) - weights(tiny_model("llama"))
    assert 0 < (weights(faster.model) - weights(plain.model)).norm() < 1e-6 * change.norm()


def test_activation_offloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks take each tensor that backward needs away and give it back once. TRL's own need a GPU (test_options.py)."""
    held: dict[int, torch.Tensor] = {}
    keys = itertools.count()

    def take(tensor: torch.Tensor) -> int:
        held[key := next(keys)] = tensor.clone()
        return key

    monkeypatch.setattr(
        dpo_trainer, "get_act_offloading_ctx_manager", lambda model: saved_tensors_hooks(take, held.pop)
    )
    settings = dict(gradient_accumulation_steps=2, num_train_epochs=1, gradient_checkpointing=True)
    plain = train(Packed, tmp_path, settings=settings, token_budget=300)
    moved = train(Packed, tmp_path, settings=settings | dict(activation_offloading=True), token_budget=300)
    assert next(keys) > 100
    assert torch.equal(weights(moved.model), weights(plain.model))


def test_several_steps_of_several_bins(tmp_path: Path) -> None:
    """Every pair once an epoch, in bins that change; each step's gradient is the mean over its own pairs."""
    seen: list[list[int]] = []

    class Recorded(Packed):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["attention_mask"].sum(1).tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = train(
        Recorded, tmp_path, settings=dict(num_train_epochs=2, gradient_accumulation_steps=2), token_budget=300
    )
    micro_batches = len(trainer.bins)
    assert len(seen) == 2 * micro_batches
    assert trainer.state.global_step == 2 * -(-micro_batches // 2)
    lengths = sorted(len(r["prompt_ids"]) + len(r[k]) for r in rows() for k in ("chosen_ids", "rejected_ids"))
    for epoch in (seen[:micro_batches], seen[micro_batches:]):
        assert sorted(length for batch in epoch for length in batch) == lengths
    assert seen[:micro_batches] != seen[micro_batches:]
    assert flexpatch.savings(trainer.model).folded == flexpatch.savings(trainer.ref_model).folded == len(seen)


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    settings = dict(num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    whole = train(Packed, tmp_path / "a", settings=settings, token_budget=300)

    class Resumed(Packed):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))

    resumed = train(Resumed, tmp_path / "b", settings=settings, token_budget=300)
    assert resumed.state.global_step == whole.state.global_step > 3
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_lengths() -> None:
    dataset = rows()
    lengths = pair_lengths(dataset, None)
    assert lengths == [len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in dataset]
    expected = []
    for row in dataset:
        p = min(len(row["prompt_ids"]), 40)
        answers = (min(len(row["prompt_ids"]) + len(row[k]), 40) - p for k in ("chosen_ids", "rejected_ids"))
        expected.append(p + sum(answers))
    assert pair_lengths(dataset, 40) == expected != lengths
    cut = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) > 40 for r in dataset]
    ends = pair_lengths(dataset, 40, "keep_end")
    assert any(cut) and all(e == t for e, t, c in zip(ends, lengths, cut, strict=True) if not c)
    assert all(end > start for end, start, c in zip(ends, expected, cut, strict=True) if c)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FlexpatchError, match="does not fold batches"):
        train(Packed, tmp_path, tiny_model("llama"), token_budget=300)
    with pytest.raises(FlexpatchError, match=r"sample \d+ has \d+ tokens, outside 1 to 50 \(the budget"):
        train(Packed, tmp_path, token_budget=50)


@parameterized.expand([("300",), (None,), (0,), (300.5,)])
def test_a_budget_is_a_number_of_tokens(budget: Any) -> None:
    """Wrong ones are told before a model is looked at."""
    with pytest.raises(FlexpatchError, match=f"token_budget={budget!r}; expected a number of tokens"):
        PackedDPOTrainer(None, token_budget=budget)


def test_smaller_batches_are_no_way_out_of_memory(tmp_path: Path) -> None:
    """Each retry would train on the same bins, until the trainer has no smaller number of pairs left to try."""
    with pytest.raises(FlexpatchError, match=r"auto_find_batch_size=True .*lower token_budget"):
        train(Packed, tmp_path, settings=dict(auto_find_batch_size=True), token_budget=300)


def test_a_streamed_dataset(tmp_path: Path) -> None:
    with pytest.raises(FlexpatchError, match="this one is streamed: load it without streaming=True"):
        train(
            Packed, tmp_path, settings=dict(max_steps=1), token_budget=300, train_dataset=rows().to_iterable_dataset()
        )


@needs("trl", "1.16", "older ones keep such rows")
@pytest.mark.parametrize("kind", [PackedDPOTrainer, PackedRewardTrainer])
def test_a_dataset_of_which_nothing_is_left(tmp_path: Path, kind: Any) -> None:
    """TRL drops rows whose prompts fill the longest sequence."""
    words = [dict(prompt="a b c d " * 9, chosen="e", rejected="f")]
    given: dict[str, Any] = dict(train_dataset=Dataset.from_list(words), processing_class=make_tokenizer())
    config: Any = DPOConfig
    if kind is PackedRewardTrainer:
        sizes = tiny_model("llama").config
        sizes.num_labels = 1
        model, config = AutoModelForSequenceClassification.from_config(sizes), RewardConfig
    else:
        model, given["ref_model"] = tiny_model("llama"), flexpatch.apply(tiny_model("llama"))
    args = config(str(tmp_path), max_length=4, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(FlexpatchError, match="no rows to pack: perhaps max_length=4 leaves nothing"):
        kind(flexpatch.apply(model), args=args, token_budget=300, **given)


@needs("transformers", "5.17", "older ones have fewer settings of data loaders")
def test_settings_of_the_data_loader(tmp_path: Path) -> None:
    """Those of the trainer's arguments. Workers that are spawned need what can be pickled."""
    workers = dict(num_workers=1, prefetch_factor=5, multiprocessing_context="spawn", in_order=False)
    settings = {f"dataloader_{name}": value for name, value in workers.items()}
    kind = type("Untrained", (Packed,), dict(train=lambda self: None))
    loader = train(kind, tmp_path, settings=settings, token_budget=300).get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.in_order) == (1, 5, False)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch = collate([dataset[dataset.bins.bins[0]]])
    assert len(batch["input_ids"]) == 2 * len(dataset.bins.bins[0])


@pytest.mark.parametrize("loss", [["sft"], ["sigmoid", "aot"]])
def test_losses_that_are_no_means_over_pairs_are_refused(tmp_path: Path, loss: list[str]) -> None:
    with pytest.raises(FlexpatchError, match=f"loss_type {loss[-1]} is not a mean over pairs"):
        train(Packed, tmp_path, settings=dict(loss_type=loss), token_budget=300)


def test_savings_of_a_model_that_does_not_fold(tmp_path: Path) -> None:
    with pytest.raises(FlexpatchError, match="does not fold batches"):
        train(Stock, tmp_path, tiny_model("llama"), settings=dict(max_steps=1), callbacks=[SavingsCallback()])


@pytest.mark.parametrize("first", [True, False])
def test_savings_are_logged(tmp_path: Path, first: bool) -> None:
    reported: list[dict[str, float]] = []

    class Reporter(SavingsCallback):
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    callbacks = [SavingsCallback(), Reporter()] if first else [SavingsCallback()]
    trainer = train(Stock, tmp_path, settings=dict(max_steps=2, per_device_train_batch_size=4), callbacks=callbacks)
    saved = flexpatch.savings(trainer.model)
    entry = trainer.state.log_history[-1]
    assert entry["flexpatch/token_factor"] == pytest.approx(saved.factor) and saved.factor > 1.2
    assert entry["flexpatch/padding"] > 0 and entry["flexpatch/shared"] > 0
    assert all("flexpatch/shared" in logs for logs in reported)
    assert len(reported) == 3 * first
