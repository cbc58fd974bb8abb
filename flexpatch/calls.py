"""Decide which ordinary calls of a model fold, and say why others run as they are given.

Shapes: N sequences, S columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedModel

from flexpatch.counts import WORTH, Counts
from flexpatch.dispatch import is_flash
from flexpatch.fold import Folded, follow_columns, longest_hole, moved
from flexpatch.images import media_obstacle
from flexpatch.internals import SCALES_BY_INDEX
from flexpatch.layouts import TYPES, Media, media_of
from flexpatch.media import Images
from flexpatch.padding_free import VARLEN, boundaries, find_starts
from flexpatch.refusals import longrope_limit, scaling_limit
from flexpatch.registry import Adapter
from flexpatch.settings import asked

# Where there are no images these arguments change nothing.
IGNORED = {*TYPES, "labels"}
# Names of the arguments of multimodal backbones that hold images, sound or video.
MEDIA = dict(
    pixel_values="images", pixel_values_videos="video", input_features="sound", mm_encoder_outputs="encoded images",
    image_pixel_values="images", audio_input_features="sound", cross_attention_states="encoded images",
)  # fmt: skip
IMAGES = "images, sound or video"
# Names of a call's cache: the second from transformers 5.24 on, the others in models without attention.
CACHES = ("past_key_values", "cache", "cache_params", "state")
# The reason of a batch that ran as it was given because folding would keep more than ``WORTH`` of it. Nobody is warned.
LITTLE = "with too little to share"
# The reason of padding-free rows in calls that make a cache. transformers then takes a row for one sequence.
RESTARTS_WITH_CACHE = "with position_ids that restart, which transformers ignores where a call makes a cache,"


def without_cache(call: dict[str, Any]) -> bool:
    """Tell whether a call neither has a cache nor asks for one."""
    return not call.get("use_cache") and all(call.get(name) is None for name in CACHES)


def obstacle(backbone: PreTrainedModel, config: Any, call: dict[str, Any]) -> str | None:
    """Find what keeps a call from being folded, whatever its batch holds.

    Args:
        backbone: The model's backbone.
        config: The configuration of its text stack.
        call: The call's arguments by name.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if call.get("cu_seq_lens_q") is not None and call.get("position_ids") is None:
        return "cu_seq_lens without position_ids"
    if ids is None:
        return "inputs_embeds, which do not tell which tokens are equal"
    if ids.ndim != 2:
        return f"input_ids of {ids.ndim} dimensions"
    if being_recorded(ids):
        return "input_ids that are being traced or exported, or have no values"
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        return "an attention_mask of the caller's own (not one number for each token)"
    if asked(config, call, "use_cache"):
        return "use_cache not given, whose cache may be wanted (pass False, or set model.config.use_cache = False)"
    positions = call.get("position_ids")
    if positions is not None and (positions.is_floating_point() or positions.shape not in (ids.shape, ids[:1].shape)):
        return "position_ids that are not integers, one for each token"
    if asked(config, call, "output_attentions"):
        return "output_attentions=True"
    if asked(config, call, "return_dict") is False:
        return "return_dict=False"
    multimodal = config is not backbone.config
    record = media_of(backbone.config) if multimodal else None
    known = {"input_ids", "attention_mask", "position_ids", *VARLEN}
    known |= IGNORED if multimodal else set()
    if reason := media_reason(record, backbone, call):
        return reason
    known |= set() if record is None else record.known()
    for name, value in call.items():
        if isinstance(value, Tensor) and name not in known and value.ndim and len(value) == len(ids):
            return f"the argument {name}"
    return None


