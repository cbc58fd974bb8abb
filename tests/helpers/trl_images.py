"""TRL's trainers of datasets with an ``images`` column, stock and with one line, in float64.

Tiny random models of all classes, with transformers' own processors, a few steps of plain SGD.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import datasets
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from flexpatch.float64 import Float64
from helpers import trl_matrix
from helpers.processors_offline import make_model, make_processor, picture
from helpers.trl_matrix import Outcome, apart, turn

# Largest difference of a step's loss, and of a weight. A broken fold must be ``CONTROL`` bounds off.
BOUND = 1e-11
CONTROL = 1e8

Prepare = Callable[[PreTrainedModel], Any]
Row = dict[str, Any]


def prompt(number: int, length: int) -> Row:
    """A question about one or two images. Questions 0 and 2 have one image in common."""
    shown = [picture(number % 2, 24, 16)] if number % 3 else [picture(number % 2, 24, 16), picture(7, 40, 20)]
    return dict(prompt=turn("user", number, length), images=shown)


def pairs(count: int = 4) -> list[Row]:
    return [
        prompt(n, 10 + 13 * n)
        | dict(chosen=turn("assistant", n + 10, 20 + 5 * n), rejected=turn("assistant", n + 20, 38 - 4 * n))
        for n in range(count)
    ]


def prompts() -> list[Row]:
    return [prompt(n, 10 + 13 * n) for n in range(4)]


def singles() -> list[Row]:
    """Each prompt with an answer that is wanted and another."""
    return [
        prompt(n, 10 + 13 * n) | dict(completion=turn("assistant", n + 10 * k, 20 + 5 * n), label=bool(k % 2))
        for n in range(4)
        for k in (1, 2)
    ]


def distinct(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that almost any change of a completion changes."""
    return [float(sum(ids) % 7) for ids in completion_ids]


# Large steps amplify the rounding of states that branch; two classes scale their logits down.
RATES = dict(qwen3_5=0.005, qwen3_5_moe=0.005, aya_vision=0.5, cohere2_vision=0.5)
# What stock trainers raise: they cannot train these classes.
STOCK_RAISES = {
    ("DPO", "paligemma"): "`images` are expected as arguments to a `PaliGemmaProcessor`",
    ("KTO", "paligemma"): "`images` are expected as arguments to a `PaliGemmaProcessor`",
    ("GRPO", "paligemma"): "The requested array has an inhomogeneous shape",
    ("RLOO", "paligemma"): "The requested array has an inhomogeneous shape",
    ("GRPO", "mistral3"): "Unable to create tensor, you should probably activate .* padding",
    ("RLOO", "mistral3"): "Unable to create tensor, you should probably activate .* padding",
    ("GRPO", "kimi_k25"): "unexpected keyword argument 'crop_to_patches'",
    ("RLOO", "kimi_k25"): "unexpected keyword argument 'crop_to_patches'",
    ("GRPO", "llava_onevision"): "unexpected keyword argument 'batch_num_images'",
    ("RLOO", "llava_onevision"): "unexpected keyword argument 'batch_num_images'",
}


@dataclass(frozen=True)
class Case:
    """A trainer: its classes, its data, arguments, settings, and whether it takes a reference model."""

    trainer: type[Any]
    config: type[Any]
    data: Callable[[], list[Row]]
    given: tuple[Any, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    reference: bool = False


def case(
    trainer: type[Any], config: type[Any], data: Any, *given: Any, reference: bool = False, **settings: Any
) -> Case:
    return Case(trainer, config, data, given, tuple(settings.items()), reference)


GROUPS = dict(per_device_train_batch_size=8, num_generations=4, num_iterations=2, max_completion_length=5)
CASES = {
    "DPO": case(DPOTrainer, DPOConfig, pairs, reference=True, per_device_train_batch_size=2, max_length=None),
    "KTO": case(KTOTrainer, KTOConfig, singles, reference=True, per_device_train_batch_size=4, max_length=None),
    "GRPO": case(GRPOTrainer, GRPOConfig, prompts, distinct, **GROUPS),
    "RLOO": case(RLOOTrainer, RLOOConfig, prompts, distinct, beta=0.0, **GROUPS),
}


def single(kind: str) -> bool:
    """Whether a class folds prompts of one image alone: with more, tiles of an image depend on the others."""
    return kind == "llava_onevision"


def build(
    name: str,
    kind: str,
    prepare: Prepare = lambda model: model,
    *,
    one_size: bool = False,
    reference: bool = True,
    peft_config: Any = None,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Any:
    """Build a trainer on models that ``prepare`` was called with.

    ``one_size``: prompts are of one length, since GRPO takes the padding of some processors for text, and keep their
    first images alone. ``reference``: a model of its own, where the trainer takes one.
    """
    case = CASES[name]
    rows, processor = case.data(), make_processor(kind)  # skips a test that lacks a package for it
    if one_size or single(kind):
        rows = [row | dict(images=row["images"][:1]) for row in rows]
    if one_size:
        rows = [row | dict(prompt=turn("user", n, 10)) for n, row in enumerate(rows)]
    common: Row = dict(optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_steps=3, logging_steps=1)
    common |= dict(use_cpu=True, bf16=False, seed=0, gradient_checkpointing=False, max_grad_norm=0.0)
    common |= {} if kind not in RATES else dict(learning_rate=RATES[kind])
    common |= dict(output_dir="out", save_strategy="no", report_to="none", disable_tqdm=True)
    others = dict(ref_model=prepare(make_model(kind, dtype, 1))) if case.reference and reference else {}
    others |= {} if peft_config is None else dict(peft_config=copy.deepcopy(peft_config))
    return case.trainer(
        prepare(make_model(kind, dtype)),
        *case.given,
        args=case.config(**common | dict(case.settings) | settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        **others,
    )


def train(trainer: Any, applied: bool) -> Outcome:
    """Train, and count what was folded if the trainer's models are ``applied``. Float64 models do all in float64."""
    with float64_training():
        return trl_matrix.train(trainer, applied)


@contextmanager
def float64_training() -> Iterator[None]:
    """Compute all of float64 models in float64, of layers that are recomputed in backward too.

    Models must be built within, and checkpointing be switched on.
    """

    def wide(function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Float64():  # torch suspends modes within backward
                return function(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    with mock.patch("transformers.modeling_utils.checkpoint", wide), Float64():
        yield


def faults(stock: Outcome, ours: Outcome, bound: float = BOUND) -> list[str]:
    """What is wrong with a pair of runs."""
    losses, changed = apart(ours, stock)
    every = list(ours.savings.values())
    found = {
        "losses differ": not losses <= bound,
        "weights differ": not changed <= bound,
        "weights hardly move": float((stock.after - stock.before).abs().max()) < 1e-3,
        "a batch ran as it was given": not every or any(s.folded < s.batches or not s.batches for s in every),
        "images ran again and again": any(s.images_run > s.images / 2 or not s.images for s in every),
    }
    return [fault for fault, there in found.items() if there]


def all_equal(held: Any, units: Sequence[Any], prints: Any) -> list[int]:
    """Take images of one size as equal: others would not fit their placeholders."""
    first: dict[Any, int] = {}
    sizes = [tuple(stop - start for start, stop in unit.spans.values()) for unit in units]
    return [first.setdefault((unit.tokens, size), k) for k, (unit, size) in enumerate(zip(units, sizes, strict=True))]
