"""Packed batches for TRL's trainers: full rows instead of a fixed number of pairs.

``flexpatch.apply(model)`` folds the batches that a trainer makes. A batch of short pairs makes a short row, for which a
GPU waits. :class:`PackedDPOTrainer` and its relatives fill each micro-batch up to a budget of tokens:

>>> trainer = PackedDPOTrainer(flexpatch.apply(model), token_budget=16384, args=DPOConfig(...), ...)  # doctest: +SKIP

Trainers that generate split what they generated at random. :class:`PackedGRPOTrainer` and :class:`PackedRLOOTrainer`
keep the completions of a prompt together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer

from flexpatch.adapters_off import make_reference
from flexpatch.bins import BinDataset, BinSampler, group_by_prompt, pair_lengths, prompt_groups, sequence_lengths
from flexpatch.errors import FlexpatchError
from flexpatch.forward import hook_of
from flexpatch.groups import gather_groups
from flexpatch.packable import check_budget, check_folds, check_groups, check_packs, loader_settings
from flexpatch.picture_bins import Pictured, check_images, columns_of_images, pictured_rows, shards
from flexpatch.run_ahead import ReferenceFirst, RunsAhead, prepare

# Losses of DPOTrainer that are not means over pairs: they average over tokens, or compare pairs with each other.
NOT_MEANS = ("sft", "aot", "aot_unpaired")

Collate = Callable[[list[Any]], Any]


class _PackedTrainer(RunsAhead):
    """Trainer whose micro-batches hold as many samples as fit a budget of shared tokens.

    Each micro-batch's loss is weighted as :class:`PackedDPOTrainer` says.
    """

    takes_images = False

    def __init__(self, *args: Any, token_budget: int, **kwargs: Any) -> None:
        check_budget(token_budget)
        self.token_budget = token_budget
        super().__init__(*args, **kwargs)
        self._pack_once()
        make_reference(self)

    def _pack_once(self) -> None:
        """Pack, unless that was done while TRL built the trainer."""
        if not hasattr(self, "bins"):
            self._pack()

    def _pack(self) -> None:
        """Refuse what cannot be packed, and make bins."""
        otherwise = f"micro-batches of {self.token_budget:,} shared tokens would be padded batches, many times as large"
        check_folds(self.accelerator.unwrap_model(self.model), "model", otherwise)
        reference = getattr(self, "ref_model", None)
        if reference is not None and not self.args.precompute_ref_log_probs:
            check_folds(reference := self.accelerator.unwrap_model(reference), "ref_model", otherwise)
            hook = hook_of(reference)
            assert hook is not None
            hook.folding.of_trainer = True  # KTO's asks for no cache, but before TRL 1.16 does not say so
        check_packs(self)
        self.groups, lengths = self._items()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.bins = BinSampler(lengths, self.token_budget, self.accelerator.num_processes, seed)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the reference's log-probs of a dataset. TRL asks for them while it builds the trainer, for hours."""
        self._pack_once()
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def _items(self) -> tuple[list[list[int]] | None, list[int]]:
        """Return the rows of each item of the dataset (``None``: one), and its length in a shared row."""
        raise NotImplementedError

    def _pictured(self, sequences: int) -> list[Pictured]:
        """Measure rows with images, of each of which the collator makes so many sequences."""
        sharded = shards(self.accelerator, self.is_fsdp_enabled)
        config = self.accelerator.unwrap_model(self.model).config
        workers = self.args.dataloader_num_workers
        check_images(rows := pictured_rows(self.train_dataset, self.data_collator, config, workers, sequences), sharded)
        return rows

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader whose batches are the bins of the epoch."""
        loader = DataLoader(
            BinDataset(self.train_dataset, self.bins, self.groups),
            batch_size=1,
            sampler=self.bins,
            collate_fn=partial(self.collate_bin, self.data_collator),
            **loader_settings(self.args),
        )
        return prepare(self.accelerator, loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """Return the step's micro-batches, and the number of their samples over all ranks."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        # Filled by the GPU, which a copy would wait for.
        samples = torch.full((1,), sum(map(self.samples, batches)), device=self.accelerator.device)
        return batches, self.accelerator.gather(samples).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """Compute the stock trainer's loss, and weight it by the micro-batch's share of the step's samples."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:  # evaluation
            return result
        self.look_at(result[0] if return_outputs else result)
        # The trainer divides the loss by the number of micro-batches, and averages gradients over ranks.
        means = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        weight = self.samples(inputs) * means / num_items_in_batch
        return (result[0] * weight, result[1]) if return_outputs else result * weight

    @staticmethod
    def collate_bin(collate: Collate, bins: list[list[Any]]) -> Any:
        """Make a batch of the rows of one bin. Static, so that workers need no trainer."""
        return collate(bins[0])

    @staticmethod
    def samples(inputs: Any) -> int:
        """Count the samples of a batch: pairs, all chosen rows of which come before all rejected ones."""
        return len(inputs["input_ids"]) // 2


class PackedDPOTrainer(ReferenceFirst, _PackedTrainer, DPOTrainer):
    """DPOTrainer whose micro-batches hold as many pairs as fit a budget of shared tokens.

    ``per_device_train_batch_size``, ``train_sampling_strategy`` and ``dataloader_drop_last`` have no say in bins.
    ``gradient_accumulation_steps`` counts packed micro-batches.

    Micro-batches hold different numbers of pairs, and DPOTrainer averages over the pairs of each. So each micro-batch's
    loss is weighted by its share of the step's pairs, over all ranks. The gradient is then the mean over the step's
    pairs, as of one batch. Metrics other than the loss stay means over micro-batches. A router's auxiliary loss
    compares the tokens of a micro-batch, as in stock's gradient accumulation: it is that of the packed micro-batches.

    Args:
        token_budget: Most tokens of a row: prompt, chosen and rejected of all its pairs, each once. For rows with
            images, the work of the vision tower counts too: as many tokens as are equal work for the text model.
        args, kwargs: Arguments of DPOTrainer. Model and reference must fold batches (:func:`flexpatch.apply`).

    Raises:
        FlexpatchError: If the model or the reference does not fold, the dataset is streamed or empty, a pair exceeds
            the budget, ``auto_find_batch_size`` is on, the loss is not a mean over pairs (sft, aot), or the dataset has
            images and batches with images of this model do not fold, some rows have none and ranks shard the model, or
            ZeRO-3 is on.
        UnsupportedModelError: If dropout is active in training, without ``apply(model, shared_dropout=True)``.
    """

    takes_images = True

    def _items(self) -> tuple[None, list[int]]:
        losses = [self.args.loss_type] if isinstance(self.args.loss_type, str) else self.args.loss_type
        if mixed := set(losses) & set(NOT_MEANS):
            raise FlexpatchError(
                f"loss_type {', '.join(sorted(mixed))} is not a mean over pairs: packed batches would change the loss"
            )
        if columns_of_images(self.train_dataset):
            return None, [row.shared + row.answers for row in self._pictured(2)]
        return None, pair_lengths(self.train_dataset, self.args.max_length, self.args.truncation_mode)


class PackedRewardTrainer(_PackedTrainer, RewardTrainer):
    """RewardTrainer whose micro-batches hold as many pairs as fit a budget of shared tokens.

    Weighted as :class:`PackedDPOTrainer`.

    Args:
        token_budget: Most tokens of a row: chosen and rejected of all its pairs, their common beginnings once.
        args, kwargs: Arguments of RewardTrainer. The model must fold batches (:func:`flexpatch.apply`).

    Raises:
        FlexpatchError: If the model does not fold, the dataset is streamed or has images, or a pair exceeds the budget.
    """

    def _items(self) -> tuple[None, list[int]]:
        return None, sequence_lengths(self.train_dataset)


class PackedKTOTrainer(_PackedTrainer, KTOTrainer):
    """KTOTrainer whose micro-batches hold as many completions as fit a budget of shared tokens, prompt by prompt.

    Weighted as :class:`PackedDPOTrainer`, by completions.

    KTO's loss compares each completion with an estimate of the KL divergence, which the trainer takes over a
    micro-batch whose completions it rotates among the prompts. Here the micro-batch is the packed one: its loss is the
    stock trainer's on a batch of the same rows. A step of several micro-batches has as many estimates, as there.
    ``loss_type="apo_zero_unpaired"`` has no such estimate: any packing gives the same gradient.

    Args:
        token_budget: Most tokens of a row: prompts and completions, each once, and the work of the vision tower as in
            :class:`PackedDPOTrainer`. Rotated completions fill rows of their own, equally long.
        args, kwargs: Arguments of KTOTrainer. Model and reference must fold batches (:func:`flexpatch.apply`).

    Raises:
        FlexpatchError: If the model or the reference does not fold, the dataset is streamed, a completion with its
            prompt exceeds the budget, or with ``loss_type="kto"``, if a micro-batch would hold the completions of one
            prompt alone, or the reference's log-probs are precomputed. For images as :class:`PackedDPOTrainer`.
    """

    takes_images = True

    def _pack(self) -> None:
        super()._pack()
        if not self.calculate_KL:
            return
        if self.args.precompute_ref_log_probs:
            raise FlexpatchError(
                "precompute_ref_log_probs=True scores the rotated completions of fixed batches, and packed batches "
                "rotate others: leave it out, or use loss_type='apo_zero_unpaired'"
            )
        if min(map(len, self.bins), default=2) < 2:
            raise FlexpatchError(
                f"with token_budget={self.token_budget} a micro-batch would hold the completions of one prompt alone, "
                "and KTO's estimate of the KL divergence needs those of others: raise it, or use "
                "loss_type='apo_zero_unpaired'"
            )

    def _items(self) -> tuple[list[list[int]], list[int]]:
        if columns_of_images(self.train_dataset):
            rows = [(row.prompt, row.shared, row.answers) for row in self._pictured(1)]
            return group_by_prompt(rows, self.token_budget)
        return prompt_groups(self.train_dataset, self.args.max_length, self.token_budget)

    @staticmethod
    def collate_bin(collate: Collate, bins: list[list[Any]]) -> Any:
        """Make a batch of the rows of one bin, whose completions are rotated among its prompts."""
        (rows,) = bins
        if "KL_completion_ids" in rows[0]:
            others = rows[-1:] + rows[:-1]
            rows = [
                row | {"KL_completion_ids": other["completion_ids"]} for row, other in zip(rows, others, strict=True)
            ]
        return collate(rows)

    @staticmethod
    def samples(inputs: Any) -> int:
        """Count the completions of a batch."""
        return len(inputs["input_ids"])


class WholeGroups(Trainer):
    """Base of trainers that generate: micro-batches hold whole groups, so that each prompt is computed once.

    TRL shuffles the completions that it generated, and splits them into micro-batches. A prompt is then computed in
    almost all of them. Here the order of prompts is random, and completions of one prompt stay together.

    For trainers derived from GRPOTrainer: ``class Mine(WholeGroups, GMPOTrainer): pass``.

    Args:
        args, kwargs: Arguments of the trainer. The model must fold batches (:func:`flexpatch.apply`).

    Raises:
        FlexpatchError: If the model does not fold, the dataset has images, ``per_device_train_batch_size`` is not a
            multiple of ``num_generations``, or tokens are picked by their entropy (``top_entropy_quantile``) within
            several micro-batches of a generation.
    """

    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_groups(self)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch. TRL's method keeps those of a generation, whose rows are put in order here."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = gather_groups(self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]


class PackedGRPOTrainer(WholeGroups, GRPOTrainer):
    """GRPOTrainer whose micro-batches hold whole groups. See :class:`WholeGroups`."""


class PackedRLOOTrainer(WholeGroups, RLOOTrainer):
    """RLOOTrainer whose micro-batches hold whole groups. See :class:`WholeGroups`."""
