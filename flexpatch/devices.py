"""Choose what attention runs on which card: the backend, and tiles with which FlexAttention's kernels fit.

A kernel of FlexAttention keeps tiles of queries, keys and values in a block's shared memory, and dies at its first call
on a card that has less than it needs. Torch chooses tiles by a card's generation, and for some heads too large ones.
``benchmarks/cards.py`` measures what kernels need, without owning the cards; docs/cards.md has the table.
"""

import warnings
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError

KB = 1024
# Shared memory that a thread block may take, by compute capability, where torch does not tell. Other cards of a
# generation have the last one's.
SHARED_KB = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (11, 0): 227, (12, 0): 99}
AMPERE = (8, 0)

Sizes = tuple[int, int]  # of a head's queries and keys, and of its values
Tiles = dict[str, int]  # options of a kernel of FlexAttention

# Kernels round heads up to a power of two. By the KB that cards have, the rounded size and the bytes of a number: the
# options with which forward and backward fit. Torch's own tiles do where there are none. Nothing fits what is missing.
LARGE = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "fwd_num_stages": 2}  # on an H100 others gain 6% of both passes
NARROW = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "fwd_num_warps": 4}
SQUARE = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32}
SQUARE |= {"bwd_num_stages": 2, "bwd_num_warps": 4}
TILES: dict[int, dict[tuple[int, int], Tiles]] = {
    99: {(64, 2): {}, (128, 2): {}, (256, 2): NARROW | SQUARE, (512, 2): LARGE}
    | {(64, 4): {}, (128, 4): NARROW, (256, 4): LARGE},
    163: {(64, 2): {}, (128, 2): {}, (256, 2): NARROW, (512, 2): LARGE}
    | {(64, 4): {}, (128, 4): NARROW, (256, 4): NARROW, (512, 4): LARGE},
    227: {(64, 2): {}, (128, 2): {}, (256, 2): {}, (512, 2): LARGE}
    | {(64, 4): {}, (128, 4): {}, (256, 4): NARROW, (512, 4): LARGE},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_HEAD = 16  # of Triton's matrix products


class Card(NamedTuple):
    """A device, as far as attention depends on it.

    Attributes:
        kind: ``"cuda"``, ``"rocm"``, or the device's type.
        name: As its maker calls it.
        capability: Of NVIDIA's cards; (0, 0) for others.
        shared_kb: Shared memory that a thread block may take, in KB; 0 where it is not known.
        triton: Whether Triton can be imported.
    """

    kind: str
    name: str
    capability: tuple[int, int] = (0, 0)
    shared_kb: int = 0
    triton: bool = True


def card_of(device: torch.device) -> Card:
    """Describe a device. The driver is asked once."""
    if device.type != "cuda":
        return Card(device.type, device.type)
    return _cuda_card(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # Its "capability" counts AMD's generations: (9, 4) is an MI300, and no Hopper.
        return Card("rocm", properties.name, triton=_has_triton())
    capability = torch.cuda.get_device_capability(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) // KB
    return Card("cuda", properties.name, capability, shared or _known_kb(capability), _has_triton())


def _known_kb(capability: tuple[int, int]) -> int:
    """Shared memory of a capability, or of the latest one known before it."""
    return SHARED_KB[max((known for known in SHARED_KB if known <= capability), default=min(SHARED_KB))]


def _has_triton() -> bool:
    """Whether Triton imports: torch for Windows comes without, and a broken one is as good as none."""
    try:
        import_module("triton")
    except Exception:
        return False
    return True


def heads_of(decoder: nn.Module) -> frozenset[Sizes]:
    """Sizes of the heads of all attention layers in a decoder, which has its configuration in ``config``.

    Layers may differ (Gemma 4), and so may keys and values (DeepSeek). Read from the layers' modules, since only they
    know what became of the configuration; a model whose layers do not tell has the configuration's size.
    """
    # Kept beside the model: within, copies and pickles would carry it.
    if decoder not in _heads:
        found = {sizes for module in decoder.modules() if (sizes := _heads_of_layer(module)) is not None}
        if not found:
            config: Any = decoder.config
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            found = {(size, size)}
        _heads[decoder] = frozenset(found)
    return _heads[decoder]


_heads: WeakKeyDictionary[nn.Module, frozenset[Sizes]] = WeakKeyDictionary()


def _heads_of_layer(module: nn.Module) -> Sizes | None:
    if not hasattr(module, "layer_idx"):
        return None
    told = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
    size = next((each for each in told if isinstance(each, int)), None)
    values = getattr(module, "v_head_dim", None)
    return None if size is None else (size, values if isinstance(values, int) else size)


class Choice(NamedTuple):
    """The backend of a model's rows, and a warning for its user; ``None`` if there is nothing to say."""

    backend: str
    warning: str | None = None


def choose(asked: str, device: torch.device, sizes: frozenset[Sizes], dtype: torch.dtype) -> Choice:
    """The backend of a model's rows. Gradients do not matter: a reference without them must take a policy's kernels.

    Args:
        asked: ``"auto"``, ``"flex"``, ``"fa4"`` or ``"dense"``.
        device: Where the model is. One that is still on the CPU is asked for again at its calls.
        sizes: Of its heads, from :func:`heads_of`.
        dtype: In which attention computes.

    Raises:
        UnsupportedModelError: If ``"flex"`` was asked for, and its kernels would not compile or not fit.
        FlexpatchError: If ``"fa4"`` was asked for on a GPU that is no Hopper.
    """
    if device.type != "cuda":
        return Choice(("flex" if device.type == "xpu" else "dense") if asked == "auto" else asked)
    return _choose(asked, card_of(device), sizes, dtype)


@cache
def _choose(asked: str, card: Card, sizes: frozenset[Sizes], dtype: torch.dtype) -> Choice:
    if asked == "fa4":
        check_hopper(card)
    if asked in ("fa4", "dense"):
        return Choice(asked)
    reason = obstacle(card, sizes, dtype)
    if asked == "flex":
        if reason is not None:
            raise UnsupportedModelError(
                f"backend='flex' cannot run on this {card.name}: {reason}. backend='auto' takes 'dense' here, which is "
                "exact, but computes all L x L scores of a row"
            )
        return Choice("flex", UNTESTED.format(card.name) if card.kind == "rocm" else None)
    if card.kind == "rocm" and reason is None:
        reason = "FlexAttention's kernels were never tested on AMD GPUs; backend='flex' takes them all the same"
    return Choice("flex") if reason is None else Choice("dense", DENSE.format(card.name, reason))


DENSE = (
    "flexpatch: rows run on the dense backend on this {}: {}. Results are the same. Linear layers compute shared "
    "tokens once, but attention computes all L x L scores of a row, which takes time and memory: keep rows short"
)
UNTESTED = (
    "flexpatch: FlexAttention's kernels were never tested on AMD GPUs such as this {}: run "
    "flexpatch.check_parity(model), which looks at gradients too, before you trust results"
)


def obstacle(card: Card, sizes: frozenset[Sizes], dtype: torch.dtype) -> str | None:
    """Why FlexAttention's kernels would not run on a card; ``None`` if they would."""
    if not card.triton:
        return "its kernels need Triton, which does not import here (pip install triton; on Windows triton-windows)"
    if card.kind != "cuda":
        return None
    if card.capability < AMPERE:
        generation = ".".join(map(str, card.capability))
        return f"Triton supports compute capability 8.0 (Ampere) or later, and this card has {generation}"
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(map(str, DTYPES))}, and this model computes in {dtype}"
    for size in sorted(sizes):
        heads = str(size[0]) if size[0] == size[1] else f"{size[0]} (values: {size[1]})"
        if min(size) < SMALLEST_HEAD:
            return f"its kernels need heads of {SMALLEST_HEAD} or more, and this model's have {heads}"
        if fitting(card.shared_kb, size, dtype) is None:
            return (
                f"its kernels for heads of {heads} in {dtype} do not fit into this card's {card.shared_kb} KB of "
                "shared memory"
            )
    return None


def tell(choice: Choice, again: bool = False) -> str:
    """Warn of a choice, once in a process or, if ``again``, once more; returns its backend."""
    if choice.warning is not None and (again or choice.warning not in _told):
        _told.add(choice.warning)
        warnings.warn(choice.warning, FlexpatchWarning, 3)
    return choice.backend


_told: set[str] = set()


def check_hopper(card: Card) -> None:
    """Raises:
    FlexpatchError: If FlashAttention-4 was not tested on a card.
    """
    if card.kind != "cuda" or card.capability[0] != 9:
        raise FlexpatchError(f"backend='fa4' runs on Hopper GPUs, not on {card.name}: apply with backend='auto'")


@torch.compiler.assume_constant_result
def tiles(device: torch.device, size: int, value_size: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Options with which FlexAttention's kernels fit a device, as pairs; none where torch's own do.

    Compiled layers take the result for a constant of their graph, which has one device and one size of heads.
    """
    card = card_of(device)
    kb = card.shared_kb if card.kind == "cuda" else max(TILES)
    found = fitting(kb, (size, value_size), dtype)
    return tuple((found or {}).items())


def fitting(shared_kb: int, sizes: Sizes, dtype: torch.dtype) -> Tiles | None:
    """Options with which kernels fit into so much shared memory; ``None`` if nothing does."""
    known = [kb for kb in TILES if kb <= shared_kb]
    if not known:
        return None
    # Kernels round heads up to a power of two.
    rounded = 1 << (max(*sizes, SMALLEST_HEAD) - 1).bit_length()
    return TILES[max(known)].get((max(rounded, 64), dtype.itemsize))
