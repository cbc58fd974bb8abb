"""All TRL trainers that see several completions of a prompt, without and with ``flexpatch.apply(trainer)``.

Float32, tiny random models, dense and a mixture of experts with TRL's default router loss, a few steps of plain SGD.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

import flexpatch
from flexpatch.counts import Savings
from flexpatch.fold import Folded, fold_batch
from flexpatch.models import TINY, tiny_model
from flexpatch.trainers import models_of
from helpers.oracle import see_siblings
from helpers.tokenizers_offline import make_tokenizer

# Largest difference of a step's loss, and of a weight.
BOUND = 1e-5
# A broken fold must be at least this many bounds off, and training must move weights by that many.
CONTROL = 100

KINDS = {"Llama": "llama", "Qwen3-MoE": "qwen3_moe"}
# Hybrids learn more slowly, because large steps amplify the rounding of float32 in their states.
SLOWER = dict(learning_rate=0.03)
HYBRIDS = {"Qwen3.5": "qwen3_5_text", "Nemotron-H": "nemotron_h", "Jamba": "jamba", "DeepSeek V3.2": "deepseek_v32"}
TOKENIZER = make_tokenizer()

Build = Callable[..., Any]


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model that fits the tokenizer, loaded from a folder: trainers load references and tokenizers from there."""
    with mock.patch.dict(TINY, vocab_size=len(TOKENIZER)):
        model = tiny_model(model_type, dtype=torch.float32, seed=seed)
    folder = Path(f"{model_type}-{seed}").absolute()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32)


def content(count: int, length: int) -> str:
    return ("".join(chr(97 + (count * count + 3 * i) % 26) for i in range(40)) * 9)[:length]


def turn(role: str, count: int, length: int) -> list[dict[str, str]]:
    return [{"role": role, "content": content(count, length)}]


def pairs(count: int = 4) -> list[dict[str, Any]]:
    """Conversations with a long prompt, and answers of different lengths."""
    return [
        dict(
            prompt=turn("user", n, 90 + 13 * n),
            chosen=turn("assistant", n + 10, 20 + 5 * n),
            rejected=turn("assistant", n + 20, 38 - 4 * n),
        )
        for n in range(count)
    ]


def repeated(**columns: Any) -> list[dict[str, Any]]:
    """Two prompts, each four times: for trainers that generate one completion of a row."""
    return [dict(prompt=row["prompt"], **columns) for row in pairs(2) for _ in range(4)]


def prompts() -> list[dict[str, Any]]:
    return [dict(prompt=row["prompt"]) for row in pairs()]


def dialogues() -> list[dict[str, Any]]:
    return [{"messages": row["prompt"] + row[key]} for row in pairs(2) for key in ("chosen", "rejected")]


def arguments(config: type[Any], **settings: Any) -> Any:
    common = dict(optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_steps=3, logging_steps=1)
    common |= dict(per_device_train_batch_size=2, use_cpu=True, bf16=False, seed=0)
    common |= dict(output_dir="out", save_strategy="no", report_to="none", disable_tqdm=True)
    return config(**common | settings)


def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that almost any change of a completion changes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def parity_of_text(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(map(ord, str(text))) % 2) for text in completions]


def build(
    module: str,
    name: str,
    data: Callable[[], list[dict[str, Any]]],
    model_type: str,
    *,
    given: tuple[Any, ...] = (),
    named: dict[str, Any] | None = None,
    others: tuple[str, ...] = (),
    trainer: type[Any] | None = None,
    prepare: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
    **settings: Any,
) -> Any:
    """Build a trainer of TRL.

    ``given``, ``named``: more arguments. ``others``: names of more models, each of other weights. ``trainer``: a class
    in place of the trainer's own. ``prepare``: called with each model.
    """
    classes = import_module(module)
    return (trainer or getattr(classes, f"{name}Trainer"))(
        prepare(tiny(model_type)),
        *given,
        args=arguments(getattr(classes, f"{name}Config"), **settings),
        train_dataset=datasets.Dataset.from_list(data()),
        processing_class=TOKENIZER,
        **{other: prepare(tiny(model_type, seed=1)) for other in others} | (named or {}),
    )


def reward(model_type: str, **settings: Any) -> Any:
    config = tiny(model_type).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    nn.init.normal_(model.score.weight, std=0.15)
    with mock.patch(f"{__name__}.tiny", lambda *_: model):
        return build("trl", "Reward", pairs, model_type, **settings)


def preferences(module: str, name: str, model_type: str, **settings: Any) -> Any:
    return build(module, name, pairs, model_type, **settings)


def generating(module: str, name: str, model_type: str, **settings: Any) -> Any:
    return build(module, name, prompts, model_type, **dict(given=(parity,)) | settings)


# The loss of a group's first use is zero, whatever its gradient; hence a second.
grpo = partial(
    generating, "trl", "GRPO",
    per_device_train_batch_size=16, num_generations=8, num_iterations=2, max_completion_length=6,
)  # fmt: skip
LONG = dict(per_device_train_batch_size=8, max_completion_length=6)

