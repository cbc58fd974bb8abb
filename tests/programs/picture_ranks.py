"""Training on images under an engine, on as many ranks as a launcher starts; rank 0 saves losses and trained weights.

Run by test_engines.py, in tests/programs:

    accelerate launch --config_file FILE cpu_ranks.py picture_ranks.py DTYPE MODELS FOLDER CASE ...
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from helpers.flex import let_flex_train_on_cpu
from helpers.processors_offline import make_model, make_processor, picture
from helpers.trl_images import all_equal, float64_training, turn
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from transformers import AutoModelForImageTextToText, set_seed
from trl import DPOConfig, DPOTrainer

import flexpatch
from flexpatch import Collator
from flexpatch.checkpointing import GATHERS, Recomputation
from flexpatch.trl import PackedDPOTrainer
from programs.engine_ranks import RANK, RANKS, Weights, _memory, new_accelerator, train_on_rows, whole

PAIRS, STEPS, BUDGET = 16, 2, 220
LAST = RANK == RANKS - 1
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
# The layers that FSDP2 shards, where accelerate looks for others too that the model does not have.
LAYERS = {
    "llava": "LlamaDecoderLayer,CLIPEncoderLayer",
    "gemma3": "Gemma3DecoderLayer,SiglipEncoderLayer",
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        kind: Type of the model.
        trainer: ``"stock"``: DPOTrainer, half of the pairs a step; ``"epochs"``: all of them; ``"packed"``:
            PackedDPOTrainer, all of them in several bins; ``"loop"``: accelerate's plain loop, half of them a step.
        patched: Whether ``flexpatch.apply`` was called.
        lora: Adapters are trained, of text and tower.
        frozen: The tower is not trained.
        alone: Batches of the first rank alone have images.
        given: Why batches of the last rank run as they are given: ``"gains"``: folding would gain little;
            ``"obstacle"``: they cannot be folded, which is found out before anything else.
        equal: The last rank takes images as equal: the control.
        options: Of ``flexpatch.apply``.
        settings: Of the trainer.
    """

    kind: str = "qwen2_5_vl"
    trainer: str = "stock"
    patched: bool = True
    lora: bool = False
    frozen: bool = False
    alone: bool = False
    given: str = ""
    equal: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def stock(self) -> "Case":
        """The same training of the unpatched model."""
        trainer = "epochs" if self.trainer == "packed" else self.trainer
        return replace(self, trainer=trainer, patched=False, given="", equal=False, options={}, settings={})


def cases_of(kind: str, **changes: Case) -> dict[str, Case]:
    return {f"{kind}, {name.replace('_', ' ')}": replace(case, kind=kind) for name, case in changes.items()}


CHECKPOINTS = dict(gradient_checkpointing=True)
# DDP's search for unused parameters and reentrant checkpointing do not go together, in stock training either.
REENTRANT = CHECKPOINTS | dict(gradient_checkpointing_kwargs=dict(use_reentrant=True), ddp_find_unused_parameters=False)
COMMON = dict(one_line=Case(), own_rows=Case(trainer="loop"), taken_as_equal=Case(equal=True))
CASES = {
    **cases_of(
        "qwen2_5_vl",
        **COMMON,
        lora=Case(lora=True),
        frozen_tower=Case(frozen=True),
        packed=Case(trainer="packed", lora=True),
        as_given_on_a_rank=Case(given="gains"),
        refused_on_a_rank=Case(given="obstacle"),
        recompute_layers=Case(options=dict(recompute_layers=1), settings=CHECKPOINTS),
        recompute_layers_auto=Case(options=dict(recompute_layers="auto"), settings=REENTRANT),
        compile=Case(options=dict(backend="flex", compile=True)),
        images_on_a_rank=Case(alone=True),
    ),
    **cases_of("gemma3", **COMMON, compile=Case(options=dict(backend="flex", compile=True))),
    **cases_of("llava", **COMMON),
}


def stock_name(name: str) -> str:
    """The name of the unpatched training that a case is compared with."""
    twin = CASES[name].stock()
    return "stock, " + next(other for other, case in CASES.items() if case.stock() == twin)


