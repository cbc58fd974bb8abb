"""Choose the attention backend of a card, and tiles with which FlexAttention's kernels fit the card.

A kernel of FlexAttention keeps tiles of queries, keys and values in a block's shared memory. On a card with less shared
memory than it needs, the kernel fails at its first call. Torch chooses tiles by a card's generation, and some of these
tiles are too large. ``benchmarks/cards.py`` measures the needs of kernels without the cards; docs/cards.md has the
table.
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
# Shared memory that a thread block may take, in KB, by compute capability, for releases of torch that do not tell. A
# capability that is not listed has the memory of the one before it.
SHARED_KB = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (11, 0): 227, (12, 0): 99}
AMPERE = (8, 0)

Sizes = tuple[int, int]  # width of a head's queries and keys, and of its values
Tiles = dict[str, int]  # options of a kernel of FlexAttention

# Options with which forward and backward kernels fit: by shared memory in KB, then by (head size rounded up to a power
# of two, bytes of a number). An empty entry keeps torch's own tiles. No tiles fit if an entry is missing.
LARGE = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "fwd_num_stages": 2}  # on an H100 other tiles gain 6% of both passes
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
SMALLEST_HEAD = 16  # smallest side of Triton's matrix products


class Card(NamedTuple):
    """Properties of a device that attention depends on.

    Attributes:
        kind: ``"cuda"``, ``"rocm"``, or the device's type.
        name: Product name of the card.
        capability: Compute capability of NVIDIA's cards; (0, 0) for others.
        shared_kb: Shared memory that a thread block may take, in KB; 0 if unknown.
        triton: ``True`` if Triton can be imported.
    """

    kind: str
    name: str
    capability: tuple[int, int] = (0, 0)
    shared_kb: int = 0
    triton: bool = True


def card_of(device: torch.device) -> Card:
    """Describe a device. The driver is asked once a device."""
    if device.type != "cuda":
        return Card(device.type, device.type)
    return _cuda_card(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # AMD's "capability" counts its own generations: (9, 4) is an MI300, not a Hopper.
        return Card("rocm", properties.name, triton=_has_triton())
    capability = torch.cuda.get_device_capability(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) // KB
    return Card("cuda", properties.name, capability, shared or _known_kb(capability), _has_triton())


def _known_kb(capability: tuple[int, int]) -> int:
    """Look up the shared memory of a capability, or of the latest known capability before it, in KB."""
    return SHARED_KB[max((known for known in SHARED_KB if known <= capability), default=min(SHARED_KB))]


def _has_triton() -> bool:
    """Return whether Triton can be imported. Torch for Windows lacks it, and a broken Triton is of no use."""
    try:
        import_module("triton")
    except Exception:
        return False
    return True


def heads_of(decoder: nn.Module) -> frozenset[Sizes]:
    """Read the head sizes of all attention layers of a decoder.

    Layers may differ (Gemma 4), and so may keys and values (DeepSeek). The layers' modules tell their sizes, because
    modeling code may change the configuration's. If no module tells, the configuration does, unless it has no heads.

    Args:
        decoder: A decoder of transformers, with its configuration in ``config``.

    Returns:
        Pairs of the width of queries and keys, and the width of values.
    """
    # A dict beside the model, because copies and pickles would carry an attribute along.
    if decoder not in _heads:
        found = {sizes for module in decoder.modules() if (sizes := _heads_of_layer(module)) is not None}
        config: Any = decoder.config
        if not found and getattr(config, "num_attention_heads", None):
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
    """Backend of a model's rows, and a warning for the user, or ``None``."""

    backend: str
    warning: str | None = None


