"""The work of a vision tower, by its sizes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from flexpatch.images import Held
from flexpatch.internals import decoder_of
from flexpatch.media import Images


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


def measured(model: PreTrainedModel) -> Tower | None:
    """Measure the vision tower of a model, or of a multimodal backbone.

    No weight is read by its name (``layer.weight``): in a forward DeepSpeed's ZeRO-3 takes that for a use. It gathers
    the weight at once, and from then on with the module whose forward it is, in backward too. Ranks must then all
    measure, or none of them, but each asks when one of its own batches needs to know.

    Args:
        model: The model, its weights where they are or on no device.

    Returns:
        Its sizes; ``None`` for a tower that does not cut images into patches of one size.
    """
    vision = getattr(model.config, "vision_config", None)
    if vision is None or getattr(vision, "patch_size", None) is None:
        return None
    text = {id(m) for part in (decoder_of(model), model.get_output_embeddings()) if part for m in part.modules()}
    tower = [m for m in model.modules() if id(m) not in text]
    lists = [m for m in tower if isinstance(m, torch.nn.ModuleList)]
    blocks = list(max(lists, key=lambda each: sum(shape.numel() for shape in _shapes(each)), default=()))
    inside = {id(m) for block in blocks for m in block.modules()}
    linear = [m for m in tower if isinstance(m, torch.nn.Linear)]
    convolutions = [m for m in tower if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    others = [m for m in tower if not isinstance(m, torch.nn.Embedding) and id(m) not in inside]
    size = vision.patch_size
    window, side = getattr(vision, "window_size", 0) or 0, int(size[0] if isinstance(size, (list, tuple)) else size)
    return Tower(
        blocks=sum(m.in_features * m.out_features for m in linear if id(m) in inside),  # quantized weights are shorter
        others=sum(shape.numel() for m in others for shape in _shapes(m, recurse=False) if len(shape) == 2),
        patch=sum(shape.numel() for m in convolutions for shape in _shapes(m, recurse=False) if len(shape) > 2),
        depth=len(blocks),
        width=next((shape.numel() for block in blocks for shape in _shapes(block) if len(shape) == 1), 0),
        side=side,
        frames=getattr(vision, "temporal_patch_size", 1) or 1,
        window=(window // side) ** 2,
        full=len(getattr(vision, "fullatt_block_indexes", None) or blocks),
    )


def _shapes(module: torch.nn.Module, *, recurse: bool = True) -> list[torch.Size]:
    """List the shapes of a module's weights, whole where ZeRO-3 shows empty tensors in their places."""
    return [getattr(parameter, "ds_shape", parameter.shape) for parameter in module.parameters(recurse)]


# FLOPs of the tower for all images of a batch, or for some.
Works = Callable[..., int]


class TowerWorks:
    """Tells the work of a model's vision tower. It is measured once, when a batch with images asks."""

    def __init__(self) -> None:
        self._tower: list[Tower | None] = []

    def of(self, backbone: PreTrainedModel, held: Sequence[Held], images: Images | None) -> Works:
        """Make the function that counts the FLOPs of a batch's images.

        Args:
            backbone: The backbone.
            held: The images on the device.
            images: The images on the host; ``None``: the batch has none.

        Returns:
            A function of indices of images, ``None`` for all: their FLOPs, forward.
        """

        def works(picked: Sequence[int] | None = None) -> int:
            if images is None or not images.units:
                return 0
            self._tower = self._tower or [measured(backbone)]
            tower, total = self._tower[0], 0
            for k in range(len(images.units)) if picked is None else picked:
                each = held[images.kinds[k]]
                name = each.layout.names[0]
                pixels = each.entries[name][slice(*images.units[k].spans[name])]
                total += 0 if tower is None else tower.flops(*tower.patches(pixels), images.units[k].tokens)
            return total

        return works
