"""Training that is killed, in a step and while it saves, and resumed; and the same never killed. Saves the weights.

Run by test_resuming.py: python tests/programs/killed_runs.py FOLDER RANKS ENGINE KIND ...
"""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from helpers.processes import ROOT
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_runs import Packed, Stock, rows
from torch import Tensor, distributed
from transformers import set_seed
from trl import DPOConfig

import flexpatch
from flexpatch.models import tiny_model
from programs.cpu_ranks import pretend

STEPS, SAVE_STEPS = 12, 5
SETTINGS = ROOT / "examples" / "accelerate"


class Killed(Exception):
    """A run ended by SIGKILL."""


def kill(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def mortal(kind: Any, at: int | None, saving: int | None) -> Any:
    """A trainer that dies in step ``at``, between micro-batches if it has several; or while it saves that checkpoint,
    which then has weights, but no state of the optimizer or the trainer."""

    class Mortal(kind):
        in_step = False

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == at:
                if self.in_step or self.accelerator.sync_gradients:
                    kill()
                self.in_step = True
            return super().training_step(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, *args: Any) -> None:
            if self.state.global_step == saving:
                if not self.is_fsdp_enabled:
                    kill()
                transformers.trainer.save_fsdp_optimizer = kill  # FSDP2's weights are written here too, before
            super()._save_optimizer_and_scheduler(*args)

    return Mortal


def train(
    kind: str,
    engine: str,
    folder: Path,
    resume: bool | str = False,
    at: int | None = None,
    saving: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Weights, and what was logged. Steps accumulate three micro-batches, epochs end with fewer; ``kind``: ``"stock"``,
    ``"one line"``, ``"packed"``; ``engine``: ``"ddp"``, ``"fsdp2"``, ``"zero3"``."""
    if engine == "ddp":
        settings["use_cpu"] = True
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        pretend()
        settings |= json.loads((SETTINGS / f"torchrun_{engine}.json").read_text())
    set_seed(0)
    args = DPOConfig(**dict(
        output_dir=str(folder), report_to="none", max_length=None, logging_steps=1, save_strategy="steps",
        save_steps=SAVE_STEPS, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=3,
        learning_rate=1e-2, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
    ) | settings | dict(bf16=False))  # fmt: skip
    model, reference = (tiny_model("llama", dtype=torch.float32) for _ in range(2))
    if kind != "stock":
        flexpatch.apply(model)
        flexpatch.apply(reference)
    trainer_class, budget = (Packed, dict(token_budget=130)) if kind == "packed" else (Stock, {})
    trainer = mortal(trainer_class, at, saving)(
        model, reference, args=args, train_dataset=rows(16), processing_class=make_tokenizer(), **budget
    )
    trainer.train(resume_from_checkpoint=resume)
    # ZeRO-3 gives none but to the first rank.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    weights = torch.cat([torch.zeros(0), *(value.detach().flatten() for value in state.values())])
    logs = [(log["epoch"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    return dict(weights=weights, logs=logs)


def run(ranks: int, file: Path | None, *args: Any, **kwargs: Any) -> None:
    """:func:`train` in processes of its own.

    Raises:
        Killed: If they were.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or child(rank, ranks, port, file, args, kwargs) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if codes == [-signal.SIGKILL] * ranks:
        raise Killed
    assert codes == [0] * ranks, codes


def child(rank: int, ranks: int, port: int, file: Path | None, args: Any, kwargs: Any) -> NoReturn:
    status = 1
    try:
        if ranks > 1:
            os.environ |= dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        result = train(*args, **kwargs)
        if rank == 0 and file is not None:
            torch.save(result, file)
        if ranks > 1:
            distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def must_die(*args: Any, **kwargs: Any) -> None:
    try:
        run(*args, **kwargs)
    except Killed:
        return
    raise AssertionError(f"this run was to be killed: {args} {kwargs}")


def main(folder: Path, ranks: int, engine: str, kinds: list[str]) -> None:
    for kind in kinds:
        run(ranks, folder / f"{kind}, whole.pt", kind, engine, folder / f"{kind}, whole")
        out, copy = folder / kind, folder / f"{kind}, copy"
        must_die(ranks, None, kind, engine, out, at=7)
        must_die(ranks, None, kind, engine, out, resume=True, saving=10)
        try:
            run(ranks, None, kind, engine, out, resume=True)
        except AssertionError:
            print(f"{kind}: half a checkpoint was noticed", flush=True)
        must_die(ranks, None, kind, engine, out, resume=str(out / "checkpoint-5"), at=11)
        shutil.copytree(out, copy)
        run(ranks, folder / f"{kind}, resumed.pt", kind, engine, out, resume=True)
        # The control: a run that begins the interrupted epoch anew.
        begin = str(copy / "checkpoint-5")
        run(ranks, folder / f"{kind}, other pairs.pt", kind, engine, copy, resume=begin, ignore_data_skip=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