def rows(alone: bool) -> list[dict[str, Any]]:
    """Pairs with one image or two. Each has an image in common with other pairs of its batch, which are four."""
    found = []
    for n in range(PAIRS):
        shown = [picture(n // 4 % 2 + 2 * (n % 2))] + [picture(5, 24, 16)] * (n % 3 == 0)
        prompt, wanted, other = (
            ("user", n, 6 + n % 4),
            ("assistant", n + 10, 5 + 3 * (n % 5)),
            (n + 20, 12 - 2 * (n % 4)),
        )
        texts = dict(prompt=turn(*prompt), chosen=turn(*wanted), rejected=turn("assistant", *other))
        found.append(texts | dict(images=[] if alone and n // 4 % 2 else shown))
    return found


def save_models(folder: Path, dtype: torch.dtype, kinds: Sequence[str]) -> None:
    for kind in kinds:
        make_model(kind, dtype).save_pretrained(folder / kind)


def load(case: Case, folder: Path, dtype: torch.dtype, trained: bool = True) -> nn.Module:
    """After the trainer's arguments: an engine may shard weights while they are read."""
    model = AutoModelForImageTextToText.from_pretrained(folder / case.kind, dtype=dtype)
    if case.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name)
    if case.patched:
        flexpatch.apply(model, **case.options if trained else {})
    return model


def train(case: Case, folder: Path, dtype: torch.dtype) -> tuple[list[float], Weights, Weights]:
    """The losses of all steps, and the weights before and after, whole. Under ZeRO-3 on the first rank alone."""
    set_seed(0)
    with changed(case), float64_training() if dtype == torch.float64 else nullcontext():
        return (with_loop if case.trainer == "loop" else with_trainer)(case, folder, dtype)


def with_trainer(case: Case, folder: Path, dtype: torch.dtype) -> tuple[list[float], Weights, Weights]:
    packed = case.trainer == "packed"
    epochs = packed or case.trainer == "epochs"  # an epoch is a step
    settings = dict(
        output_dir=str(folder / "out"), report_to="none", max_length=None, save_strategy="no", disable_tqdm=True,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16", gradient_checkpointing=False, logging_steps=1,
        lr_scheduler_type="constant", learning_rate=3e-3, adam_epsilon=1e-3, num_train_epochs=STEPS // (2 - epochs),
        per_device_train_batch_size=PAIRS // (2 - epochs) // RANKS, train_sampling_strategy="sequential",
        gradient_accumulation_steps=100 if packed else 1, dataloader_pin_memory=False,
    )  # fmt: skip
    args = DPOConfig(**settings | case.settings)
    policy = load(case, folder, dtype)
    trainer = (PackedDPOTrainer if packed else DPOTrainer)(
        policy,
        None if case.lora else load(case, folder, dtype, trained=False),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows(case.alone)),
        processing_class=make_processor(case.kind),
        peft_config=LORA if case.lora else None,
        **dict(token_budget=BUDGET) if packed else {},
    )
    before = whole(trainer.model.state_dict())
    trainer.train()
    assert trainer.state.global_step == STEPS, trainer.state.global_step
    assert trainer.accelerator.num_processes == RANKS, trainer.accelerator.num_processes
    if packed:
        assert len(trainer.bins) > 2 * RANKS, f"{len(trainer.bins)} bins a step would need no weights"
    if case.patched:
        check_savings(case, flexpatch.savings(policy))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, before, whole(trainer.accelerator.get_state_dict(trainer.model_wrapped))


def check_savings(case: Case, saved: Any) -> None:
    """Batches fold, and images run once, where they are to."""
    as_given = case.given != "" and LAST
    assert saved.batches > 0 and saved.folded == (0 if as_given else saved.batches), saved
    if not as_given and not (case.alone and LAST and RANKS > 1):
        assert 0 < saved.images_run <= saved.images / 2, saved


def with_loop(case: Case, folder: Path, dtype: torch.dtype) -> tuple[list[float], Weights, Weights]:
    """A plain loop."""
    # LLaVA reads the last but one layer of its tower: the last gets no gradients.
    accelerator = new_accelerator(DistributedDataParallelKwargs(find_unused_parameters=True))
    model = load(case, folder, dtype).train()
    if case.lora:
        model = get_peft_model(model, LORA)
    collator = Collator(make_processor(case.kind))
    layouts = [collator.layout(row, n) for n, row in enumerate(rows(case.alone))]
    return train_on_rows(accelerator, model, layouts, STEPS, case.patched)


@contextmanager
def changed(case: Case) -> Iterator[None]:
    """Whatever is unlike on the last rank, and stand-ins for CUDA's memory and settings."""
    with ExitStack() as stack:
        if case.kind in LAYERS:
            stack.enter_context(mock.patch.dict(os.environ, FSDP_TRANSFORMER_CLS_TO_WRAP=LAYERS[case.kind]))
        if case.equal and LAST:
            stack.enter_context(mock.patch("flexpatch.media.identities", all_equal))
        if case.given and LAST:
            answer = dict(gains=False, obstacle="nothing in their way")[case.given]
            stack.enter_context(mock.patch(f"flexpatch.folding.{case.given}", lambda *_: answer))
            stack.enter_context(mock.patch("flexpatch.folding.warn_as_given"))
        if "recompute_layers" in case.options and not torch.cuda.is_available():
            memory = partial(_memory, 1e12 if LAST else 0)
            recompute = partial(Recomputation, memory=memory)
            stack.enter_context(mock.patch("flexpatch.forward.Recomputation", recompute))
        if "compile" in case.options and not torch.cuda.is_available():
            let_flex_train_on_cpu(stack.enter_context(pytest.MonkeyPatch.context()))
        yield


def main(dtype: torch.dtype, models: Path, folder: Path, names: list[str]) -> None:
    warnings.simplefilter("error", flexpatch.FlexpatchWarning)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        warnings.filterwarnings("ignore", GATHERS[:60], flexpatch.FlexpatchWarning)
    trainings = {stock_name(name): CASES[name].stock() for name in names} | {name: CASES[name] for name in names}
    for name, case in trainings.items():
        result = train(case, models, dtype)
        if RANK == 0:
            torch.save(result, folder / f"{name}.pt")
            print(f"{name}: trained", flush=True)
    if RANKS > 1:
        distributed.barrier()
        distributed.destroy_process_group()  # else NCCL warns of it


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
