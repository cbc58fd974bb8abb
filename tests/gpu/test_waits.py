"""Packed trainers wait for the GPU only when TRL does: nothing of flexpatch, and no look at the loss, waits."""

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.trl_runs import Packed, train
from transformers import TrainerCallback
from trl.trainer import dpo_trainer

import flexpatch
from flexpatch import run_ahead
from flexpatch.models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


class Watch(TrainerCallback):
    """Counts who waits in the steps from ``first`` on: the innermost frame that is not of torch."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.waits: Counter[str] = Counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def note(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            frame = next(f for f in reversed(frames) if not f.filename.endswith("/warnings.py"))
            self.waits[f"{Path(frame.filename).name}:{frame.name}:{frame.lineno} {frame.line}"] += 1


def waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    watch = Watch(first=3)
    model = flexpatch.apply(tiny_model("llama", dtype=torch.bfloat16).cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", watch.note)
        train(
            Packed, folder, model, callbacks=[watch], peft_config=peft.LoraConfig(target_modules="all-linear"),
            ref_model=None, optimizers=(None, None), token_budget=300,
            settings=dict(
                gradient_checkpointing=True, use_cpu=False, bf16=True, optim="adamw_torch_fused", logging_steps=1000,
            ),
        )  # fmt: skip
    for name, count in watch.waits.most_common():
        print(count, name)
    return watch.waits


def test_nobody_but_trl_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits(tmp_path, monkeypatch)
    trl = Path(dpo_trainer.__file__).name
    assert any(name.startswith(trl) for name in found), "control: TRL takes its metrics"
    assert not [name for name in found if name.startswith("trainer.py:_run_epoch")], found
    # A look at the loss right after TRL's: the GPU has nothing left to do.
    ours = {path.name for path in Path(flexpatch.__file__).parent.glob("*.py")}
    assert {name.split(":")[1] for name in found if name.split(":")[0] in ours} <= {"look_at"}, found


def test_a_trainer_that_waits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without host copies a fold waits for its ids, and without the look at the loss the loop waits for it."""
    monkeypatch.setattr(run_ahead, "remember", lambda *args: None)
    monkeypatch.setattr(run_ahead.RunsAhead, "look_at", lambda *args: None)
    found = waits(tmp_path, monkeypatch)
    assert any(name.startswith("host_copies.py:to_host") for name in found), found
    assert any(name.startswith("trainer.py:_run_epoch") for name in found), found