def media_reason(record: Media | None, backbone: PreTrainedModel, call: dict[str, Any]) -> str | None:
    """Find what in a multimodal call keeps it from being folded.

    Args:
        record: Of the multimodal class; ``None``: it has none, and no call with images folds.
        backbone: The backbone that is called.
        call: The call's arguments by name.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    given = [name for name in MEDIA if call.get(name) is not None]
    if record is None:
        return IMAGES if given else None
    if reason := record.reject(call):
        return reason
    if not given:
        return None
    if unknown := [MEDIA[name] for name in given if name not in record.known()]:
        return unknown[0]
    return media_obstacle(record, backbone, call)


@dataclass(frozen=True)
class Batch:
    """A batch of a call, on the CPU.

    Attributes:
        ids: (N, S) int64.
        mask: (N, S) bool, True for tokens; ``None``: no padding.
        positions: (N, S) int64 position ids; ``None``: not given.
        types: Kinds of tokens, 0 for text: (N, S) for each argument in ``TYPES``; ``None``: not given.
        sequences: (R + 1,) int64, the boundaries of sequences that FlashAttention was given; ``None``: none.
        original: The model's own attention implementation.
        cached: Whether the unpatched model would make a cache.
        images: Its images; ``None``: there are none, and no two-way blocks.
        restarts_seen: As in the architecture's :class:`Adapter`; never where mixers run on separate sequences.
        padding_skipped: As in :class:`flexpatch.folding.Folding`.
    """

    ids: np.ndarray
    mask: np.ndarray | None
    positions: np.ndarray | None
    types: Sequence[np.ndarray | None]
    sequences: np.ndarray | None
    original: str
    cached: bool
    restarts_seen: bool
    padding_skipped: bool | None = None
    images: Images | None = None

    def restarts(self) -> bool:
        """Tell whether positions are those of padding-free rows."""
        return self.positions is not None and not follow_columns(self.positions, self.mask)


def batch_obstacle(batch: Batch) -> str | None:
    """Find what keeps a batch from being folded, whatever folding would gain.

    Args:
        batch: The batch.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    if batch.images is not None and (batch.images.reason is not None or batch.restarts()):
        return batch.images.reason or f"with {IMAGES} in padding-free rows"
    own = None if batch.images is None else batch.images.types
    if any(each is not None and each is not own and each.any() for each in batch.types):
        return f"with {IMAGES}"
    if batch.padding_skipped is not None and (reason := mixer_obstacle(batch)):
        return reason
    positions, flash = batch.positions, is_flash(batch.original)
    if positions is None or (batch.sequences is None and not batch.restarts()):
        return None
    if batch.mask is not None and not (flash and batch.mask.all()):
        return "with position_ids that do not count a sequence's columns (and an attention_mask)"
    if not batch.restarts_seen and not flash:
        return "with position_ids that restart, which this architecture ignores"
    if batch.cached and not flash:
        return f"{RESTARTS_WITH_CACHE} (pass use_cache=False)"
    if flash and len(positions) > 1:
        return "with position_ids that restart in several rows, each of which FlashAttention takes for one sequence"
    starts = find_starts(positions)
    if batch.sequences is not None and not np.array_equal(batch.sequences, boundaries(starts)):
        return "with cu_seq_lens that differ from the restarts of position_ids"
    if positions[starts].any():
        return "with position_ids that do not count a sequence's columns, nor restart at 0"
    return None