def choose(asked: str, device: torch.device, sizes: frozenset[Sizes], dtype: torch.dtype) -> Choice:
    """Choose the backend of a model's rows.

    The choice ignores gradients, so that a reference without gradients runs the policy's kernels.

    Args:
        asked: ``"auto"``, ``"flex"``, ``"fa4"`` or ``"dense"``.
        device: Device of the model. A model that is still on the CPU is chosen for again at its calls.
        sizes: Sizes of its heads, from :func:`heads_of`.
        dtype: Dtype in which attention computes.

    Returns:
        The backend, ``"flex"``, ``"fa4"`` or ``"dense"``, and a warning for the user if there is one.

    Raises:
        UnsupportedModelError: If ``"flex"`` was asked for, and its kernels would not compile or not fit.
        FlexpatchError: If ``"fa4"`` was asked for on a GPU that is not a Hopper.
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
                f"backend='flex' cannot run on this {card.name}: {reason}. backend='auto' uses 'dense' here, which is "
                "exact, but computes all L x L scores of a row"
            )
        return Choice("flex", UNTESTED.format(card.name) if card.kind == "rocm" else None)
    if card.kind == "rocm" and reason is None:
        reason = "FlexAttention's kernels were never tested on AMD GPUs; backend='flex' uses them all the same"
    return Choice("flex") if reason is None else Choice("dense", DENSE.format(card.name, reason))


DENSE = (
    "flexpatch: rows run on the dense backend on this {}: {}. Results are the same. Linear layers compute shared "
    "tokens once, but attention computes all L x L scores of a row, which takes time and memory: keep rows short"
)
UNTESTED = (
    "flexpatch: FlexAttention's kernels were never tested on AMD GPUs such as this {}: run "
    "flexpatch.check_parity(model), which checks gradients too, before you trust results"
)


def obstacle(card: Card, sizes: frozenset[Sizes], dtype: torch.dtype) -> str | None:
    """Find the reason why FlexAttention's kernels cannot run on a card.

    Args:
        card: The card.
        sizes: Sizes of the model's heads, from :func:`heads_of`.
        dtype: Dtype in which attention computes.

    Returns:
        The reason, as the end of an error message; ``None`` if the kernels run.
    """
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
    """Warn the user of a choice, once a process.

    Args:
        choice: The choice.
        again: Warn even if the warning was given before.

    Returns:
        The backend that was chosen.
    """
    if choice.warning is not None and (again or choice.warning not in _told):
        _told.add(choice.warning)
        warnings.warn(choice.warning, FlexpatchWarning, 3)
    return choice.backend


_told: set[str] = set()


def check_hopper(card: Card) -> None:
    """Refuse a card on which FlashAttention-4 was not tested.

    Raises:
        FlexpatchError: For all cards but Hopper's.
    """
    if card.kind != "cuda" or card.capability[0] != 9:
        raise FlexpatchError(f"backend='fa4' runs on Hopper GPUs, not on {card.name}: apply with backend='auto'")


@torch.compiler.assume_constant_result
def tiles(device: torch.device, size: int, value_size: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Look up options with which FlexAttention's kernels fit a device.

    Compiled layers treat the result as a constant of their graph, because a graph has one device and one head size.

    Args:
        device: Device of the rows.
        size: Width of a head's queries and keys.
        value_size: Width of a head's values.
        dtype: Dtype of queries, keys and values.

    Returns:
        Pairs of a kernel option and its value; empty if torch's own tiles fit.
    """
    card = card_of(device)
    kb = card.shared_kb if card.kind == "cuda" else max(TILES)
    found = fitting(kb, (size, value_size), dtype)
    return tuple((found or {}).items())


def fitting(shared_kb: int, sizes: Sizes, dtype: torch.dtype) -> Tiles | None:
    """Look up options with which kernels fit into a block's shared memory.

    Args:
        shared_kb: Shared memory that a thread block may take, in KB.
        sizes: Width of a head's queries and keys, and of its values.
        dtype: Dtype of queries, keys and values.

    Returns:
        Kernel options, empty if torch's own tiles fit; ``None`` if no tiles fit.
    """
    known = [kb for kb in TILES if kb <= shared_kb]
    if not known:
        return None
    # Kernels round heads up to a power of two.
    rounded = 1 << (max(*sizes, SMALLEST_HEAD) - 1).bit_length()
    return TILES[max(known)].get((max(rounded, 64), dtype.itemsize))
