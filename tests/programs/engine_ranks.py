"""Training under an engine, on as many ranks as a launcher starts; rank 0 saves the trained weights of each case.

Run by test_engines.py, in tests/programs:

    accelerate launch --config_file FILE cpu_ranks.py engine_ranks.py DTYPE MODEL FOLDER CASE ...

and by gpu/test_two_gpus.py without cpu_ranks.py.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.flex import let_flex_train_on_cpu
from helpers.oracle import float64_norm, float64_rope, see_siblings
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_runs import Packed, Stock, rows
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from trl import DPOConfig

import flexpatch
from flexpatch import Tree
from flexpatch.checkpointing import GATHERS, Recomputation
from flexpatch.float64 import Float64
from flexpatch.fold import Folded, fold_batch
from flexpatch.meters import Memory
from flexpatch.models import tiny_model

# Of the launcher; without one this process is alone.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PAIRS = 16
STEPS = 4
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        kind: ``"stock"``: TRL's DPOTrainer, half of the pairs a step; ``"epochs"``: all of them; ``"packed"``:
            PackedDPOTrainer, all of them in several bins; ``"loop"``: accelerate's plain loop over rows of our own, a
            quarter of the pairs a step.
        lora: Instead of all weights.
        patched: Whether ``flexpatch.apply`` was called.
        options: Of ``flexpatch.apply``.
        settings: Of the trainer.
        twice: Whether another training follows in the same process.
        model_type: Of the model that is trained.
        broken: What is wrong on the last rank: ``"siblings"``: answers see each other; ``"pairs"``: one pair stands for
            all of its own.
    """

    kind: str = "stock"
    lora: bool = False
    patched: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    twice: bool = False
    model_type: str = "llama"
    broken: str | None = None

    def truth_name(self) -> str:
        """The same training of the unpatched model by stock code, to be run on one rank."""
        return TRUTHS[self.kind] + self.suffix()

    def yardstick(self) -> str:
        """The unpatched case whose batches are split among ranks and micro-batches in the same way, or as often."""
        return YARDSTICKS["accumulation" if self.settings == ACCUMULATION else self.kind] + self.suffix()

    def model_in(self, folder: Path) -> Path:
        """Where the model is that is trained."""
        return folder if self.model_type == "llama" else folder / self.model_type

    def suffix(self) -> str:
        """What tells this training's truth from others of its kind."""
        return f", {self.model_type}" * (self.model_type != "llama") + ", lora" * self.lora + ", twice" * self.twice


def hybrid_cases(kind: str) -> dict[str, Case]:
    """The cases of a type whose mixers no mask can cut."""
    ways = {way: Case(options=dict(mixers=way), model_type=kind) for way in ("unshared", "branched")}
    stock = Case(patched=False, model_type=kind)
    return {f"stock, {kind}": stock} | {f"{kind}, {way}": case for way, case in ways.items()}


