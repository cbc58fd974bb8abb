"""Images of rows of your own: which placeholders they fill, their blocks, and rope positions of several axes.

A row lists runs of tokens depth first, and so are its images in the order of its placeholders. Blocks and rope
positions are those of each separate sequence.

Shapes: B rows, L tokens a row, N sequences of a batch, S columns, K images.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.illustrated import Illustrated
from flexpatch.images import finite, media_obstacle
from flexpatch.internals import backbone_of
from flexpatch.layouts import TYPES, Layout, Media, media_of, placeholders_of
from flexpatch.masks import version
from flexpatch.plan import in_batches, sequences_of
from flexpatch.refusals import check_rows
from flexpatch.registry import Adapter
from flexpatch.row_calls import row_inputs
from flexpatch.row_sequences import axes_of, blocks_of
from flexpatch.rows import Rows
from flexpatch.tree_images import tensors_of, types_of

KINDS = ("image", "video")


@dataclass(frozen=True)
class Shown:
    """Arguments that a model is shown of rows beside their text.

    Attributes:
        rows: The rows, with two-way blocks.
        arguments: Tensors of images, and rope positions of several axes.
    """

    rows: Rows
    arguments: dict[str, Any]


def own_inputs(inner: PreTrainedModel, rows: Rows, adapter: Adapter, asked: str) -> dict[str, Any]:
    """Make the arguments with which a model runs rows of a user.

    Args:
        inner, rows, adapter, asked: As :func:`flexpatch.row_calls.row_inputs` takes them.

    Returns:
        Its arguments, and those of the rows' images.

    Raises:
        FlexpatchError, UnsupportedModelError: As that function; and for images that do not fit the text or the model.
    """
    check_rows(inner.config, rows, placeholders_of(inner.config))
    shown = shown_with(inner, rows)
    return row_inputs(inner, shown.rows, adapter, asked) | shown.arguments


def shown_with(inner: PreTrainedModel, rows: Rows) -> Shown:
    """Find the images of rows, and what follows from them. It is found once, and kept with the rows' masks.

    Args:
        inner: A model.
        rows: Packed rows on its device.

    Returns:
        The rows with their blocks, and arguments of the model.

    Raises:
        FlexpatchError: For images that do not match their placeholders, or that this model does not take. The message
            names the sample.
        UnsupportedModelError: For images in a state of the model, or of a release, in which rows are not exact.
    """
    record = media_of(inner.config)
    if record is None and rows.images:
        raise FlexpatchError(
            f"{rows.images[0].name} has images, and {type(inner).__name__} takes none: load the model with "
            "AutoModelForImageTextToText, or leave the images out"
        )
    if record is None or not (rows.images or record.text_blocks):
        return Shown(rows, {})
    config, shown = rows.masks.get(_key(inner, rows), (None, None))
    if config is not inner.config or shown is None:
        shown = _shown(inner, rows, record)
        set_shown(inner, rows, shown)
    return shown


def set_shown(inner: PreTrainedModel, rows: Rows, shown: Shown) -> Rows:
    """Let a model be shown something else of rows; the verifier breaks it on purpose.

    Args:
        inner: The model.
        rows: Packed rows.
        shown: Of these rows.

    Returns:
        ``rows``.
    """
    rows.masks[_key(inner, rows)] = inner.config, shown
    return rows


def _dtype(inner: PreTrainedModel) -> torch.dtype:
    """Return the dtype of pixels: towers round them to it themselves, if at all."""
    return next(p.dtype for p in backbone_of(inner).parameters() if p.is_floating_point())


def _key(inner: PreTrainedModel, rows: Rows) -> Any:
    return "images", _dtype(inner), *(version(x) for x in (rows.input_ids, rows.ends, rows.position_ids))


def _shown(inner: PreTrainedModel, rows: Rows, record: Media) -> Shown:
    config, backbone = inner.config, backbone_of(inner)
    ids, ends = (x.numpy(force=True).astype(np.int64) for x in (rows.input_ids, rows.ends))
    types = types_of(record, config, ids.ravel(), None if rows.scored is None else rows.scored.numpy(force=True))
    kinds = {} if record.types is None else {record.types: torch.from_numpy(types)[None]}
    for each in rows.images:
        reason = record.reject(dict(each.given) | kinds)
        if record.one_token() and record.layouts()[1].names[0] in each.given:
            reason = "videos of this model, whose placeholders are those of images"
        if reason is not None:
            raise UnsupportedModelError(f"{each.name}: rows cannot run with {reason}. Ordinary batches can")
    found = _Found(record, config, rows, ids.ravel())
    arguments = tensors_of(record, rows.images, _dtype(inner))
    if (reason := media_obstacle(record, backbone, arguments)) is not None:
        raise UnsupportedModelError(f"rows cannot run with {reason}")
    batches = in_batches(sequences_of(ends))
    last = blocks_of(record, inner, batches, types, ids.shape)
    if record.three_axes and rows.images:
        positions = axes_of(backbone, record, batches, ids.ravel(), types, found.sizes_in)
        if positions is not None:
            shaped = torch.from_numpy(positions).view(-1, *ids.shape)
            arguments["position_ids"] = shaped.to(rows.input_ids.device)
    if last is not None:
        blocked = replace(rows, last=torch.from_numpy(last).to(rows.input_ids.device))
        blocked.masks.update(rows.masks)  # other layers' masks, and a plan
        rows = blocked
    return Shown(rows, arguments)


class _Found:
    """The images of rows: which one each placeholder stands for, and their sizes on the host.

    Attributes:
        unit_of: (B * L,) int64, the image of each token, -1 for others.
        kinds: (K,) int64, the layout of each.
        sizes: For each image, its numbers by name.

    Raises:
        FlexpatchError: For images that do not match their placeholders.
    """

    def __init__(self, record: Media, config: Any, rows: Rows, ids: np.ndarray) -> None:
        self.layouts = record.layouts()
        self.unit_of = np.full(ids.size, -1)
        self.kinds: list[int] = []
        self.sizes: list[dict[str, np.ndarray]] = []
        for kind, layout in enumerate(self.layouts[:1] if record.one_token() else self.layouts):
            token = getattr(config, layout.token, None)
            for each in rows.images:
                at = each.start + np.flatnonzero(ids[each.start : each.stop] == token)
                self._add(record, config, layout, kind, each, at)
            beside = np.flatnonzero((ids == token) & (self.unit_of < 0)) if rows.images else np.empty(0)
            if len(beside):
                sample = rows.samples[int(np.searchsorted(np.array(rows.starts), int(beside[0]), "right")) - 1]
                raise FlexpatchError(
                    f"sample {sample}: {KINDS[kind]} placeholders (id {token}) stand in a run that has no images: give "
                    "them to this run's Tree (images=...)"
                )

    def _add(self, record: Media, config: Any, layout: Layout, kind: int, each: Illustrated, at: np.ndarray) -> None:
        if unknown := sorted(each.given.keys() - record.known()):
            takes = ", ".join(sorted(record.known()))
            raise FlexpatchError(
                f"{each.name} has images[{unknown[0]!r}], which the model does not take; it takes {takes}"
            )
        if reason := record.reject(dict.fromkeys(TYPES, True) | dict(each.given)):  # a row has all types
            raise FlexpatchError(f"{each.name}: rows hold no {reason}")
        entries = layout.entries(each.given)
        units, sizes = [], dict[str, np.ndarray]()
        if layout.names[0] in entries:
            if not finite(entries):
                raise FlexpatchError(
                    f"{each.name}: its pixels are NaN or infinite, which would make all of its row NaN"
                )
            sizes = {name: entries[name].numpy(force=True).astype(np.int64) for name in layout.sizes if name in entries}
            skipped = None
            if layout.skips_zeros:
                skipped = (entries[layout.names[0]] == 0).flatten(1).all(1).numpy(force=True)
            counts = {name: len(tensor) for name, tensor in entries.items()}
            units = layout.units(config, counts, sizes, skipped, len(at)) or []
            if not units:
                shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in entries.items())
                raise FlexpatchError(f"{each.name}: its images' tensors do not fit each other: {shapes}")
        filled = [unit.tokens for unit in units]
        if sum(filled) != len(at) or 0 in filled:
            raise FlexpatchError(
                f"{each.name}: its {len(units)} {KINDS[kind]}s fill {sum(filled)} placeholders, and its text holds "
                f"{len(at)} (id {getattr(config, layout.token, None)}): pass all ids that the processor made with them"
            )
        if record.three_axes and units and layout is self.layouts[-1]:  # lengths of frames, which rope counts
            for name in record.passed & each.given.keys():
                sizes[name] = each.given[name].numpy(force=True)
                if sizes[name].shape != (len(units),):
                    raise FlexpatchError(
                        f"{each.name}: {name} has shape {sizes[name].shape}; expected one number for each of its "
                        f"{len(units)} {KINDS[kind]}s"
                    )
        self.unit_of[at] = np.repeat(len(self.kinds) + np.arange(len(units)), filled)
        self.kinds += [kind] * len(units)
        for k, unit in enumerate(units):
            spans = {name: slice(*unit.spans.get(name, (k, k + 1))) for name in sizes}
            self.sizes.append({name: sizes[name][span] for name, span in spans.items()})

    def sizes_in(self, index: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the sizes of a batch's images, sequence by sequence, as a call holds them."""
        found: dict[str, np.ndarray] = {}
        units = np.where(mask, self.unit_of[index], -1)
        for kind in range(len(self.layouts)):
            order = [u for row in units for u in dict.fromkeys(row[row >= 0].tolist()) if self.kinds[u] == kind]
            for name in self.sizes[order[0]] if order else ():
                found[name] = np.concatenate([self.sizes[u][name] for u in order])
        return found
