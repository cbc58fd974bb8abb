"""Packed batches for TRL's DPOTrainer: full rows instead of a fixed number of pairs.

``flexpatch.apply(model)`` folds the batches that a trainer makes. A batch of short pairs makes a short row, for which a
GPU waits. :class:`PackedDPOTrainer` fills each micro-batch with pairs up to a budget of tokens:

>>> trainer = PackedDPOTrainer(flexpatch.apply(model), token_budget=16384, args=DPOConfig(...), ...)  # doctest: +SKIP
"""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from trl import DPOTrainer

from flexpatch.errors import FlexpatchError
from flexpatch.packing import epoch_bins
from flexpatch.patch import savings

# Losses of DPOTrainer that are not means over pairs: they average over tokens, or compare pairs with each other.
NOT_MEANS = ("sft", "aot", "aot_unpaired")


class PackedDPOTrainer(DPOTrainer):
    """DPOTrainer whose micro-batches hold as many pairs as fit a budget of shared tokens.

    ``per_device_train_batch_size`` is ignored. ``gradient_accumulation_steps`` counts packed micro-batches.

    Micro-batches hold different numbers of pairs, and DPOTrainer averages over the pairs of each. So each micro-batch's
    loss is weighted by its share of the step's pairs, over all ranks. The gradient is then the mean over the step's
    pairs, as of one batch. Metrics other than the loss stay means over micro-batches.

    Args:
        token_budget: Most tokens of a row: prompt, chosen and rejected of all its pairs, each once.
        args, kwargs: Arguments of DPOTrainer. The model must fold batches (:func:`flexpatch.apply`).

    Raises:
        FlexpatchError: If the model does not fold, the dataset is streamed, a pair exceeds the budget, or the loss is
            not a mean over pairs (sft, aot).
    """

    def __init__(self, *args: Any, token_budget: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        savings(self.accelerator.unwrap_model(self.model))  # an error if the model does not fold
        if not isinstance(self.train_dataset, Sized):
            raise FlexpatchError("packing needs a dataset of known length; this one is streamed")
        losses = [self.args.loss_type] if isinstance(self.args.loss_type, str) else self.args.loss_type
        if mixed := set(losses) & set(NOT_MEANS):
            raise FlexpatchError(
                f"loss_type {', '.join(sorted(mixed))} is not a mean over pairs: packed batches would change the loss"
            )
        lengths = pair_lengths(self.train_dataset, self.args.max_length, self.args.truncation_mode)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.bins = BinSampler(lengths, token_budget, self.accelerator.num_processes, seed)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader whose batches are the bins of the epoch."""
        loader = DataLoader(
            _Bins(self.train_dataset, self.bins),
            batch_size=1,
            sampler=self.bins,
            collate_fn=partial(_collate_bin, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """Return the step's micro-batches, and the number of their pairs over all ranks."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        pairs = torch.tensor([sum(_pairs(batch) for batch in batches)], device=self.accelerator.device)
        return batches, self.accelerator.gather(pairs).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """Compute DPOTrainer's loss, and weight it by the micro-batch's share of the step's pairs."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:  # evaluation
            return result
        # The trainer divides the loss by the number of micro-batches, and averages gradients over ranks.
        means = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        weight = _pairs(inputs) * means / num_items_in_batch
        return (result[0] * weight, result[1]) if return_outputs else result * weight


def _collate_bin(collate: Callable[[list[Any]], Any], bins: list[list[Any]]) -> Any:
    return collate(bins[0])


def _pairs(inputs: Any) -> int:
    """Count the pairs of one of DPOTrainer's batches, which hold all chosen rows, then all rejected rows."""
    return len(inputs["input_ids"]) // 2


def pair_lengths(dataset: Any, max_length: int | None, truncation_mode: str = "keep_start") -> list[int]:
    """Count the tokens of each tokenised pair in a shared row.

    Args:
        dataset: Dataset with the columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        max_length: Longest prompt + answer, in tokens. DPOTrainer cuts longer ones. ``None`` for no limit.
        truncation_mode: ``"keep_start"`` if DPOTrainer cuts the end, ``"keep_end"`` if it cuts the start, after which
            the two sequences of a pair share no prefix.

    Returns:
        Tokens of each pair, its prompt counted once.
    """
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    lengths = np.array(
        [
            list(map(len, row))
            for batch in tqdm(columns.iter(1000), "lengths", -(-len(columns) // 1000), disable=None)
            for row in zip(*batch.values(), strict=True)
        ]
    )
    prompt = lengths[:, 0]
    chosen, rejected = prompt + lengths[:, 1], prompt + lengths[:, 2]
    if max_length is not None:
        if truncation_mode == "keep_end":
            prompt = np.where(np.maximum(chosen, rejected) > max_length, 0, prompt)
        prompt, chosen, rejected = (np.minimum(x, max_length) for x in (prompt, chosen, rejected))
    return (chosen + rejected - prompt).tolist()


class BinSampler(Sampler[list[int]]):
    """Sampler of the bins of an epoch, of all ranks. Accelerate deals bins to ranks in turn, and calls ``set_epoch``.

    Args:
        lengths: Length of each sample, in tokens.
        token_budget: Most tokens of a bin.
        ranks: Processes that share the epoch.
        seed: Seed of all epochs.

    Raises:
        FlexpatchError: For a sample that is longer than ``token_budget``.
    """

    def __init__(self, lengths: list[int], token_budget: int, ranks: int, seed: int) -> None:
        self.settings: dict[str, Any] = dict(lengths=lengths, capacity=token_budget, ranks=ranks, seed=seed)
        self.epoch = 0
        self.bins = epoch_bins(**self.settings)

    def set_epoch(self, epoch: int) -> None:
        """Make the bins of epoch number ``epoch``."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.bins = epoch_bins(**self.settings, epoch=epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.bins)

    def __len__(self) -> int:
        return len(self.bins)


class _Bins(Dataset):
    """Dataset of bins, each indexed by the list of its samples."""

    def __init__(self, dataset: Any, bins: BinSampler) -> None:
        self.dataset = dataset
        self.bins = bins

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler.

        Accelerate looks for ``set_epoch`` on the sampler. It does not find the sampler after it has split batches among
        ranks and skipped the first batches of a resumed epoch, and calls the dataset's method instead.
        """
        self.bins.set_epoch(epoch)

    def __getitem__(self, items: list[int]) -> list[Any]:
        return [self.dataset[item] for item in items]
