"""Packed batches of pairs with images under TRL's DPOTrainer, against the stock trainer of the unpatched model."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers import processors_offline as offline
from helpers.needs import needs
from helpers.tokenizers_offline import make_tokenizer
from helpers.trl_images import all_equal, float64_training
from helpers.trl_runs import unweighted, weights
from parameterized import parameterized
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForSequenceClassification, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import flexpatch
from flexpatch import Collator, FlexpatchError
from flexpatch.bins import BinDataset
from flexpatch.costs import Cost, sizes_of
from flexpatch.image_costs import tower_of
from flexpatch.models import tiny_config, tiny_model
from flexpatch.picture_bins import Pictured, check_images, pictured_rows, shards
from flexpatch.trl import PackedDPOTrainer, PackedKTOTrainer, PackedRewardTrainer

# Relative to what a step changes. Stock accumulation of five pairs differs from one batch by 2e-7: backward passes and
# weights of parts are partly float32.
EQUAL, BROKEN, BUDGET = 1e-6, 1e-2, 400


def said(role: str, text: str) -> list[dict[str, str]]:
    return [dict(role=role, content=text)]


def pairs() -> datasets.Dataset:
    """One image or two, the same image again, wide and high ones."""
    shown = [[0], [1], [0, 2], [3], [0]]
    return datasets.Dataset.from_list(
        [
            dict(
                images=[offline.picture(seed, 16 + 8 * (seed % 2)) for seed in seeds],
                prompt=said("user", "What is this? " * (n + 1)),
                chosen=said("assistant", "A cat. " * (5 - n)),
                rejected=said("assistant", "No. " * (2 + 3 * n)),
            )
            for n, seeds in enumerate(shown)
        ]
    )


def step(
    trainer: type[Any],
    kind: str,
    patched: bool,
    settings: Any = None,
    *,
    config: type[Any] = DPOConfig,
    data: Any = None,
    options: Any = None,
    swapped: bool = False,
    **arguments: Any,
) -> tuple[Any, Tensor]:
    """Train one step of all rows; also returns the weights' change.

    ``options``: of ``flexpatch.apply``. ``swapped``: the reference is trained, and the model is its reference.
    """
    model = tiny_model(kind)
    reference = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)
    model, reference = (reference, model) if swapped else (model, reference)
    if patched:
        model, reference = flexpatch.apply(model, **options or {}), flexpatch.apply(reference)
    given = dict(
        output_dir="out", report_to="none", max_length=None, logging_steps=1, lr_scheduler_type="constant",
        save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, max_grad_norm=0.0, learning_rate=0.1,
        gradient_checkpointing=False, num_train_epochs=1, optim="sgd",
    ) | (settings or {})  # fmt: skip
    with float64_training():
        made = trainer(
            model,
            args=config(**given),
            train_dataset=pairs() if data is None else data,
            processing_class=offline.make_processor(kind),
            **dict(ref_model=reference) | arguments,
        )
        before = weights(made.model)
        made.train()
    return made, weights(made.model) - before


def check_step(kind: str) -> None:
    one, true = step(DPOTrainer, kind, False, dict(per_device_train_batch_size=5))
    accumulated = dict(gradient_accumulation_steps=100)
    packed, change = step(PackedDPOTrainer, kind, True, accumulated, token_budget=BUDGET)
    saved = flexpatch.savings(packed.model)
    assert saved.folded == saved.batches == len(packed.bins) and len(set(map(len, packed.bins))) > 1
    assert 0 < saved.images_run <= saved.images // 2, "both sequences of a pair share its images"
    assert one.state.global_step == packed.state.global_step == 1
    off = (change - true).norm() / true.norm()
    assert true.norm() > 0 and off < EQUAL
    assert packed.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], abs=1e-4)

    # Without the weights, the same comparison fails.
    _, alike = step(unweighted(PackedDPOTrainer, DPOTrainer), kind, True, accumulated, token_budget=BUDGET)
    assert (alike - true).norm() > BROKEN * true.norm()


@needs("transformers", "5.17", "images fold from there on")
def test_a_step_is_that_of_all_pairs() -> None:
    check_step("qwen2_5_vl")


@parameterized.expand([(kind,) for kind in offline.KINDS if kind != "qwen2_5_vl"])
@pytest.mark.slow
def test_a_step_of_other_layouts(kind: str) -> None:
    check_step(kind)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["no checkpoints", "not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_compiled_layers(
    kind: str, checkpoints: bool | None, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(gradient_checkpointing_kwargs=dict(use_reentrant=checkpoints))
    settings = {} if checkpoints is None else settings | dict(gradient_checkpointing=True)
    _, true = step(DPOTrainer, kind, False, settings | dict(per_device_train_batch_size=5))
    settings |= dict(gradient_accumulation_steps=100)
    compiled = dict(backend="flex", compile=True, recompute_layers=1)
    packed, change = step(PackedDPOTrainer, kind, True, settings, options=compiled, token_budget=BUDGET)
    assert flexpatch.savings(packed.model).folded == len(packed.bins) > 1
    assert true.norm() > 0 and (change - true).norm() < EQUAL * true.norm()
    monkeypatch.setattr("flexpatch.media.identities", all_equal)
    _, wrong = step(PackedDPOTrainer, kind, True, settings, options=compiled, token_budget=10 * BUDGET)
    assert (wrong - true).norm() > BROKEN * true.norm()


def test_adapters_off_are_the_reference() -> None:
    adapted = dict(ref_model=None, peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    accumulated = dict(gradient_accumulation_steps=100)

    def losses(trainer: type[Any], patched: bool, settings: Any, **arguments: Any) -> tuple[float, Tensor]:
        set_seed(0)
        trained, change = step(trainer, "qwen2_5_vl", patched, settings, **adapted, **arguments)
        return trained.state.log_history[0]["loss"], change

    own, true = losses(DPOTrainer, False, dict(per_device_train_batch_size=5))
    ours, change = losses(PackedDPOTrainer, True, accumulated, token_budget=BUDGET)
    assert ours == pytest.approx(own, abs=1e-4) and true.norm() > 0
    assert (change - true).norm() < EQUAL * true.norm()


def singles() -> datasets.Dataset:
    """Each prompt with the answer that is wanted, later with the other. Two prompts have equal words, not images."""
    rows = list(pairs())
    rows[4] |= dict(prompt=rows[1]["prompt"])
    answers = [(row, key) for key in ("chosen", "rejected") for row in rows]
    return datasets.Dataset.from_list(
        [
            dict(images=row["images"], prompt=row["prompt"], completion=row[key], label=key == "chosen")
            for row, key in answers
        ]
    )


def kto(trainer: type[Any], kind: str, patched: bool, settings: dict[str, Any], **arguments: Any) -> tuple[Any, Tensor]:
    given = dict(config=KTOConfig, data=singles(), swapped=True) | arguments
    return step(trainer, kind, patched, dict(beta=0.01) | settings, **given)


def check_kto(kind: str) -> None:
    """A loss without an estimate of the KL divergence is a mean over completions, however they are packed."""
    unpaired = dict(loss_type="apo_zero_unpaired")
    one, true = kto(KTOTrainer, kind, False, unpaired | dict(per_device_train_batch_size=10))
    many = unpaired | dict(gradient_accumulation_steps=100)
    packed, change = kto(PackedKTOTrainer, kind, True, many, token_budget=BUDGET)
    saved = flexpatch.savings(packed.model)
    assert saved.folded == saved.batches == len(packed.bins) > 1
    assert 0 < saved.images_run <= saved.images // 2, "both completions of a prompt share its images"
    assert sorted(map(len, packed.groups)) == [2] * 5
    assert true.norm() > 0 and (change - true).norm() < EQUAL * true.norm()
    assert packed.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], abs=1e-4)

    _, alike = kto(unweighted(PackedKTOTrainer, KTOTrainer), kind, True, many, token_budget=BUDGET)
    assert (alike - true).norm() > BROKEN * true.norm()


def check_kl(kind: str) -> None:
    """With an estimate, a micro-batch's loss is the stock trainer's on a batch of its rows, in its order."""
    strong = dict(beta=0.1)  # the estimate weighs more
    batch = strong | dict(per_device_train_batch_size=10)
    for swapped in (True, False):  # in one of these orders of policy and reference the estimate is negative, taken as 0
        packed, change = kto(PackedKTOTrainer, kind, True, strong, token_budget=4000, swapped=swapped)
        (items,) = packed.bins
        order = BinDataset(singles(), packed.bins, packed.groups).rows(items)
        one, true = kto(KTOTrainer, kind, False, batch, data=singles().select(order), swapped=swapped)
        if one.state.log_history[0]["kl"] > 0:
            break
    assert true.norm() > 0 and (change - true).norm() < EQUAL * true.norm()
    assert packed.state.log_history[0]["kl"] == pytest.approx(one.state.log_history[0]["kl"], abs=1e-4) != 0
    _, other = kto(KTOTrainer, kind, False, batch, data=singles().select(sorted(order)), swapped=swapped)
    assert (other - true).norm() > 1e-4 * true.norm(), "other rotations would be as good"


@parameterized.expand([(kind,) for kind in offline.KINDS])
@pytest.mark.slow
def test_kto(kind: str) -> None:
    check_kto(kind)
    check_kl(kind)


def test_datasets_that_leave_ranks_waiting() -> None:
    """Ranks that shard a model gather the tower's weights together, and some micro-batches have no images."""
    some, none = Pictured(b"a", 9, 9, True), Pictured(b"b", 5, 9, False)
    with pytest.raises(FlexpatchError, match=r"sample 1 has no image.*DDP, or give every row an image"):
        check_images([some, none], True)
    for rows, sharded in (([some, some], True), ([none, none], True), ([some, none], False)):
        check_images(rows, sharded)