def mixer_obstacle(batch: Batch) -> str | None:
    """Find what keeps a batch of a model whose mixers run on separate sequences from being folded.

    Args:
        batch: The batch.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    if batch.sequences is not None:
        return "with cu_seq_lens, which this model's mixers read"
    if batch.restarts():
        return "with position_ids that do not count a sequence's columns, which this model's mixers ignore"
    if longest_hole(batch.mask):
        return "with padding inside a sequence, over which states of this model's mixers run"
    if not batch.padding_skipped and batch.mask is not None and batch.mask.argmax(1).any():
        return "with padding in front of a sequence, over which states of this model's mixers run (pad on the right)"
    return None


def fold_obstacle(batch: Batch, folded: Folded, config: Any, adapter: Adapter) -> str | None:
    """Find what would make a folded batch inexact.

    Args:
        batch: The batch.
        folded: The batch as one row.
        config: The configuration of the model's text stack.
        adapter: The record of its architecture.

    Returns:
        The reason as the end of a sentence; ``None`` if there is none.
    """
    positions, mask, columns = batch.positions, batch.mask, batch.ids.shape[1]
    if adapter.begins == "column" and (moved(None, mask) or moved(positions, mask)):
        return "with padding on the left, or position_ids that do not begin at 0: this architecture counts columns,"
    if adapter.begins == "position" and moved(positions, mask):
        return "with padding on the left and no position_ids that begin at 0 behind it, where positions are absolute,"
    if (most := adapter.longest(config)) is not None and folded.rows.depth > most:
        return f"with sequences of more than {most} tokens, from where on this architecture is not exact,"
    window = min(filter(None, adapter.windows(config).values()), default=None)
    if window is not None and longest_hole(mask) >= window and batch.original == "eager":
        # Where no key is in reach, eager attention averages over the whole row of the batch.
        return f"with padding longer than a window of {window} inside a sequence, under eager attention"
    if window is not None and longest_hole(mask) and is_flash(batch.original):
        # FlashAttention leaves padding out, and counts windows in tokens.
        return "with padding inside a sequence, across which FlashAttention counts windows otherwise"
    if window is not None and batch.images is not None and batch.images.beyond > window:
        return f"with two-way blocks longer than a window of {window}, in which this model's see all of themselves"
    reach = columns if positions is None else int(positions.max()) + 1
    if (limit := longrope_limit(config)) is not None and (folded.rows.depth <= limit) != (reach <= limit):
        return "with padding or position_ids beyond the length at which longrope switches its frequencies"
    limit = scaling_limit(config)
    longest = max(columns, folded.rows.input_ids.shape[1]) if SCALES_BY_INDEX else reach
    if limit is not None and longest > limit and (SCALES_BY_INDEX or moved(positions, mask)):
        where = "at all" if SCALES_BY_INDEX else "and do not begin at position 0"
        return f"that reach beyond {limit}, from where on this model scales queries, {where},"
    return None


def gains(
    config: Any, counts: Counts, columns: int, mask_dtype: torch.dtype | None, tower: int = 0, tower_run: int = 0
) -> bool:
    """Tell whether one row of ``counts.computed`` tokens costs at most ``WORTH`` of the batch.

    Block masks skip what is hidden. The dense backend computes all pairs of the row: to a layer of D hidden units a
    pair costs 4 D FLOPs, a token about 24 D^2. A vision tower runs on the row's images alone.

    Args:
        config: The configuration of the model's text stack.
        counts: Tokens of the batch and of the row.
        columns: S.
        mask_dtype: ``None`` for block masks; another for the dense backend.
        tower: FLOPs of a vision tower for all images of the batch.
        tower_run: For those of the row.

    Returns:
        Whether to fold the batch.
    """
    if mask_dtype is None and not tower:
        return counts.computed <= WORTH * counts.padded
    token = 6 * config.hidden_size
    pairs, given = (0, 0) if mask_dtype is None else (counts.computed, columns)
    row, batch = float(counts.computed * (token + pairs)), float(counts.padded * (token + given))
    if tower:
        pair = 4 * config.hidden_size * config.num_hidden_layers
        row, batch = row + tower_run / pair, batch + tower / pair
    return row <= WORTH * batch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Tell whether torch.export is at work. Asked outside graphs: torch 2.11 has torch.compile say that it is too."""
    return torch.compiler.is_exporting()


def being_recorded(ids: Tensor) -> bool:
    """Tell whether a call is being traced, exported or captured, or its ids have no values to look at.

    A fold depends on a batch's ids: whoever records one batch's operations would replay that fold on other ids.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or get_proxy_mode() is not None:
        return True
    if type(ids) not in (Tensor, nn.Parameter) or ids.is_meta or is_transformed(ids.detach()):
        return True  # torch.func.grad holds whatever is computed within it, of ids that it does not hold too
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a transform of torch.func holds a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
