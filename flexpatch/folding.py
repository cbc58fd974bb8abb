"""The stage that folds: an ordinary batch enters as one row, its hidden states leave as a batch.

It keeps counts of tokens, and the latest batch with its row, for the next call to compare its own batch with. No
result depends on either.
"""

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import PreTrainedModel

from flexpatch.calls import (
    IGNORED,
    LITTLE,
    RESTARTS_WITH_CACHE,
    Batch,
    batch_obstacle,
    fold_obstacle,
    gains,
    obstacle,
)
from flexpatch.counts import Counts
from flexpatch.dispatch import check_ranks, is_flash, mask_dtype, original_of, warn_as_given
from flexpatch.errors import FlexpatchError, FlexpatchWarning
from flexpatch.fold import Folded, check_ids, fold_batch, predicting_padding, see_themselves, unfold
from flexpatch.host_copies import send, to_host
from flexpatch.images import Held, held_by
from flexpatch.internals import attention_name, change_tokens, device_of, layers_of, text_config
from flexpatch.layouts import TYPES, media_of
from flexpatch.media import RowImages, images_in, place, placeholders_out, row_arguments
from flexpatch.padding_free import VARLEN, find_starts, fold_sequences
from flexpatch.refusals import check_mode, longrope_limit, scaling_limit
from flexpatch.registry import adapter_for
from flexpatch.row_calls import row_inputs
from flexpatch.towers import TowerWorks, Works

Exit = Callable[[Any], None]


@dataclass
class _Latest:
    """The latest batch, as it was given and folded, or why it was not folded."""

    counts: Counts
    folded: Folded | None = None
    images: RowImages | None = None
    key: Any = None
    arrays: Any = None