def test_ranks_that_shard() -> None:
    def ranks(count: int, stage: int | None) -> Any:
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        return SimpleNamespace(num_processes=count, state=SimpleNamespace(deepspeed_plugin=plugin))

    assert shards(ranks(2, None), True) and shards(ranks(2, 2), False)
    assert not shards(ranks(1, None), True) and not shards(ranks(2, None), False)
    with pytest.raises(FlexpatchError, match="ZeRO-3: use FSDP2 or DDP"):
        shards(ranks(2, 3), False)


def totals(rows: list[Pictured]) -> list[int]:
    return [row.shared + row.answers for row in rows]


def test_lengths_count_tokens_and_the_tower() -> None:
    processor, config = offline.make_processor("qwen2_5_vl"), tiny_model("qwen2_5_vl").config
    collate, data = DataCollatorForVisionPreference(processor), pairs()
    lengths = totals(pictured_rows(data, collate, config, 0))
    assert lengths == totals(pictured_rows(data, collate, config, 2))
    tower, model = tower_of(config), sizes_of(config, "tiny")
    assert tower is not None
    for length, row in zip(lengths, data, strict=True):
        layout = Collator(processor).layout(row)
        images = processor.image_processor(row["images"], return_tensors="pt")
        grids = images["image_grid_thw"].tolist()
        patches = [t * h * w for t, h, w in grids]
        own = sum(tower.flops(n, n, 0) for n in patches)
        least = len(layout) + own / model.flops(Cost(1, 0, 0))
        # Where prompt and answers are cut, the trainer shares the prompt alone; and it bounds the projector's work.
        assert least <= length < least + 2 * len(layout)
    single = [
        {"image": row["images"][0]} | {k: v for k, v in row.items() if k != "images"} for row in data.select([0, 1])
    ]
    assert totals(pictured_rows(datasets.Dataset.from_list(single), collate, config, 0)) == lengths[:2]
    without = data.map(lambda row: dict(images=[]))
    plain = pictured_rows(without, collate, config, 0)
    assert all(a < b for a, b in zip(totals(plain), lengths, strict=True)) and not any(row.images for row in plain)


