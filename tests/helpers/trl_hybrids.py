"""TRL's trainers on tiny hybrids: one line and packed batches against stock, and what float32 costs stock itself."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import datasets
from transformers import PreTrainedModel

import flexpatch
from flexpatch.float64 import Float64
from flexpatch.internals import eager_experts
from flexpatch.trl import PackedDPOTrainer, PackedGRPOTrainer, PackedKTOTrainer, PackedRewardTrainer
from flexpatch.verification import WORST_FACTOR
from helpers.trl_matrix import BOUND, HYBRIDS, Row, apart, broken_fold, build_case, compare, faults, train

# Stock's own error comes near 1e-5 on these: their bound is a multiple of it.
ROUNDED = ("Qwen3.5",)
NO_CLASSIFIER = ("Nemotron-H", "DeepSeek V3.2")
ONE_LINE = ("DPO", "KTO", "Reward", "GRPO, dapo")


@dataclass(frozen=True)
class Packing:
    """A packed trainer, and the case whose stock trainer it is compared with.

    Settings of both; those of stock, for which all samples are one batch; those of the packed one.
    """

    case: str
    trainer: type[Any]
    both: dict[str, Any]
    stock: dict[str, Any]
    packed: dict[str, Any]


# More micro-batches than any epoch has: each epoch is a step.
EPOCH = dict(gradient_accumulation_steps=100)
PACKED = {
    "PackedDPO": Packing(
        "DPO", PackedDPOTrainer, {}, dict(per_device_train_batch_size=4), EPOCH | dict(named=dict(token_budget=600))
    ),
    # One step: bins of later epochs rotate completions in other orders.
    "PackedKTO": Packing(
        "KTO", PackedKTOTrainer, dict(max_steps=1, learning_rate=0.1), {}, EPOCH | dict(named=dict(token_budget=4000))
    ),
    "PackedReward": Packing(
        "Reward", PackedRewardTrainer, {}, dict(per_device_train_batch_size=4),
        EPOCH | dict(named=dict(token_budget=600)),
    ),
    "PackedGRPO": Packing(
        "GRPO, dapo", PackedGRPOTrainer, dict(per_device_train_batch_size=8, gradient_accumulation_steps=2), {}, {}
    ),
}  # fmt: skip
# A router's loss compares all tokens of a micro-batch, so two of them are not one: these have a single one.
ROUTED = ("Jamba",)


def cases(*names: str) -> list[tuple[str, str]]:
    """Cases with the hybrids that have them."""
    return [(case, kind) for case in names for kind in HYBRIDS if "Reward" not in case or kind not in NO_CLASSIFIER]


HEAD = """| TRL's trainer | model | batches folded | fewer tokens | losses differ by | weights differ by |\
 stock's own losses | stock's own weights |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Line:
    """A row of the table, and stock's own errors of losses and weights, if they were measured."""

    row: Row
    own: tuple[float, float] | None

    def __str__(self) -> str:
        own = ("–", "–") if self.own is None else tuple(f"{error:.0e}" for error in self.own)
        return f"{self.row} {own[0]} | {own[1]} |"

    def bounds(self) -> tuple[float, float]:
        """Of losses and weights: 1e-5, or a multiple of stock's own errors where these come near it."""
        own = self.own if self.own is not None and self.row.kind in ROUNDED else (0.0, 0.0)
        losses, weights = (max(BOUND, WORST_FACTOR * error) for error in own)
        return losses, weights

    def faults(self) -> list[str]:
        """What is wrong with it."""
        return faults(self.row, self.bounds())


def wide(model: PreTrainedModel) -> PreTrainedModel:
    return eager_experts(model.double())


def own_errors(case: str, kind: str) -> tuple[float, float]:
    """How far losses and weights of an unpatched run in float32 are from one in float64, or from one in longer batches
    if that is further.

    Checkpointing is off in float64: torch would recompute in float32 what transformers' models convert to it.
    """
    stock = train(build_case(case, kind), applied=False)
    trainer = build_case(case, kind, prepare=wide, gradient_checkpointing=False)
    with Float64():
        true = train(trainer, applied=False)
    longer = train(build_case(case, kind, pad_to_multiple_of=256), applied=False)
    losses, weights = zip(apart(stock, true), apart(stock, longer), strict=True)
    return max(losses), max(weights)


def one_line(case: str, kind: str) -> Line:
    """Stock against ``flexpatch.apply(trainer)``. Other precisions would generate other completions."""
    own = None if case.startswith("GRPO") else own_errors(case, kind)
    return Line(compare(case, kind), own)


def rotate_alike(stock: Any, packed: Any) -> None:
    """Give a stock KTO trainer the rows of a packed one's only bin, whose completions are rotated as there."""
    (items,) = packed.bins
    rows = packed.get_train_dataloader().dataset[items]
    others = rows[-1:] + rows[:-1]
    rows = [row | {"KL_completion_ids": other["completion_ids"]} for row, other in zip(rows, others, strict=True)]
    stock.train_dataset = datasets.Dataset.from_list(rows)


def packed(name: str, kind: str, broken: bool = False) -> Line:
    """Stock, unpatched, against a packed trainer; ``broken``: completions see their siblings in the folded row."""
    packing = PACKED[name]
    ours = packing.both | packing.packed
    if kind in ROUTED:
        ours |= dict(named=dict(token_budget=4000)) if "named" in ours else dict(per_device_train_batch_size=16)
    theirs = packing.both | packing.stock
    if kind in ROUTED and "named" not in ours:
        theirs |= dict(per_device_train_batch_size=16)
    stock = build_case(packing.case, kind, **theirs)
    folding = build_case(packing.case, kind, trainer=packing.trainer, prepare=flexpatch.apply, **ours)
    if name == "PackedKTO":
        rotate_alike(stock, folding)
    # Dense masks of a few long rows cost more than they save, which a GPU's blocks do not.
    with (
        mock.patch("flexpatch.folding.gains", lambda *_: True),
        mock.patch("flexpatch.folding.fold_batch", broken_fold) if broken else nullcontext(),
    ):
        after = train(folding, applied=True)
    before = train(stock, applied=False)
    return Line(Row.of(name, kind, before, after), None)


def line(case: str, kind: str) -> Line:
    """A line of the table."""
    return packed(case, kind) if case in PACKED else one_line(case, kind)
