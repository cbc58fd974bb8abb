"""Relatives of PackedDPOTrainer: packed batches for RewardTrainer and KTOTrainer, whole groups for GRPO and RLOO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from helpers.needs import needs
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_runs import Packed, Unprepared, rows, train, unweighted, weights
from parameterized import parameterized
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import SGD
from transformers import AutoModelForSequenceClassification, set_seed
from trl import (
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

import flexpatch
from flexpatch import FlexpatchError, UnsupportedModelError
from flexpatch.bins import prompt_groups, sequence_lengths
from flexpatch.groups import gather_groups
from flexpatch.models import TINY, tiny_model
from flexpatch.trl import PackedGRPOTrainer, PackedKTOTrainer, PackedRewardTrainer, PackedRLOOTrainer

pytestmark = pytest.mark.usefixtures("nothing_cached")

# A packed step differs from one batch by the rounding of float64 alone, relative to what it changed.
EQUAL, BROKEN = 1e-6, 1e-2
needs_precomputed = needs("trl", "1.16", "precomputed references of older ones fail with datasets 5, unpatched")


def plain(config: type[Any], **settings: Any) -> Any:
    common = dict(output_dir="out", report_to="none", logging_steps=1, lr_scheduler_type="constant", save_strategy="no")
    common |= dict(use_cpu=True, disable_tqdm=True, bf16=False, max_grad_norm=0.0, gradient_checkpointing=False)
    return config(**common | dict(learning_rate=0.1, num_train_epochs=1) | settings)


def run(trainer: Any) -> tuple[Any, Tensor]:
    """Train; also returns the weights' change."""
    before = weights(trainer.model)
    trainer.train()
    return trainer, weights(trainer.model) - before


def off(ours: Tensor, true: Tensor) -> float:
    return float((ours - true).norm() / true.norm())


# Rewards


def reward(kind: type[RewardTrainer], settings: dict[str, Any], **arguments: Any) -> tuple[Any, Tensor]:
    data = [
        {key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")} | {"margin": 0.1 * n}
        for n, row in enumerate(rows())
    ]
    config = tiny_model("llama").config
    config.num_labels = 1
    set_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    nn.init.normal_(model.score.weight)
    trainer = kind(
        flexpatch.apply(model),
        args=plain(RewardConfig, max_length=None, center_rewards_coefficient=0.1, **settings),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=make_tokenizer(),
        optimizers=(SGD(model.parameters(), lr=0.1), None),
        **arguments,
    )
    return run(trainer)


def test_a_step_of_packed_rewards_is_a_step_of_all_pairs() -> None:
    one, true = reward(RewardTrainer, dict(per_device_train_batch_size=64))
    packed, change = reward(PackedRewardTrainer, dict(gradient_accumulation_steps=100), token_budget=200)
    assert one.state.global_step == packed.state.global_step == 1
    assert len(set(map(len, packed.bins))) > 1, "equal bins would need no weights"
    assert off(change, true) < EQUAL
    assert packed.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], abs=1e-4)
    savings = flexpatch.savings(packed.model)
    assert savings.folded == len(packed.bins) and savings.computed <= 200 * len(packed.bins)

    _, alike = reward(
        unweighted(PackedRewardTrainer, RewardTrainer), dict(gradient_accumulation_steps=100), token_budget=200
    )
    assert off(alike, true) > BROKEN


def test_lengths_of_whole_sequences() -> None:
    pairs = [([1, 2, 3, 4], [1, 2, 9]), ([5], [6, 7]), ([8, 8], [8, 8, 8]), ([4, 4], [4, 4])]
    dataset = datasets.Dataset.from_list([dict(chosen_ids=a, rejected_ids=b) for a, b in pairs])
    assert sequence_lengths(dataset) == [5, 3, 3, 2]


# KTO


class StockKTO(Unprepared, KTOTrainer):
    pass


class PackedKTO(Unprepared, PackedKTOTrainer):
    pass


def completions(equal: bool = False) -> list[dict[str, Any]]:
    """Completions one by one, all chosen ones first, as TRL unpairs preference rows."""
    pairs = list(rows(12))
    cut = dict(prompt_ids=8, chosen_ids=6, rejected_ids=7)
    if equal:
        pairs = [{key: (row[key] * 20)[:length] for key, length in cut.items()} for row in pairs]
        pairs = [row | {"prompt_ids": [5 + n, *row["prompt_ids"][1:]]} for n, row in enumerate(pairs)]
    return [
        dict(prompt_ids=row["prompt_ids"], completion_ids=row[key], label=key == "chosen_ids")
        for key in ("chosen_ids", "rejected_ids")
        for row in pairs
    ]