def without_the_fourth(rows: list[Any]) -> Any:
    """A collator that fails on a row."""
    if rows[0]["prompt"] == pairs()[3]["prompt"]:
        raise ValueError("no")
    return DataCollatorForVisionPreference(offline.make_processor("qwen2_5_vl"))(rows)


def test_wrong_use(tmp_path: Path) -> None:
    def made(trainer: type[Any], settings: Any, kind: str = "qwen2_5_vl", data: Any = None, **arguments: Any) -> Any:
        options = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        given = dict(train_dataset=data or pairs(), processing_class=offline.make_processor(kind), token_budget=BUDGET)
        model, reference = flexpatch.apply(tiny_model(kind)), flexpatch.apply(tiny_model(kind))
        return trainer(model, ref_model=reference, args=settings(**options), **given | arguments)

    with pytest.raises(FlexpatchError, match=r"sample [0-9] has .* outside 1 to 100"):
        made(PackedDPOTrainer, DPOConfig, token_budget=100)
    with pytest.raises(FlexpatchError, match="sample 3: the processor failed"):
        made(PackedDPOTrainer, DPOConfig, data_collator=without_the_fourth)
    with pytest.raises(FlexpatchError, match=r"completions of one prompt alone.*raise it"):
        made(PackedKTOTrainer, KTOConfig, data=singles(), token_budget=200)
    (config := tiny_config("llama")).num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(FlexpatchError, match="'images': remove it to train on text, or train with PackedDPOTrainer or"):
        PackedRewardTrainer(
            flexpatch.apply(model), args=RewardConfig("out", report_to="none", use_cpu=True, bf16=False),
            train_dataset=pairs(), processing_class=make_tokenizer(), token_budget=BUDGET,
        )  # fmt: skip
    with pytest.raises(FlexpatchError, match="batches of llama with images do not fold"):
        pictured_rows(pairs(), list, tiny_model("llama").config, 0)