CASES: dict[str, Build] = {
    "DPO": partial(preferences, "trl", "DPO", others=("ref_model",)),
    # Steps of 0.3 amplify the rounding of float32, stock and applied alike, until a token goes to another expert.
    "KTO": partial(
        build, "trl", "KTO", partial(pairs, 2),
        others=("ref_model",), per_device_train_batch_size=4, beta=0.5, learning_rate=0.1,
    ),
    "Reward": reward,
    "ORPO": partial(preferences, "trl.experimental.orpo", "ORPO"),
    "CPO": partial(preferences, "trl.experimental.cpo", "CPO"),
    "SimPO": partial(preferences, "trl.experimental.cpo", "CPO", loss_type="simpo", cpo_alpha=0.0),
    "TPO": partial(
        build, "trl.experimental.tpo", "TPO",
        lambda: [row | dict(reference=turn("assistant", n + 30, 30 + n)) for n, row in enumerate(pairs())],
    ),
    **{
        f"GRPO, {loss}": partial(grpo, loss_type=loss)
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    },
    "GRPO, a ratio for each sequence": partial(grpo, importance_sampling_level="sequence"),
    "GRPO, reference": partial(grpo, beta=0.1),
    "RLOO": partial(generating, "trl", "RLOO", **LONG | dict(num_generations=4, num_iterations=2)),
    "GMPO": partial(
        generating, "trl.experimental.gmpo", "GMPO", **LONG | dict(num_generations=4, num_iterations=2)
    ),
    "OnlineDPO": partial(
        build, "trl.experimental.online_dpo", "OnlineDPO", prompts,
        named=dict(reward_funcs=parity_of_text), others=("ref_model",), max_new_tokens=6,
    ),
    "A2PO": partial(
        build, "trl.experimental.a2po", "A2PO", repeated, given=(parity_of_text,), **LONG | dict(learning_rate=1.0)
    ),
    "SDPO": partial(generating, "trl.experimental.sdpo", "SDPO", **LONG | dict(num_generations=4)),
    "SDFT": partial(
        build, "trl.experimental.sdft", "SDFT",
        lambda: [dict(prompt=row["prompt"], privileged_context=row["chosen"][0]["content"]) for row in pairs()],
        **LONG | dict(num_generations=4),
    ),
    "GKD": partial(
        build, "trl.experimental.gkd", "GKD", dialogues,
        others=("teacher_model",), per_device_train_batch_size=4, max_new_tokens=6, lmbda=0.0,
    ),
    "GOLD": partial(
        build, "trl.experimental.gold", "GOLD", dialogues,
        others=("teacher_model",), per_device_train_batch_size=4, lmbda=0.0,
    ),
    "IW-OPD": partial(
        build, "trl.experimental.iw_opd", "IWOPD", dialogues, others=("teacher_model",), num_generations=4, **LONG
    ),
    "Distillation": partial(build, "trl", "Distillation", repeated, others=("teacher_model",), **LONG),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One training run: the losses of its steps, weights before and after, and all savings if it was applied."""

    losses: list[float]
    before: Tensor
    after: Tensor
    savings: dict[str, Savings]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters() if p.requires_grad])


def build_case(case: str, kind: str, **settings: Any) -> Any:
    """Build the trainer of one line of the table."""
    set_seed(0)
    slower = SLOWER if kind in HYBRIDS and case != "Reward" else {}
    return CASES[case](model_type=(KINDS | HYBRIDS)[kind], **slower | settings)


def train(trainer: Any, applied: bool) -> Outcome:
    """Train, and count what was folded if the trainer's models are ``applied``."""
    set_seed(0)  # again: others may have been built in between
    before = weights(trainer.model)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    models = models_of(trainer) if applied else {}
    savings = {name: flexpatch.savings(model) for name, model in models.items()}
    return Outcome(losses, before, weights(trainer.model), savings)


@dataclass(frozen=True)
class Row:
    """Stock against applied: one line of the table."""

    case: str
    kind: str
    folded: int
    batches: int
    factor: float
    loss: float
    weight: float
    moved: float

    def __str__(self) -> str:
        share = f"{self.folded} of {self.batches}"
        return f"| {self.case} | {self.kind} | {share} | {self.factor:.1f}× | {self.loss:.0e} | {self.weight:.0e} |"

    @classmethod
    def of(cls, case: str, kind: str, stock: Outcome, ours: Outcome) -> "Row":
        """Compare two runs."""
        every = list(ours.savings.values())
        computed, padded = (sum(getattr(s, name) for s in every) for name in ("computed", "padded"))
        return cls(
            case,
            kind,
            sum(s.folded for s in every),
            sum(s.batches for s in every),
            padded / max(computed, 1),
            *apart(ours, stock),
            float((stock.after - stock.before).abs().max()),
        )


HEAD = """| TRL's trainer | model | batches folded | fewer tokens | losses differ by | weights differ by |
|---|---|---|---|---|---|"""


def apart(ours: Outcome, stock: Outcome) -> tuple[float, float]:
    """Return the largest difference of a step's loss, and of a weight."""
    losses = max(abs(a - b) for a, b in zip(ours.losses, stock.losses, strict=True))
    return losses, float((ours.after - stock.after).abs().max())


def broken_fold(*batch: Any) -> Folded | None:
    """Fold so that completions see their siblings in the row."""
    folded = fold_batch(*batch)
    return folded and replace(folded, rows=see_siblings(folded.rows))


def compare(case: str, kind: str, broken: bool = False) -> Row:
    """Train twice; ``broken``: completions see their siblings in the folded row."""
    stock = train(build_case(case, kind), applied=False)
    with mock.patch("flexpatch.folding.fold_batch", broken_fold) if broken else nullcontext():
        ours = train(flexpatch.apply(build_case(case, kind)), applied=True)
    return Row.of(case, kind, stock, ours)


def faults(row: Row, bounds: tuple[float, float] = (BOUND, BOUND)) -> list[str]:
    """What is wrong with a line of the table. ``bounds``: of losses and weights."""
    found = {
        "the loss is not a number": not math.isfinite(row.loss),
        "losses differ": not row.loss <= bounds[0],
        "weights differ": not row.weight <= bounds[1],
        "weights hardly move": row.moved < CONTROL * BOUND,
        "a batch ran as it was given": row.folded < row.batches or not row.batches,
    }
    return [fault for fault, there in found.items() if there]
