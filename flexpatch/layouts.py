"""The record of a multimodal class: how its calls hold images, and which of their tokens see each other.

A **unit** is an image, a tile of one or a video: what fills a run of placeholders. Tensors of a call hold units as
**entries** of their first dimension: one for each image, or one for each patch of an image. Records are kept by the
type of the multimodal class. They know nothing of its text model, which has an adapter of its own.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexpatch.errors import FlexpatchError

# Names of the arguments of multimodal backbones that say which tokens are images.
TYPES = ("token_type_ids", "mm_token_type_ids")


class Unit(NamedTuple):
    """An image.

    Attributes:
        tokens: Placeholders that it fills.
        spans: Its entries in each tensor, from the first up to the last (exclusive).
    """

    tokens: int
    spans: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Say how a call holds its images. The base: one entry of each tensor for each image.

    Attributes:
        names: Tensors of a call that hold them, pixels first. A call may lack the others.
        sizes: Those of them whose numbers tell how many placeholders an image fills.
        token: The entry of the configuration that holds the placeholder's id.
        tokens: ``config``, numbers of an image in each of ``sizes`` -> its placeholders; ``None``: all fill as many.
        even: Whether they fill as many too in a call without ``sizes``, of a tower that takes images of one size.
        skips_zeros: Whether the model leaves out entries whose pixels are all zero.
    """

    names: tuple[str, ...] = ("pixel_values",)
    sizes: tuple[str, ...] = ()
    token: str = "image_token_id"
    tokens: Callable[..., int] | None = None
    even: bool = False
    skips_zeros: bool = False

    def entries(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call, with entries as their first dimension."""
        return {name: call[name] for name in self.names if call.get(name) is not None}

    def units(
        self,
        config: Any,
        counts: Mapping[str, int],
        sizes: Mapping[str, np.ndarray],
        skipped: np.ndarray | None,
        placeholders: int,
    ) -> list[Unit] | None:
        """List the images of a call.

        Args:
            config: The configuration of the multimodal class.
            counts: Entries of each tensor.
            sizes: The numbers of the tensors in ``sizes``.
            skipped: (entries,) bool, which the model leaves out; ``None``: none.
            placeholders: How many there are in the whole call.

        Returns:
            The images in order; ``None`` if the tensors do not fit each other.
        """
        unsized = not set(self.sizes) <= set(sizes)
        if len(set(counts.values())) != 1 or (unsized and not self.even):
            return None
        every = range(counts[self.names[0]]) if skipped is None else np.flatnonzero(~skipped).tolist()
        if self.tokens is None or unsized:
            each = [placeholders // max(len(every), 1)] * len(every)
        else:
            each = [self.tokens(config, *(sizes[name][k] for name in self.sizes)) for k in every]
        return [Unit(n, dict.fromkeys(counts, (k, k + 1))) for n, k in zip(each, every, strict=True)]

    def join(self, entries: dict[str, Tensor]) -> dict[str, Any]:
        """Return tensors of chosen entries as the model takes them."""
        return entries


@dataclass(frozen=True, kw_only=True)
class Stacked(Layout):
    """One image, or one tile, behind the other."""


@dataclass(frozen=True, kw_only=True)
class Nested(Layout):
    """(sequences, most images of one, ...), filled up with images of zeros, which the model leaves out."""

    skips_zeros: bool = True

    def entries(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call, images of all sequences behind each other."""
        return {name: tensor.flatten(0, 1) for name, tensor in super().entries(call).items()}

    def join(self, entries: dict[str, Tensor]) -> dict[str, Any]:
        """Return tensors of chosen entries as those of one sequence."""
        return {name: tensor[None] for name, tensor in entries.items()}


@dataclass(frozen=True, kw_only=True)
class Grid(Layout):
    """Patches of all images behind each other, and each image's grid of them: (images, 3), or 4 with a count of frames.

    Attributes:
        merged: ``config`` -> how many patches of a grid make one token.
        pooled: Whether all frames of a video make one.
    """

    names: tuple[str, ...] = ("pixel_values", "image_grid_thw")
    sizes: tuple[str, ...] = ("image_grid_thw",)
    merged: Callable[[Any], int] = lambda config: config.vision_config.spatial_merge_size**2
    pooled: bool = False

    def units(
        self,
        config: Any,
        counts: Mapping[str, int],
        sizes: Mapping[str, np.ndarray],
        skipped: np.ndarray | None,
        placeholders: int,
    ) -> list[Unit] | None:
        """List the images of a call by their grids.

        Args:
            config, counts, sizes, skipped, placeholders: As in :meth:`Layout.units`.

        Returns:
            The images in order; ``None`` if there are more or fewer patches than the grids tell.
        """
        pixels, grid = self.names[:2]
        if grid not in sizes:
            return None
        patches = sizes[grid].prod(-1)
        bounds = np.r_[0, np.cumsum(patches)].tolist()
        if bounds[-1] != counts[pixels]:
            return None
        merged = self.merged(config)
        tokens = sizes[grid][:, 1:].prod(-1) // merged if self.pooled else patches // merged
        return [
            Unit(int(tokens[k]), {pixels: (start, start + n), grid: (k, k + 1)})
            for k, (n, start) in enumerate(zip(patches.tolist(), bounds, strict=False))
        ]


def videos_like(images: Grid) -> Grid:
    """Return the layout of videos that are held as images are, with one axis more in use."""
    names = ("pixel_values_videos", "video_grid_thw")
    return replace(images, names=names, sizes=names[1:], token="video_token_id")


class Drawn(NamedTuple):
    """An image that was drawn at random.

    Attributes:
        tensors: Its entries in each tensor.
        tokens: Ids that stand for it in a prompt, placeholders among them.
    """

    tensors: Mapping[str, Tensor]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """Record of multimodal classes: all that folding must know of their images.

    Attributes:
        name: The family, as people write it.
        tiny: Type of the multimodal class -> keyword arguments of small configurations, as in :class:`Adapter`.
        images: How a call holds images.
        videos: How it holds videos; ``None``: calls with videos run as they are given.
        draw: ``config``, number, generator -> a random image. Equal numbers give images of equal sizes.
        types: The argument that tells the kinds of tokens; ``None``: there is none.
        blocks: ``config``, types (N, S) -> (N, S) int, number of the two-way block that each token is in, -1 for none.
            Tokens of a block see each other, those behind them too. ``None``: every token sees the past alone.
        text_blocks: Whether types mark prompts (0) and answers (1), and prompts are such blocks, without images too.
            The text model's adapter may then refuse prompts that see both ways: they are let pass.
        block_layers: Layer types whose layers have these blocks.
        beyond_windows: Whether a block's tokens see all of it whatever a layer's window. Batches with a block that is
            longer than a window run as given then.
        text_logits: Whether the class scales and caps logits as its text model's own class does; otherwise it leaves
            them as they are, whatever its text configuration says.
        three_axes: Whether the backbone's ``compute_3d_position_ids`` gives rope positions, several for each token.
        rounds_late: Whether the tower computes with pixels before it rounds them to its dtype. For other towers rows
            round them, since some do not.
        first_position: The rope position at which the backbone begins to count.
        passed: Arguments beside these tensors that reach the model as they are, whatever the row.
        unfit: ``config`` -> why this configuration cannot be exact and what to do instead, or ``None``.
        limits: One line for the support table; empty if there are none.
        reject: A call's arguments -> why it cannot be folded, as the end of a sentence, or ``None``.
        since: The release of transformers from which on folding images was found exact. Older ones run as given.
        needs: Packages without which transformers does not make the class's models.
    """

    name: str
    tiny: Mapping[str, Sequence[Mapping[str, Any]]]
    images: Layout
    draw: Callable[[Any, int, torch.Generator], Drawn]
    videos: Layout | None = None
    types: str | None = None
    blocks: Callable[[Any, np.ndarray], np.ndarray] | None = None
    text_blocks: bool = False
    block_layers: tuple[str, ...] = ()
    beyond_windows: bool = False
    unfit: Callable[[Any], str | None] = lambda config: None
    limits: str = ""
    text_logits: bool = False
    three_axes: bool = False
    rounds_late: bool = False
    first_position: int = 0
    passed: frozenset[str] = field(default_factory=frozenset)
    reject: Callable[[Mapping[str, Any]], str | None] = lambda call: None
    since: str = "5.17"
    needs: tuple[str, ...] = ()

    def layouts(self) -> list[Layout]:
        """Return the layouts of all kinds of media that fold."""
        return [self.images] if self.videos is None else [self.images, self.videos]

    def one_token(self) -> bool:
        """Tell whether images and videos fill the same placeholders, so that no call has both."""
        return self.videos is not None and self.videos.token == self.images.token

    def lacking(self) -> list[str]:
        """Return the packages of ``needs`` that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]

    def known(self) -> set[str]:
        """Return the arguments of a call that this record speaks of."""
        return {name for layout in self.layouts() for name in layout.names} | self.passed


_media: dict[str, Media] = {}


def register_media(media: Media) -> Media:
    """Add ``media`` to the table.

    Raises:
        FlexpatchError: If one of its types already has a record.
    """
    for model_type in media.tiny:
        if model_type in _media:
            raise FlexpatchError(f"images of model type '{model_type}' are already served by {_media[model_type].name}")
    _media.update(dict.fromkeys(media.tiny, media))
    return media


def media_of(config: Any) -> Media | None:
    """Return the record of a configuration's multimodal class; ``None`` for all others."""
    importlib.import_module("flexpatch.adapters")  # here, because those files import this one
    return _media.get(config.model_type)


def placeholders_of(config: Any) -> list[int]:
    """List the ids of a configuration's placeholders. They may lie outside the vocabulary."""
    record = media_of(config)
    tokens = [] if record is None else [getattr(config, layout.token, None) for layout in record.layouts()]
    return [token for token in tokens if token is not None]


def multimodal_types() -> dict[str, Media]:
    """Return all types of multimodal classes with a record, in order of registration."""
    importlib.import_module("flexpatch.adapters")
    return dict(_media)