PARTLY = dict(options=dict(recompute_layers="partly"), settings=dict(gradient_checkpointing=True))
AUTO = dict(options=dict(recompute_layers="auto"), settings=dict(gradient_checkpointing=True))
# DDP's search for unused parameters and LoRA do not go together with it, in stock training either.
REENTRANT = dict(
    gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True),
    ddp_find_unused_parameters=False,
)  # fmt: skip
# Convolutions, state spaces, delta rules. Ranks' rows have unlike numbers of sequences, and mixers so unlike numbers of
# batches.
HYBRIDS = ("lfm2", "bamba", "qwen3_5_text")
# The layers that FSDP2 shards, by model type, where accelerate looks for others too that the model does not have.
LAYERS = {"qwen3_5_text": "Qwen3_5DecoderLayer"}
COMPILE = dict(backend="flex", compile=True)
ACCUMULATION = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
CASES = {
    "stock": Case(patched=False),
    "stock, lora": Case(lora=True, patched=False),
    "stock, lora, twice": Case(lora=True, patched=False, twice=True),
    "stock, accumulation": Case(patched=False, settings=ACCUMULATION),
    "stock, accumulation, lora": Case(lora=True, patched=False, settings=ACCUMULATION),
    "stock, accumulation, lora, twice": Case(lora=True, patched=False, settings=ACCUMULATION, twice=True),
    "stock, epochs": Case("epochs", patched=False),
    "stock, epochs, lora": Case("epochs", lora=True, patched=False),
    "stock, epochs, lora, twice": Case("epochs", lora=True, patched=False, twice=True),
    "padded loop": Case("loop", patched=False),
    "padded loop, lora": Case("loop", lora=True, patched=False),
    "one line": Case(),
    "one line, lora": Case(lora=True),
    "packed": Case("packed"),
    "packed, lora": Case("packed", lora=True),
    "packed, lora, twice": Case("packed", lora=True, twice=True),
    "own rows": Case("loop"),
    "own rows, lora": Case("loop", lora=True),
    "recompute_layers=auto": Case(**AUTO),
    "recompute_layers=auto, lora": Case(lora=True, **AUTO),
    "packed, recompute_layers=auto": Case("packed", **AUTO),
    "recompute_layers=partly": Case(**PARTLY),
    "recompute_layers=partly, lora": Case(lora=True, **PARTLY),
    "recompute_layers=2": Case(options=dict(recompute_layers=2), settings=dict(gradient_checkpointing=True)),
    "compile": Case(options=COMPILE),
    "compile, lora": Case(lora=True, options=COMPILE),
    "packed, compile, recompute_layers=auto": Case(
        "packed", options=COMPILE | AUTO["options"], settings=AUTO["settings"]
    ),
    "reentrant": Case(settings=REENTRANT),
    "reentrant, lora": Case(lora=True, settings=REENTRANT),
    "accumulation": Case(settings=ACCUMULATION),
    "accumulation, lora": Case(lora=True, settings=ACCUMULATION),
    **{name: case for kind in HYBRIDS for name, case in hybrid_cases(kind).items()},
    "answers see each other": Case(broken="siblings"),
    "a rank's pairs are lost": Case(broken="pairs"),
}
TRUTHS = dict(stock="stock", epochs="stock, epochs", packed="stock, epochs", loop="padded loop")
YARDSTICKS = dict(stock="stock", accumulation="stock, accumulation", packed="stock, accumulation", loop="padded loop")


def vector(weights: Weights, names: list[str]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in names])


def save_model(folder: Path, dtype: torch.dtype) -> None:
    for case in {case.model_type: case for case in CASES.values()}.values():
        tiny_model(case.model_type, dtype=dtype).save_pretrained(case.model_in(folder))


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """As users do, after the trainer's arguments: an engine may shard weights while they are read."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def train(case: Case, folder: Path, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """The weights before and after, whole. Under ZeRO-3 on the first rank alone, and those before in shards."""
    set_seed(0)
    with broken(case):
        return (with_loop if case.kind == "loop" else with_trainer)(case, folder, dtype)


def with_trainer(case: Case, folder: Path, dtype: torch.dtype) -> tuple[Weights, Weights]:
    epochs = case.kind in ("packed", "epochs")  # an epoch is a step
    settings = dict(
        output_dir=str(folder / "out"), report_to="none", max_length=None, save_strategy="no", disable_tqdm=True,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16", gradient_checkpointing=False,
        lr_scheduler_type="constant", learning_rate=3e-3, adam_epsilon=1e-3,
        num_train_epochs=STEPS if epochs else STEPS // 2, per_device_train_batch_size=PAIRS // (2 - epochs) // RANKS,
        gradient_accumulation_steps=100 if case.kind == "packed" else 1, dataloader_pin_memory=False,
    )  # fmt: skip
    args = DPOConfig(**settings | case.settings)
    policy, reference = (load(case.model_in(folder), dtype) for _ in range(2))
    if case.patched:
        flexpatch.apply(policy, **case.options)
        flexpatch.apply(reference)
    kind, budget = (Packed, dict(token_budget=200)) if case.kind == "packed" else (Stock, {})
    lost = case.broken == "pairs" and RANK == RANKS - 1
    data = rows(PAIRS).select([0] * PAIRS) if lost else rows(PAIRS)
    trainer = kind(
        policy, None if case.lora else reference, args=args, train_dataset=data, processing_class=make_tokenizer(),
        peft_config=LORA if case.lora else None, **budget,
    )  # fmt: skip
    before = whole(trainer.model.state_dict())
    for _ in range(1 + case.twice):
        trainer.train()
    assert trainer.state.global_step == STEPS, trainer.state.global_step
    assert trainer.accelerator.num_processes == RANKS, trainer.accelerator.num_processes
    if case.kind == "packed" and case.lora and trainer.is_fsdp_enabled:  # the reference came first, where it may
        assert trainer._may_precede is trainer.accelerator.state.fsdp_plugin.reshard_after_forward
    if case.kind == "packed":
        assert len(trainer.bins) > 2 * RANKS, "a bin a step would need no weights"
    if case.patched:
        saved = flexpatch.savings(policy)
        assert saved.folded == saved.batches > 0, saved
    return before, whole(trainer.accelerator.get_state_dict(trainer.model_wrapped))


def with_loop(case: Case, folder: Path, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """A plain loop."""
    accelerator = new_accelerator()
    model = load(case.model_in(folder), dtype).train()
    if case.lora:
        model = get_peft_model(model, LORA)
    if case.patched:
        flexpatch.apply(model)
    trees = [Tree.of(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows(PAIRS)]
    return train_on_rows(accelerator, model, trees, STEPS, case.patched)[1:]


def new_accelerator(*handlers: Any) -> Accelerator:
    """An accelerator without a trainer or a data loader."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a trainer's arguments do
    accelerator = Accelerator(kwargs_handlers=list(handlers))
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # accelerate reads it from a data loader otherwise
        plugin.deepspeed_config |= dict(train_micro_batch_size_per_gpu=1, zero_allow_untested_optimizer=True)
    return accelerator


