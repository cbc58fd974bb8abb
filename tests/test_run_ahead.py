"""Packed trainers whose host runs ahead of the GPU: the numbers of trainers that wait. Who waits: tests/gpu."""

import math
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers.needs import needs
from helpers.trl_runs import Packed, rows, train
from parameterized import parameterized
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

import flexpatch
from flexpatch import run_ahead
from flexpatch.host_copies import recall, remember, to_host
from flexpatch.models import tiny_model
from flexpatch.run_ahead import move

needs_method = needs("trl", "1.9", "the method for the reference's log-probs takes no model before")
BATCH = torch.tensor([[3, 4, 5, 6, 7, 0], [3, 4, 5, 6, 8, 9], [3, 4, 5, 6, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def trained(
    folder: Path, kind: type = Packed, adapters: bool = True, callbacks: Any = None, **settings: Any
) -> tuple[list[float], Tensor]:
    """Train for a few steps: the losses that are logged, and the weights that were trained."""
    torch.manual_seed(0)
    given: dict[str, Any] = dict(optimizers=(None, None), token_budget=300, callbacks=callbacks)
    if adapters:
        given |= dict(ref_model=None, peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    settings = dict(num_train_epochs=2, gradient_accumulation_steps=2, optim="sgd") | settings
    trainer = train(kind, folder, settings=settings, **given)
    assert trainer.args.logging_nan_inf_filter == settings.get("logging_nan_inf_filter", True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@parameterized.expand([("adapters", True, False), ("checkpointing", True, True), ("second model", False, True)])
@needs_method
def test_the_reference_first(_: str, adapters: bool, checkpoints: bool) -> None:
    """As TRL computes it, behind the policy. A reference of other numbers shows in the loss."""
    given: dict[str, Any] = dict(adapters=adapters, gradient_checkpointing=checkpoints, loss_type=["sigmoid", "ipo"])
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        losses, weights = trained(Path(folder), **given)
        patch.setattr(run_ahead.ReferenceFirst, "_precedes", lambda self: False)
        theirs, their_weights = trained(Path(folder), **given)
        assert losses == theirs and torch.equal(weights, their_weights) and len(losses) > 3
        patch.undo()
        compute = Packed.compute_ref_log_probs
        halved = wraps(compute)(lambda *given: [0.5 * x for x in compute(*given)])
        patch.setattr(Packed, "compute_ref_log_probs", halved)
        assert trained(Path(folder), **given)[0] != losses


@parameterized.expand([("is_fsdp_enabled",), ("is_deepspeed_enabled",)])
@needs_method
def test_engines_that_shard_keep_trl_s_order(engine: str) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        compute, build, calls = Packed.compute_ref_log_probs, DPOTrainer.create_optimizer, []

        def counted(*given: Any) -> Any:
            calls.append(None)
            return compute(*given)

        def under_the_engine(self: Any) -> Any:
            setattr(self, engine, True)
            return build(self)

        patch.setattr(Packed, "compute_ref_log_probs", wraps(compute)(counted))
        trained(Path(folder), max_steps=1)
        assert calls
        calls.clear()
        patch.setattr(Packed, "create_optimizer", under_the_engine)
        trained(Path(folder), max_steps=1)
        assert not calls


def test_evaluation_computes_the_reference_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train(Packed, tmp_path, pairs=6, token_budget=300, settings=dict(max_steps=1))
    monkeypatch.setattr(Packed, "compute_ref_log_probs", None)
    assert trainer.evaluate(rows(4))["eval_loss"] > 0


def test_a_loss_that_is_no_number_is_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is that of a trainer whose loop looks at each loss. Gradients have no part in it."""
    stock, calls = DPOTrainer.compute_loss, []

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return stock(self, *args, **kwargs) + (math.nan if len(calls) % 5 == 3 else 0.0)

    monkeypatch.setattr(DPOTrainer, "compute_loss", broken)
    losses, weights = trained(tmp_path)
    assert len(calls) > 5 and all(map(math.isfinite, losses))
    calls.clear()
    unfiltered, _ = trained(tmp_path, logging_nan_inf_filter=False)
    assert not all(map(math.isfinite, unfiltered))
    calls.clear()
    monkeypatch.setattr(run_ahead.RunsAhead, "look_at", lambda *args: None)
    looked, their_weights = trained(tmp_path)
    assert losses == looked and torch.equal(weights, their_weights)


def test_callbacks_see_the_filter_as_it_was_given(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
            seen.append(args.logging_nan_inf_filter)

        on_pre_optimizer_step = on_substep_end = on_step_end

    trained(tmp_path, callbacks=[Look()])
    assert len(seen) > 5 and all(seen)


def test_a_derived_class_with_another_loss_is_looked_at(tmp_path: Path) -> None:
    class Derived(Packed):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().compute_loss(*args, **kwargs) + (math.nan if self.calls == 3 else 0.0)

    losses, _ = trained(tmp_path, Derived)
    assert len(losses) > 3 and all(map(math.isfinite, losses))


def test_batches_that_the_first_rank_hands_out(tmp_path: Path) -> None:
    assert trained(tmp_path, accelerator_config=dict(dispatch_batches=True))[0] == trained(tmp_path)[0]


def test_host_copies() -> None:
    ids, mask = BATCH.clone(), MASK.clone()
    expected = to_host([ids, mask, None])[0]
    assert np.array_equal(expected, np.stack([BATCH, MASK]))
    remember(ids, BATCH + 1)  # another number, by which a copy is told from the tensor
    assert np.array_equal(to_host([ids, mask])[0], expected), "the mask has no copy"
    remember(mask, 7 * (1 - MASK))
    assert np.array_equal(to_host([ids, mask])[0], np.stack([BATCH + 1, 1 - MASK]))
    arrays, others = to_host([ids, mask], [torch.tensor([5, 6])])
    assert np.array_equal(arrays, expected) and [x.tolist() for x in others] == [[5, 6]]
    mask[0, 0] = 0  # by somebody's hook
    assert recall(ids) is not None and recall(mask) is None
    assert np.array_equal(to_host([ids, mask])[0], np.stack([BATCH, mask]))


def test_a_batch_that_moves_leaves_its_ids_with_the_host() -> None:
    batch = dict(input_ids=BATCH, attention_mask=MASK, scores=torch.ones(3), names=["a", "b", "c"])
    assert move(batch, torch.device("cpu")) is batch
    moved = move(batch, torch.device("meta"))
    assert moved["input_ids"].device.type == "meta" and moved["names"] == ["a", "b", "c"]
    assert np.array_equal(to_host([moved["input_ids"], moved["attention_mask"]])[0], np.stack([BATCH, MASK]))
    assert recall(moved["scores"]) is None
    with torch.inference_mode():
        assert recall(move(batch, torch.device("meta"))["input_ids"]) is None


def test_a_batch_that_is_saved_loads(tmp_path: Path) -> None:
    ids = BATCH.clone()
    remember(ids, BATCH)
    torch.save(ids, tmp_path / "ids.pt")
    assert torch.equal(torch.load(tmp_path / "ids.pt"), BATCH)


def test_a_fold_reads_the_host_copies() -> None:
    """Those of a wrong batch fold that one: a model that shares a row computes what the host says."""
    model = flexpatch.apply(tiny_model("llama", dtype=torch.float64))
    other = BATCH.roll(1, 0)
    mask = MASK.roll(1, 0)
    expected, others = (
        model(input_ids=x, attention_mask=m, use_cache=False).logits for x, m in ((BATCH, MASK), (other, mask))
    )
    ids, given = BATCH.clone(), MASK.clone()
    remember(ids, BATCH)
    remember(given, MASK)
    assert torch.equal(model(input_ids=ids, attention_mask=given, use_cache=False).logits, expected)
    remember(ids, other)
    remember(given, mask)
    assert torch.equal(model(input_ids=ids, attention_mask=given, use_cache=False).logits, others)