def kto(
    kind: type[KTOTrainer], data: list[dict[str, Any]], settings: dict[str, Any], **arguments: Any
) -> tuple[Any, Tensor]:
    """Rotate completions in batches as ``KTOTrainer._prepare_dataset`` does, and train."""
    size = settings.get("per_device_train_batch_size", 8)
    rotated = []
    for start in range(0, len(data), size):
        batch = data[start : start + size]
        rotated += [
            row | {"KL_completion_ids": other["completion_ids"]}
            for row, other in zip(batch, batch[-1:] + batch[:-1], strict=True)
        ]
    model = flexpatch.apply(tiny_model("llama"))
    trainer = kind(
        model,
        flexpatch.apply(tiny_model("llama", 1)),
        args=plain(KTOConfig, max_length=None, **dict(beta=0.5) | settings),
        train_dataset=datasets.Dataset.from_list(rotated),
        processing_class=make_tokenizer(),
        optimizers=(SGD(model.parameters(), lr=0.1), None),
        **arguments,
    )
    return run(trainer)


def test_a_step_of_packed_completions_is_a_step_of_all() -> None:
    """Where no KL divergence is estimated."""
    settings = dict(loss_type="apo_zero_unpaired", desirable_weight=1.5)
    one, true = kto(StockKTO, completions(), settings | dict(per_device_train_batch_size=64))
    many = settings | dict(gradient_accumulation_steps=100)
    packed, change = kto(PackedKTO, completions(), many, token_budget=150)
    assert one.state.global_step == packed.state.global_step == 1
    sizes = [len(packed.get_train_dataloader().dataset.rows(items)) for items in packed.bins]
    assert sum(sizes) == len(completions()) and len(set(sizes)) > 1, "equal bins would need no weights"
    assert off(change, true) < EQUAL
    assert flexpatch.savings(packed.model).folded == flexpatch.savings(packed.ref_model).folded == len(packed.bins)

    _, alike = kto(unweighted(PackedKTO, KTOTrainer), completions(), many, token_budget=150)
    assert off(alike, true) > BROKEN