def train_on_rows(
    accelerator: Accelerator, model: nn.Module, pairs: Sequence[Any], steps: int, patched: bool
) -> tuple[list[float], Weights, Weights]:
    """Train in explicit rows where patched, else on padded sequences. Losses, and weights before and after."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-3)
    before = whole(model.state_dict())
    model, optimizer = accelerator.prepare(model, optimizer)
    size, losses = len(pairs) // steps // RANKS, []
    for step in range(steps):
        at = (step * RANKS + accelerator.process_index) * size
        some = pairs[at : at + size]
        if patched:
            packed = flexpatch.build_rows([some]).to(accelerator.device)
            logps = flexpatch.answer_logprobs(model, packed).answers
        else:
            logps = flexpatch.separate_logprobs(model, some).answers
        loss = flexpatch.dpo_loss(logps, torch.zeros_like(logps), beta=0.01).loss
        accelerator.backward(loss)
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)  # ZeRO-3 does so by itself
        optimizer.step()
        optimizer.zero_grad()
    return losses, before, whole(accelerator.get_state_dict(model))


def whole(state: Weights | None) -> Weights:
    """A copy of the trained weights on the CPU. ZeRO-3 gives none but to the first rank."""
    lora = any("lora_" in name for name in state or {})
    return {name: value.detach().cpu().clone() for name, value in (state or {}).items() if "lora_" in name or not lora}


@contextmanager
def broken(case: Case) -> Iterator[None]:
    """The negative controls, float64 in all of a hybrid model, and stand-ins for CUDA's memory and settings."""
    last = RANK == RANKS - 1
    functions: dict[str, Any] = {}
    if case.broken == "siblings" and last:
        functions["folding.fold_batch"] = _see_siblings
    if "recompute_layers" in case.options and not torch.cuda.is_available():
        functions["forward.Recomputation"] = partial(Recomputation, memory=partial(_memory, 1e12 if last else 0))
    if case.options.get("recompute_layers") in ("auto", "partly"):
        functions["selective.INNER"] = 8  # terms of a tiny model's products
    with ExitStack() as stack:
        if case.model_type in LAYERS:
            stack.enter_context(mock.patch.dict(os.environ, FSDP_TRANSFORMER_CLS_TO_WRAP=LAYERS[case.model_type]))
        if case.model_type in HYBRIDS:  # float32 states round off as much as 1e-2 of what training changes
            stack.enter_context(Float64())
        for name, function in functions.items():
            stack.enter_context(mock.patch(f"flexpatch.{name}", function))
        if "compile" in case.options and not torch.cuda.is_available():
            monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
            let_flex_train_on_cpu(monkeypatch)
        yield


def _see_siblings(*batch: Any) -> Folded | None:
    folded = fold_batch(*batch)
    return folded and replace(folded, rows=see_siblings(folded.rows))


def _memory(limit: float, device: torch.device) -> Memory:
    """Of a device on which nothing costs memory; ranks may have unequal room."""
    return Memory(100, 100, int(limit))


def main(dtype: torch.dtype, model: Path, folder: Path, names: list[str]) -> None:
    warnings.simplefilter("error", flexpatch.FlexpatchWarning)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        warnings.filterwarnings("ignore", GATHERS[:60], flexpatch.FlexpatchWarning)
    if dtype == torch.float64:
        LlamaRotaryEmbedding.forward, LlamaRMSNorm.forward = float64_rope, float64_norm
    for name in names:
        before, after = train(CASES[name], model, dtype)
        if RANK == 0:
            torch.save((before, after), folder / f"{name}.pt")
            print(f"{name}: trained", flush=True)
    if RANKS > 1:
        distributed.barrier()
        distributed.destroy_process_group()  # else NCCL warns of it


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
