"""Tokens of images by the model's processor, and the work of its vision tower."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from flexpatch.collator import Collator
from flexpatch.errors import FlexpatchError, first_line
from flexpatch.image_files import Picture
from flexpatch.internals import decoder_of
from flexpatch.layouts import Media, multimodal_types
from flexpatch.models import load_config
from flexpatch.processing import COLUMNS
from flexpatch.tree import Layout

KEYS = 1 << 30  # keys of images in place of token ids, from here on


class Shown(NamedTuple):
    """An image in a prompt.

    Attributes:
        key: Stands for each of its tokens.
        tokens: How many it fills, with those that a processor puts between its lines.
        flops: Of the tower and the projector, forward.
    """

    key: int
    tokens: int
    flops: int


class Tower(NamedTuple):
    """Sizes of a vision tower that FLOPs depend on.

    Attributes:
        blocks: Weights of the linear layers of all its blocks, which each patch passes.
        others: Matrices around them, which each token passes.
        patch: Weights of the embedding of patches.
        depth: Number of blocks.
        width: Width of the hidden states.
        side: Pixels along a patch.
        frames: Frames in a patch.
        window: Patches of a window of attention; 0: there are no windows.
        full: Number of blocks without windows.
    """

    blocks: int
    others: int
    patch: int
    depth: int
    width: int
    side: int
    frames: int
    window: int
    full: int

    def patches(self, pixels: torch.Tensor) -> tuple[int, int]:
        """Count the patches of an image that a processor made, and of a tile of it."""
        every = pixels.numel() // (3 * self.frames * self.side**2)
        tiles = pixels.shape[:-3].numel() if pixels.ndim > 3 else 1
        return every, every // max(tiles, 1)

    def flops(self, patches: int, tile: int, tokens: int) -> int:
        """Return the FLOPs of an image's forward pass.

        Args:
            patches: Of the image.
            tile: Patches that see each other in blocks without windows.
            tokens: That come out.

        Returns:
            Their number.
        """
        pairs = self.full * patches * tile + (self.depth - self.full) * patches * min(tile, self.window or tile)
        return 2 * ((self.blocks + self.patch) * patches + self.others * tokens) + 4 * self.width * pairs


def tower_of(config: Any) -> Tower | None:
    """Measure a model's vision tower. No memory is taken for weights.

    Args:
        config: A configuration.

    Returns:
        Its sizes; ``None`` without a tower.

    Raises:
        FlexpatchError: For a tower that does not cut images into patches of one size.
    """
    vision = getattr(config, "vision_config", None)
    if config.model_type not in multimodal_types() or vision is None:
        return None
    if getattr(vision, "patch_size", None) is None:
        raise FlexpatchError(
            f"the work of the vision tower of '{config.model_type}' cannot be counted, which takes no patches of one "
            "size: name a preset of a text model's size as --model, and only tokens of images are counted"
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text = {id(m) for part in (decoder_of(model), model.get_output_embeddings()) for m in part.modules()}
    tower = [m for m in model.modules() if id(m) not in text]
    lists = [m for m in tower if isinstance(m, torch.nn.ModuleList)]
    blocks = list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))
    inside = {id(m) for block in blocks for m in block.modules()}
    linear = [m for m in tower if isinstance(m, torch.nn.Linear)]
    others = [m for m in tower if not isinstance(m, torch.nn.Embedding) and id(m) not in inside]
    window, side = getattr(vision, "window_size", 0) or 0, _one(vision.patch_size)
    return Tower(
        blocks=sum(m.weight.numel() for m in linear if id(m) in inside),
        others=sum(p.numel() for m in others for p in m.parameters(recurse=False) if p.ndim == 2),
        patch=sum(m.weight.numel() for m in tower if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))),
        depth=len(blocks),
        width=next((p.numel() for block in blocks for p in block.parameters() if p.ndim == 1), 0),
        side=side,
        frames=getattr(vision, "temporal_patch_size", 1) or 1,
        window=(window // side) ** 2,
        full=len(getattr(vision, "fullatt_block_indexes", None) or blocks),
    )


def _one(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


class Gallery:
    """Tell what images cost, and lay out rows with images.

    Args:
        name: Whose processor is used: a hub name or a directory.
        model: Whose tower is counted, a hub name or a directory; ``None``: none.
        tokenizer: The tokenizer of ``name``.
        max_length: Longest prompt + answer, in tokens; longer answers are cut.
        trust_remote_code: Run code that comes with the processor.

    Raises:
        FlexpatchError: If there is no processor, or it cannot be read.
    """

    def __init__(
        self, name: str, model: str | None, tokenizer: Any, *, max_length: int | None, trust_remote_code: bool = False
    ) -> None:
        self.tokenizer, self.whole = tokenizer, None
        options = dict(trust_remote_code=trust_remote_code)
        config = load_config(model, **options) if model is not None else None
        self.tower = tower_of(config) if config is not None else None
        try:
            self.whole = AutoProcessor.from_pretrained(name, **options)
            self.images = self.whole.image_processor
        except Exception as error:  # some need torchvision for videos, and have an image processor without it
            try:
                self.images = AutoImageProcessor.from_pretrained(name, **options)
            except Exception as none:
                raise FlexpatchError(f"{name} has no processor of images: {first_line(error)}") from none
        # The record is needed where there is no whole processor alone.
        self.config = load_config(name, **options) if self.whole is None and self.tower is None else config
        self.record: Media | None = None if self.config is None else multimodal_types().get(self.config.model_type)
        token = getattr(self.whole, "image_token", None)
        if token is not None:
            self.placeholder = tokenizer.convert_tokens_to_ids(token)
        elif self.record is not None:
            self.placeholder = getattr(self.config, self.record.images.token)
        else:
            raise FlexpatchError(f"{name} does not tell which token stands for an image")
        self.measured = cache(self._measured)
        self._keys: dict[bytes, int] = {}
        self.text = Collator(tokenizer)
        self.text.processor = _Reader(tokenizer, self.whole)
        self.last = Collator(None, max_length=max_length, on_long="truncate")

    def shown(self, picture: Picture) -> Shown:
        """Return the tokens and FLOPs of an image."""
        key = self._keys.setdefault(picture.digest, KEYS + len(self._keys))
        return Shown(key, *self.measured(picture.height, picture.width))

    def _measured(self, height: int, width: int) -> tuple[int, int]:
        """Let the processor look at a grey image of that size."""
        from PIL import Image

        blank = Image.new("RGB", (width, height), (127, 127, 127))
        if self.whole is not None:
            made = self.whole(text=[self.whole.image_token], images=[[blank]], return_tensors="pt")
            plain = self.tokenizer(self.whole.image_token)["input_ids"]
            tokens = made["input_ids"].numel() - len(plain) + 1
        else:
            made = self.images(images=[blank], return_tensors="pt")
            tokens = self._by_the_record(made)
        tower = self.tower
        return tokens, tower.flops(*tower.patches(made["pixel_values"]), tokens) if tower else 0

    def _by_the_record(self, made: Mapping[str, Any]) -> int:
        """Count an image's placeholders as folding does."""
        if self.record is None:
            raise FlexpatchError("its model has no record of images")
        layout = self.record.images
        entries = layout.entries(made)
        drawn = self.record.draw(self.config, 0, torch.Generator())
        each = drawn.tokens.count(self.placeholder) // len(drawn.tensors[layout.names[0]])
        counts = {name: len(tensor) for name, tensor in entries.items()}
        sizes = {name: entries[name].numpy() for name in layout.sizes if name in entries}
        units = layout.units(self.config, counts, sizes, None, each * counts[layout.names[0]])
        if units is None:
            raise FlexpatchError("its tensors do not fit the record of its model type")
        return sum(unit.tokens for unit in units)

    def layout(self, row: Mapping[str, Any], seen: Sequence[Picture], sample: int) -> tuple[Layout, list[Shown]]:
        """Lay out a dataset row with images.

        Args:
            row: The row.
            seen: Its images.
            sample: Its name in error messages.

        Returns:
            Its layout, in which each image's tokens have its key; and its images.

        Raises:
            FlexpatchError: If images and placeholders do not match, or as :meth:`Collator.layout`.
        """
        shown = [self.shown(picture) for picture in seen]
        tokenised = "prompt_ids" in row
        tree = self.text.tree({k: v for k, v in row.items() if not tokenised or k not in COLUMNS}, sample)
        ids = [int(token) for token in tree.ids]
        places = ids.count(self.placeholder)
        filled = tokenised and places == sum(image.tokens for image in shown)  # by the processor
        if places != len(shown) and not filled:
            raise FlexpatchError(f"sample {sample}: its prompt has places for {places} images, not {len(shown)}")
        order, keys, at = iter(shown), list[int](), 0
        while at < len(ids):
            image = next(order) if ids[at] == self.placeholder else None
            keys += [ids[at]] if image is None else [image.key] * image.tokens
            at += image.tokens if image is not None and filled else 1
        answers = [[int(token) for token in child.ids] for child in tree.children]
        return self.last.layout(dict(prompt_ids=keys, answer_ids=answers), sample), shown


class _Reader:
    """A processor that looks at no image: each keeps its one place in the text.

    Args:
        tokenizer: The tokenizer.
        processor: Whose chat template is used; ``None``: the tokenizer's.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = (processor or tokenizer).apply_chat_template

    def __call__(self, text: list[str], **_: Any) -> Mapping[str, torch.Tensor]:
        return dict(input_ids=torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