@parameterized.expand([(1, False), (3, True)])
def test_each_packed_batch_of_kto_is_a_stock_batch_of_the_same_rows(bins: int, equal: bool) -> None:
    """The stock trainer gets the rows in the order of the bins, which all hold as many. Each has its own estimate."""
    data = completions(equal)
    settings = dict(gradient_accumulation_steps=bins)
    packed, change = kto(PackedKTO, data, settings, token_budget=len(data) // bins * 21 // 2 if equal else 4000)
    assert len(packed.bins) == bins
    dataset = packed.get_train_dataloader().dataset
    order = [row for items in packed.bins for row in dataset.rows(items)]
    assert sorted(order) == list(range(len(data))) != order
    stock = settings | dict(per_device_train_batch_size=len(data) // bins)
    one, true = kto(StockKTO, [data[row] for row in order], stock)
    assert one.state.log_history[0]["kl"] == pytest.approx(packed.state.log_history[0]["kl"], rel=1e-6)
    assert one.state.log_history[0]["kl"] > 0
    assert off(change, true) < EQUAL

    class Unrotated(PackedKTO):
        """Keeps the completions that the trainer rotated among fixed batches."""

        @staticmethod
        def collate_bin(collate: Callable[[list[Any]], Any], bins: list[list[Any]]) -> Any:
            return collate(bins[0])

    _, unrotated = kto(Unrotated, data, settings, token_budget=len(data) // bins * 21 // 2 if equal else 4000)
    assert off(unrotated, true) > 1e-3


def test_completions_of_a_prompt_stay_together() -> None:
    data = completions()
    groups, lengths = prompt_groups(datasets.Dataset.from_list(data), None, 150)
    assert sorted(row for group in groups for row in group) == list(range(len(data)))
    for group, length in zip(groups, lengths, strict=True):
        assert len({tuple(data[row]["prompt_ids"]) for row in group}) == 1
        assert length == len(data[group[0]]["prompt_ids"]) + sum(len(data[row]["completion_ids"]) for row in group)
    assert {len(group) for group in groups} == {2}
    assert {len(group) for group in prompt_groups(datasets.Dataset.from_list(data), None, 60)[0]} == {1, 2}
    _, cut = prompt_groups(datasets.Dataset.from_list(data), 20, 150)
    assert max(cut) <= 60 < max(lengths)


def test_refusals_of_kto() -> None:
    with pytest.raises(FlexpatchError, match=r"completions of one prompt alone.*raise it"):
        kto(PackedKTO, completions(equal=True), {}, token_budget=21)


@needs_precomputed
def test_refusals_come_before_references_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which TRL does while it builds a trainer, of the whole dataset."""
    precomputed = dict(precompute_ref_log_probs=True)
    for stock in (KTOTrainer, DPOTrainer):
        monkeypatch.setattr(stock, "_precompute_ref_logps", None)  # calling it is an error
    with pytest.raises(FlexpatchError, match="precompute_ref_log_probs=True scores the rotated completions"):
        kto(PackedKTO, completions(), precomputed, token_budget=300)
    with pytest.raises(FlexpatchError, match="loss_type sft is not a mean over pairs"):
        train(Packed, Path(), settings=precomputed | dict(loss_type="sft"), token_budget=300)
    with pytest.raises(FlexpatchError, match=r"outside 1 to 50 \(the budget"):
        train(Packed, Path(), settings=precomputed, token_budget=50)
    with pytest.raises(FlexpatchError, match="model does not fold"):
        train(Packed, Path(), tiny_model("llama"), precomputed, token_budget=300)


# Models that would not fold


@parameterized.expand(
    [
        (
            "never applied",
            lambda model: model,
            r"model does not fold.*many times as large.*pass flexpatch.apply\(model",
        ),
        ("fold=False", lambda model: flexpatch.apply(model, fold=False), r"because of flexpatch.apply\(fold=False\)"),
    ]
)
def test_a_model_that_would_not_fold_is_refused(_: str, patch: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(FlexpatchError, match=message):
        train(Packed, Path(), patch(tiny_model("llama")), token_budget=300)


def with_reference(made_by: str) -> tuple[Any, Any]:
    """A trainer's own takes the name of the model's attention from it, but no hooks."""
    model = tiny_model("llama")
    model.save_pretrained("model")
    model = flexpatch.apply(type(model).from_pretrained("model", dtype=torch.float64))
    return model, {"user": tiny_model("llama", 1), "trainer": None}[made_by]


@parameterized.expand(["trainer", "user"])
def test_a_reference_that_would_not_fold_is_refused(made_by: str) -> None:
    model, given = with_reference(made_by)
    with pytest.raises(FlexpatchError, match=r"ref_model does not fold.*ref_model=flexpatch.apply\(copy.deepcopy"):
        train(Packed, Path(), model, ref_model=given, token_budget=300)


@parameterized.expand(["trainer", "user"])
@needs_precomputed
def test_a_reference_that_runs_no_packed_batches_needs_no_patch(made_by: str) -> None:
    model, given = with_reference(made_by)
    precomputed = dict(precompute_ref_log_probs=True, max_steps=1)
    trainer = train(Packed, Path(), model, precomputed, ref_model=given, token_budget=300)
    assert trainer.state.global_step == 1


def test_dropout_of_an_adapter_that_the_trainer_adds_is_refused() -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    given = dict(token_budget=300, ref_model=None, peft_config=lora)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="shared_dropout=True"):
        train(Packed, Path(), flexpatch.apply(model), dict(disable_dropout=False), **given)
    model = flexpatch.apply(tiny_model("llama"), shared_dropout=True)
    assert train(Packed, Path(), model, dict(max_steps=1, disable_dropout=False), **given).state.global_step == 1


# Groups


def online(
    kind: type[Any], config: type[Any], rows_seen: list[list[tuple[int, ...]]], **settings: Any
) -> tuple[Any, Tensor]:
    class Recorded(kind):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            rows_seen.append([tuple(ids) for ids in inputs["prompt_ids"].tolist()])
            return super()._compute_loss(model, inputs)

    set_seed(0)
    tokenizer = make_tokenizer()
    prompts = [[{"role": "user", "content": f"{'abcd' * 10} {n * n}"}] for n in range(4)]
    settings = dict(num_generations=4, gradient_accumulation_steps=4, learning_rate=0.1) | settings
    with mock.patch.dict(TINY, vocab_size=len(tokenizer)):
        model = flexpatch.apply(tiny_model("llama"))
    trainer = Recorded(
        model,
        lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids],
        plain(config, optim="sgd", max_steps=1, max_completion_length=6, **settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    return run(trainer)


@parameterized.expand(
    [
        ("dapo", GRPOTrainer, PackedGRPOTrainer, GRPOConfig, dict(loss_type="dapo")),
        ("grpo", GRPOTrainer, PackedGRPOTrainer, GRPOConfig, dict(loss_type="grpo", scale_rewards="batch")),
        ("rloo", RLOOTrainer, PackedRLOOTrainer, RLOOConfig, dict(beta=0.0)),
    ]
)
def test_a_step_of_whole_groups_is_a_step_of_shuffled_ones(
    _: str, stock: type[Any], packed: type[Any], config: type[Any], settings: dict[str, Any]
) -> None:
    """All micro-batches of one optimizer step: their order means nothing to its gradient."""
    settings = settings | dict(per_device_train_batch_size=4)
    shuffled: list[list[tuple[int, ...]]] = []
    whole: list[list[tuple[int, ...]]] = []
    one, true = online(stock, config, shuffled, **settings)
    ours, change = online(packed, config, whole, **settings)
    assert len(shuffled) == len(whole) == 4 and max(len(set(prompts)) for prompts in shuffled) > 1
    assert [len(set(prompts)) for prompts in whole] == [1, 1, 1, 1]
    assert sorted(p for prompts in whole for p in prompts) == sorted(p for prompts in shuffled for p in prompts)
    assert true.norm() > 1e-3 and off(change, true) < EQUAL
    assert flexpatch.savings(ours.model, 4).computed < flexpatch.savings(one.model, 4).computed


def test_tokens_picked_by_entropy() -> None:
    """The trainer picks them in each micro-batch: those of a generation hold other completions as whole groups."""
    settings = dict(per_device_train_batch_size=4, top_entropy_quantile=0.5)
    message = r"top_entropy_quantile=0.5 .*the 4 micro-batches of a generation.*steps_per_generation=1"
    with pytest.raises(FlexpatchError, match=message):
        online(PackedGRPOTrainer, GRPOConfig, [], **settings)
    settings |= dict(steps_per_generation=1)
    _, true = online(GRPOTrainer, GRPOConfig, [], **settings)
    assert off(online(PackedGRPOTrainer, GRPOConfig, [], **settings)[1], true) < EQUAL

    class Unchecked(PackedGRPOTrainer):
        """What the refusal spares."""

        def __init__(self, model: Any, reward: Any, args: Any, **given: Any) -> None:
            picked, args.top_entropy_quantile = args.top_entropy_quantile, 1.0
            super().__init__(model, reward, args, **given)
            self.top_entropy_quantile = picked

    settings |= dict(steps_per_generation=4)
    _, true = online(GRPOTrainer, GRPOConfig, [], **settings)
    assert off(online(Unchecked, GRPOConfig, [], **settings)[1], true) > BROKEN


def test_groups_are_gathered() -> None:
    """Rows stay whole, prompts that differ in their padding alone stay apart, and values for all stay as they are."""
    ids = torch.tensor([[0, 7], [3, 4], [0, 7], [0, 7], [3, 4], [0, 7]])
    mask = torch.tensor([[0, 1], [1, 1], [1, 1], [0, 1], [1, 1], [1, 1]])
    count = torch.tensor(6)
    batches = [
        dict(prompt_ids=ids[i : i + 2], prompt_mask=mask[i : i + 2], row=[i, i + 1], none=None, count=count)
        for i in (0, 2, 4)
    ]
    first, second, third = gather_groups(batches)
    assert [first["row"], second["row"], third["row"]] == [[0, 3], [1, 4], [2, 5]]
    assert second["prompt_ids"].tolist() == [[3, 4], [3, 4]] and third["prompt_mask"].tolist() == [[1, 1], [1, 1]]
    assert first["none"] is None and first["count"] is count
    with pytest.raises(FlexpatchError, match="images"):
        gather_groups([batch | {"pixel_values": torch.zeros(2)} for batch in batches])


def test_refusals_of_groups() -> None:
    with pytest.raises(FlexpatchError, match="per_device_train_batch_size=6 is not a multiple of num_generations=4"):
        online(PackedGRPOTrainer, GRPOConfig, [], per_device_train_batch_size=6)

    class Pictured(PackedGRPOTrainer):
        def __init__(self, *args: Any, train_dataset: Any, **given: Any) -> None:
            super().__init__(*args, train_dataset=train_dataset.add_column("image", ["x.png"] * 4), **given)

    with pytest.raises(FlexpatchError, match="the dataset has a column 'image': use the stock trainer"):
        online(Pictured, GRPOConfig, [], per_device_train_batch_size=4)