class Folding:
    """Folds batches where that is exact and gains.

    Attributes:
        backend, shared_dropout, compile: As :func:`flexpatch.apply` was given them.
        of_trainer: Whether a trainer holds the model: it reads no cache that it did not ask for.
        padding_skipped: Whether mixers that run on separate sequences (:mod:`flexpatch.unshare`) leave padding in front
            of a sequence out; ``None`` for a model without such mixers, or whose are attention that is masked.
        counts: Tokens of the latest 10,000 batches.
    """

    def __init__(self, backend: str, shared_dropout: bool, compile: bool) -> None:
        self.backend = backend
        self.shared_dropout = shared_dropout
        self.compile = compile
        self.of_trainer = False
        self.padding_skipped: bool | None = None
        self.counts: deque[Counts] = deque(maxlen=10_000)
        self.latest: _Latest | None = None
        self.trained = False  # whether a batch that could have folded came in training
        self.works = TowerWorks()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the latest batch out of copies of a model: masks hold functions that cannot be pickled."""
        return vars(self) | {"latest": None}

    def given(self, call: dict[str, Any], reason: str) -> None:
        """Count, and say once, that a batch runs as it was given.

        Args:
            call: Its arguments by name.
            reason: The end of a sentence. A part in parentheses at its end says what to do about it.
        """
        warn_as_given(reason)
        tokens = next((x.shape[:2].numel() for x in map(call.get, ("input_ids", "inputs_embeds")) if x is not None), 0)
        self.counts.append(Counts(tokens, tokens, tokens, reason.split(" (")[0]))

    def __call__(self, backbone: PreTrainedModel, call: dict[str, Any]) -> tuple[dict[str, Any], Exit | None]:
        """Fold the batch of a call without a cache.

        Args:
            backbone: The backbone that is called.
            call: Its arguments by name.

        Returns:
            The arguments to call it with, and what brings its output back into the batch's layout; ``None`` for a
            batch that runs as it was given.

        Raises:
            FlexpatchError: For ids outside the vocabulary, naming row and column, and for tensors of wrong shapes or
                dtypes.
            UnsupportedModelError: For states of the model in which sharing a prefix would change results.
        """
        check_ranks(backbone)  # for every batch: ranks must agree
        config = text_config(backbone)
        cached = _decline_cache(backbone, config, call, self.of_trainer)
        ids, given = call.get("input_ids"), call.get("attention_mask")
        plain = all(call.get(name) is None for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
        if plain and ids is not None and len(ids) == 1:
            return call, None  # one sequence has nothing to share
        if reason := obstacle(backbone, config, call):
            self.given(call, f"with {reason}")
            return call, None
        assert ids is not None, "calls without ids have an obstacle"
        if given is not None and given.shape != ids.shape:
            raise FlexpatchError(f"attention_mask has shape {tuple(given.shape)}, but input_ids has {tuple(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):  # rounded to integers they would give some model's numbers
            raise FlexpatchError(f"input_ids are {ids.dtype}; token ids are torch.int64 or torch.int32")
        record = media_of(backbone.config)
        held = [] if record is None else held_by(record, call)
        latest, batch = self._fold(backbone, config, call, cached, held)
        reason, first = None, self._first(backbone, latest, len(ids))
        if latest.folded is not None or first:
            reason = check_mode(backbone, shared_dropout=self.shared_dropout)
            self.trained = self.trained or first
        if reason is not None and latest.folded is not None:
            self.given(call, reason)
            return call, None
        if latest.folded is None and latest.counts.reason != LITTLE:
            self.given(call, latest.counts.reason or "")
            if (latest.counts.reason or "").startswith(RESTARTS_WITH_CACHE):
                call["attention_mask"] = torch.ones_like(ids)  # without a cache they would not be ignored
            return call, None
        shown: dict[str, Any] = {}
        if latest.folded is not None and latest.images is not None and record is not None:
            assert batch.images is not None
            found = row_arguments(backbone, call, record, held, batch, latest.images)
            if isinstance(found, str):
                self.given(call, found)
                return call, None
            shown = found
        self.counts.append(latest.counts)
        if latest.folded is None:
            return call, None
        rows = latest.folded.rows
        # Batches differ in length from step to step. Linear layers are padded with compiled layers alone.
        few = not self.compile
        inputs = row_inputs(backbone, rows, adapter_for(backbone.config), self.backend, few)
        if any(isinstance(mask, Tensor) for mask in rows.masks.values()):
            rows.masks.clear()  # dense masks (L x L) are too large to keep
        # Copies: a hook of others may change them in place, and the next call gets this fold again.
        inputs |= {name: inputs[name].clone() for name in ("input_ids", "position_ids") if name in inputs}
        leave = partial(_unfold, latest.folded.index, latest.folded.padding)
        return call | dict.fromkeys({*IGNORED, *VARLEN} & call.keys()) | inputs | shown, leave

    def _first(self, backbone: PreTrainedModel, latest: _Latest, rows: int) -> bool:
        """Tell whether a training begins with this batch, of a kind that may fold.

        The model is looked at then, although this batch may have too little to share: one that folds comes later, after
        hours perhaps.
        """
        if self.trained or rows < 2 or not (backbone.training and torch.is_grad_enabled()):
            return False
        return latest.folded is not None or latest.counts.reason == LITTLE

    def _fold(
        self, backbone: PreTrainedModel, config: Any, call: dict[str, Any], cached: bool, held: list[Held]
    ) -> tuple[_Latest, Batch]:
        """Fold a call's batch, or find it to be the latest one again. ``cached``: whether stock would make a cache.

        Trainers run a batch through the policy and then the reference: it is folded once. Not under a mode that
        watches operations (selective checkpointing), which expects the same ones every time.
        """
        ids, given = call["input_ids"], call.get("attention_mask")
        types = [call.get(name) for name in TYPES if config is not backbone.config]
        tensors = [ids, given, call.get("position_ids"), *types]
        arrays, numbers = to_host(tensors, [x for media in held for x in media.numbers()])
        # A dispatched model moves its inputs by itself: ids on the CPU do not mean that it computes there.
        home = device_of(backbone)
        device = ids.device if ids.device.type != "cpu" or home.type == "meta" else home
        dtype = mask_dtype(backbone, device, self.backend)
        watched = is_in_torch_dispatch_mode()
        present = [x is not None for x in tensors]
        original = original_of(attention_name(backbone))
        mixes = self.padding_skipped is not None
        sequences = _sequences(call) if is_flash(original) or mixes else None
        rest = iter(arrays)
        _, mask, positions, *kinds = (next(rest) if there else None for there in present)
        mask = None if mask is None else mask != 0
        seen = adapter_for(backbone.config).restarts and not mixes
        batch = Batch(arrays[0], mask, positions, kinds, sequences, original, cached, seen, self.padding_skipped)
        batch = replace(batch, images=images_in(backbone.config, held, numbers, batch))
        key = (
            present, dtype, device, config.vocab_size, longrope_limit(config), scaling_limit(config), cached, original,
            None if batch.images is None else batch.images.key(), None if sequences is None else sequences.tolist(),
            torch.is_inference_mode_enabled(), watched,
        )  # fmt: skip
        latest = self.latest
        if watched or latest is None or latest.key != key or not np.array_equal(latest.arrays, arrays):
            latest = _folded(backbone, config, batch, dtype, device, self.works.of(backbone, held, batch.images))
            self.latest = latest = replace(latest, key=key, arrays=arrays)
        return latest, batch


def _sequences(call: dict[str, Any]) -> np.ndarray | None:
    """Return the boundaries of sequences in a call, if FlashAttention would take them. Others never do."""
    if any(call.get(name) is None for name in VARLEN[:4]):
        return None
    return np.asarray(call["cu_seq_lens_q"].tolist(), np.int64)


def _decline_cache(backbone: PreTrainedModel, config: Any, call: dict[str, Any], of_trainer: bool) -> bool:
    """Set ``use_cache=False`` in training, and in a trainer's models, where a caller did not say if it wants a cache.

    Not for batches that fold alone: whether a caller gets a cache must not depend on what a batch holds.

    Returns:
        Whether the unpatched model would make one.
    """
    by_default = call.get("use_cache") is None and getattr(config, "use_cache", None)
    if not (by_default and (of_trainer or (backbone.training and torch.is_grad_enabled()))):
        return False
    call["use_cache"] = False
    # Stock drops caches too under checkpointing.
    cached = not (backbone.training and any(layer.gradient_checkpointing for layer in layers_of(backbone)))
    if cached and not of_trainer:
        warnings.warn(
            "flexpatch: in training, calls without use_cache run with use_cache=False, so past_key_values is None. "
            "Pass use_cache=True to get a cache, from calls that are not folded",
            FlexpatchWarning,
            2,
        )
    return cached


def _folded(
    backbone: PreTrainedModel, config: Any, batch: Batch, dtype: Any, device: torch.device, works: Works
) -> _Latest:
    """Fold a batch to a row on ``device``, if that is exact and gains. ``dtype``: as of :func:`mask_dtype`."""
    ids, mask, adapter = batch.ids, batch.mask, adapter_for(backbone.config)
    check_ids(placeholders_out(backbone.config, ids), mask, config.vocab_size)
    ids = ids if batch.images is None else batch.images.keys

    def gain(counts: Counts, *tower: int) -> bool:
        return gains(config, counts, ids.shape[1], dtype, *tower)

    def worth(counts: Counts) -> bool:
        return gain(counts) or gain(counts, works())  # at most: which images are left is known later

    folded, reason = None, batch_obstacle(batch)
    if reason is None and batch.restarts():
        assert batch.positions is not None
        folded = fold_sequences(ids, find_starts(batch.positions), worth)
    elif reason is None:
        fold = partial(fold_batch, blind=True) if is_flash(batch.original) else fold_batch
        folded = fold(ids, mask, worth)
    if folded is None:
        return _Latest(Counts(ids.size, ids.size, ids.size, reason or LITTLE))
    if batch.original == "eager" and adapter.masks != "none":
        see_themselves(folded)
    placed = None
    if batch.images is not None:
        outcome = place(batch.images, folded, mask)
        if isinstance(outcome, str):
            return _Latest(Counts(ids.size, ids.size, ids.size, outcome))
        folded, placed = outcome
        if not gain(folded.counts) and not gain(folded.counts, works(), works(placed.picked)):
            return _Latest(Counts(ids.size, ids.size, ids.size, LITTLE))
    reason = fold_obstacle(batch, folded, config, adapter)
    eager_rows = dtype is not None and dtype.is_floating_point
    if is_flash(batch.original) and eager_rows and mask is not None and predicting_padding(mask).any():
        reason = "with padding, to which FlashAttention gives zeros, and eager attention of rows does not"
    if reason is not None:
        return _Latest(Counts(ids.size, ids.size, ids.size, reason))
    folded = replace(folded, rows=send(folded.rows, device), index=send(folded.index, device))
    return _Latest(folded.counts, folded, placed)


def _unfold(index: Tensor, padding: int | None, output: Any) -> None:
    """Bring the output of a row back into the batch's layout. There is none if the forward raised."""
    if output is not None:
        change_tokens(output, lambda tokens_1LD: unfold(tokens_1LD, index, padding))
