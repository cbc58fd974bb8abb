"""Random images of each layout, and calls that hold them: what tests and the verifier look at.

Shapes: N sequences, S columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexpatch.layouts import Drawn, Layout, Media, Nested


def _noise(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _around(config: Any, tokens: list[int]) -> list[int]:
    """Put the tokens that mark an image's beginning and end around it, where a configuration names them."""
    names = (("vision_start_token_id", "vision_end_token_id"), ("boi_token_index", "eoi_token_index"))
    for first, last in (*names, ("image_start_token_id", "image_end_token_id"), ("boi_token_id", "eoi_token_id")):
        if getattr(config, first, None) is not None and getattr(config, last, None) is not None:
            return [getattr(config, first), *tokens, getattr(config, last)]
    return tokens


def qwen_patch(config: Any) -> tuple[int, ...]:
    """Return the shape of a patch of Qwen-VL's towers: all its numbers in a line."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    return (channels * vision.temporal_patch_size * vision.patch_size**2,)


def qwen_merge(config: Any) -> int:
    """Return how many patches along each side make a token of Qwen-VL."""
    return int(config.vision_config.spatial_merge_size)


def draw_grid(
    patch: Callable[[Any], tuple[int, ...]] = qwen_patch, merge: Callable[[Any], int] = qwen_merge
) -> Callable[[Any, int, torch.Generator], Drawn]:
    """Make the function that draws patches in a grid of one of three shapes.

    Args:
        patch: ``config`` -> shape of a patch.
        merge: ``config`` -> patches along each side of what one placeholder stands for.

    Returns:
        A function as in :class:`flexpatch.layouts.Media`.
    """

    def draw(config: Any, number: int, generator: torch.Generator) -> Drawn:
        h, w = ((2, 3), (3, 2), (2, 2))[number % 3]
        grid = torch.tensor([[1, h * merge(config), w * merge(config)]])
        pixels = _noise(int(grid.prod()), *patch(config), generator=generator)
        tokens = _around(config, [config.image_token_id] * (h * w))
        return Drawn(dict(pixel_values=pixels, image_grid_thw=grid), tokens)

    return draw


def draw_square(
    tokens: Callable[[Any], int], tiles: Sequence[int] = (1,), side: int | None = None
) -> Callable[[Any, int, torch.Generator], Drawn]:
    """Make the function that draws images of the one size that a tower takes.

    Args:
        tokens: ``config`` -> placeholders of an image, or of a tile.
        tiles: How many make an image, by turns.
        side: Pixels along a side; ``None``: as the configuration says.

    Returns:
        A function as in :class:`flexpatch.layouts.Media`.
    """

    def draw(config: Any, number: int, generator: torch.Generator) -> Drawn:
        sides = config.vision_config.image_size if side is None else side
        height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
        count = tiles[number % len(tiles)]
        pixels = _noise(count, 3, height, width, generator=generator)
        return Drawn(dict(pixel_values=pixels), _around(config, [config.image_token_id] * count * tokens(config)))

    return draw


def draw_sized(unit: Callable[[Any], int]) -> Callable[[Any, int, torch.Generator], Drawn]:
    """Make the function that draws images of three sizes, told by ``image_sizes``, with a token between their lines.

    Args:
        unit: ``config`` -> pixels along the side of what one placeholder stands for.

    Returns:
        A function as in :class:`flexpatch.layouts.Media`.
    """

    def draw(config: Any, number: int, generator: torch.Generator) -> Drawn:
        h, w = ((2, 3), (3, 2), (2, 2))[number % 3]
        size = torch.tensor([[h * unit(config), w * unit(config)]])
        pixels = _noise(1, 3, *size[0].tolist(), generator=generator)
        line = [config.image_token_id] * w
        return Drawn(dict(pixel_values=pixels, image_sizes=size), [*line, *([5, *line] * (h - 1)), 6])

    return draw


def draw_positioned(pool: Callable[[Any], int]) -> Callable[[Any, int, torch.Generator], Drawn]:
    """Make the function that draws patches with their positions, filled up to one number with padding.

    Args:
        pool: ``config`` -> patches along each side of what one placeholder stands for.

    Returns:
        A function as in :class:`flexpatch.layouts.Media`.
    """

    def draw(config: Any, number: int, generator: torch.Generator) -> Drawn:
        h, w = ((2, 2), (1, 3), (3, 1))[number % 3]
        side, vision = pool(config), config.vision_config
        across = torch.cartesian_prod(torch.arange(h * side), torch.arange(w * side)).flip(-1)
        positions = torch.full((1, 4 * side**2, 2), -1)
        positions[0, : len(across)] = across
        width = 3 * (vision.patch_size * (vision.pooling_kernel_size if side == 1 else 1)) ** 2
        pixels = _noise(1, positions.shape[1], width, generator=generator)
        pixels[:, len(across) :] = 0
        ids = _around(config, [config.image_token_id] * (h * w))
        return Drawn(dict(pixel_values=pixels, image_position_ids=positions), ids)

    return draw


def draw_tiled(
    tiles: Callable[[Any, Any], int], tokens: Callable[[Any, Any], int]
) -> Callable[[Any, int, torch.Generator], Drawn]:
    """Make the function that draws images of three sizes, cut into tiles of one size behind the whole image.

    Args:
        tiles: ``config``, (height, width) -> tiles of an image, the whole among them.
        tokens: ``config``, (height, width) -> placeholders of an image.

    Returns:
        A function as in :class:`flexpatch.layouts.Media`.
    """

    def draw(config: Any, number: int, generator: torch.Generator) -> Drawn:
        side = config.vision_config.image_size
        size = ((side, 2 * side), (2 * side, side), (2 * side - 7, side + 5))[number % 3]
        pixels = _noise(1, tiles(config, size), 3, side, side, generator=generator)
        ids = [config.image_token_id] * tokens(config, size)
        return Drawn(dict(pixel_values=pixels, image_sizes=torch.tensor([size])), ids)

    return draw


def together(layout: Layout, images: Sequence[Sequence[Drawn]]) -> dict[str, Tensor]:
    """Put the images of sequences into the tensors of one call.

    Args:
        layout: How calls hold them.
        images: Of each sequence.

    Returns:
        The tensors by name; none without images.
    """
    found: dict[str, Tensor] = {}
    for name in layout.names:
        parts = [[image.tensors[name] for image in each if name in image.tensors] for each in images]
        flat = [tensor for each in parts for tensor in each]
        if not flat:
            continue
        sides = [max(tensor.shape[d] for tensor in flat) for d in range(1, flat[0].ndim)]
        parts = [[_filled(tensor, sides) for tensor in each] for each in parts]
        if isinstance(layout, Nested):
            most = max(sum(map(len, each)) for each in parts)
            rows = [torch.cat(each) if each else flat[0].new_zeros(0, *sides) for each in parts]
            found[name] = torch.stack([_filled(row[None], [most, *sides])[0] for row in rows])
        else:
            found[name] = torch.cat([tensor for each in parts for tensor in each])
    return found


def _filled(tensor: Tensor, sides: Sequence[int]) -> Tensor:
    """Fill entries up with zeros to the given sides."""
    room = [side - have for side, have in zip(sides, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [x for each in room[::-1] for x in (0, each)])


def call_with_images(
    record: Media,
    config: Any,
    sequences: Sequence[Sequence[int]],
    images: Sequence[Sequence[Drawn]],
    answers: Sequence[int],
    *,
    left: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Make the call of a batch of sequences with images, as a processor and a collator make it.

    Args:
        record, config: Of the multimodal class.
        sequences: Token ids of each, with the tokens of its images.
        images: Of each sequence, in order.
        answers: Tokens of each sequence's answer, at its end.
        left: Pad on the left.
        dtype: Of pixels.

    Returns:
        Arguments of the model: ``input_ids`` and ``attention_mask`` (N, S), and what the record names.
    """
    S = max(map(len, sequences))
    ids = torch.full((len(sequences), S), getattr(config.get_text_config(), "pad_token_id", None) or 0)
    mask = torch.zeros_like(ids)
    for row, seen, sequence in zip(ids, mask, sequences, strict=True):
        at = slice(S - len(sequence), S) if left else slice(len(sequence))
        row[at], seen[at] = torch.tensor(sequence), 1
    call: dict[str, Any] = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    types = torch.zeros_like(ids)
    for kind, layout in enumerate(record.layouts(), 1):
        tensors = together(layout, images)
        call |= {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        types[(ids == getattr(config, layout.token, -1)) & (types == 0)] = kind
    if record.text_blocks:  # types tell answers from prompts
        types[:] = 0
        for row, sequence, answer in zip(types, sequences, answers, strict=True):
            stop = S if left else len(sequence)
            row[stop - answer : stop] = 1
    if record.types is not None:
        call[record.types] = types
    return call
