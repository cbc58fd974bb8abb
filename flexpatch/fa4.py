"""Choose FlashAttention-4's kernels for rows that they are faster for, and refuse calls that they cannot run.

They are faster where most blocks of a mask are full: rows of long sequences. ``backend="auto"`` takes them there if
they are installed and right on this machine. A row's kernel depends on its lengths and on settings of the process,
never on gradients: so policy and reference run the same one. Both kernels are exact; results differ in last bits.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module, metadata

import torch
from packaging.version import Version
from torch import Tensor

from flexpatch.attention import FA4_HEADS, flex
from flexpatch.devices import Card, Sizes, card_of, check_hopper
from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.masks import block_mask, dense_mask
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree

# FlashAttention-4 for FlexAttention: gradients of older ones were wrong in silence, at times or for some head sizes.
OLDEST = "4.0.0b33"
# Keys that a token of a row sees on average, from which on it saves about a fiftieth of a 7B model's step over Triton's
# kernels: less at 726 (1.1%), more at 1,451 (2.9%; an H200, benchmarks/results/kernel_options.md).
DEEP_KEYS = 1000
LARGEST_ERROR = 0.02  # of a right kernel in 16 bits; a wrong one is off by far more


@cache
def check_fa4() -> None:
    """Look for FlashAttention-4.

    Raises:
        FlexpatchError: If it is not installed, or too old.
    """
    try:
        import_module("flash_attn.cute")
        found = metadata.version("flash-attn-4")
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or its libraries do not load
        raise FlexpatchError(
            f"backend='fa4' needs FlashAttention-4 (pip install 'flexpatch[fa4]'), which does not import here: "
            f"{error}. backend='auto' needs nothing"
        ) from None
    if Version(found) < Version(OLDEST):
        raise FlexpatchError(f"flash-attn-4 {found} has given wrong gradients; backend='fa4' needs {OLDEST} or later")


def check_fa4_call(device: torch.device, dtype: torch.dtype, windows: Iterable[int | None], depth: int) -> None:
    """Refuse a call that FlashAttention-4 cannot run: before it, because errors in compiled layers have no words.

    Args:
        device, dtype: Of the queries.
        windows: Of the layers.
        depth: Tokens of the longest sequence.

    Raises:
        FlexpatchError: For devices other than Hopper GPUs, on which it was tested, and deterministic algorithms.
        UnsupportedModelError: For 32 bits, or sequences that reach beyond a window: under such masks it failed its
            tests (4.0.0b36, torch 2.11).
    """
    check_hopper(card_of(device))
    if dtype.itemsize != 2:
        raise UnsupportedModelError(
            f"backend='fa4' computes in 16 bits, and this model in {dtype}: load it in torch.bfloat16, or apply with "
            "backend='flex'"
        )
    reached = [window for window in windows if window is not None and window < depth]
    if reached:
        raise UnsupportedModelError(
            f"sequences of {depth} tokens reach beyond this model's window of {min(reached)}, for which backend='fa4' "
            "is not exact: apply with backend='flex'"
        )
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and torch.is_grad_enabled():
        raise FlexpatchError(
            "backend='fa4' sums gradients in no fixed order, and deterministic algorithms were asked for: apply with "
            "backend='flex'"
        )


def takes(rows: Rows, device: torch.device, dtype: torch.dtype, sizes: frozenset[Sizes]) -> bool:
    """Tell whether ``backend="auto"`` runs a row on FlashAttention-4's kernels, in layers without a reached window.

    Args:
        rows: The row.
        device: Its device.
        dtype: Dtype in which attention computes.
        sizes: Sizes of the model's heads, from :func:`flexpatch.devices.heads_of`.

    Returns:
        Whether it does: deep rows on Hopper GPUs in 16 bits, where the kernels are installed and right, unless
        deterministic algorithms were asked for.
    """
    if rows.visible < DEEP_KEYS * rows.tokens or dtype.itemsize != 2 or device.type != "cuda":
        return False
    usable = sorted(size for size, values in sizes if size == values and size in FA4_HEADS)
    if not usable or torch.are_deterministic_algorithms_enabled() or not _installed(card_of(device)):
        return False
    return all(_is_right(device, size, dtype) for size in usable)


@cache
def _installed(card: Card) -> bool:
    try:
        check_hopper(card)
        check_fa4()
    except FlexpatchError:
        return False
    return True


@cache
def _is_right(device: torch.device, size: int, dtype: torch.dtype) -> bool:
    """Compare output and gradients with a softmax in float32, once a process: these kernels are young."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            error = _error(device, size, dtype)
        reason = None if error <= LARGEST_ERROR else f"results are off by {error:.2g} of their norm"
    except Exception as raised:  # another release's compiler or driver may raise anything
        reason = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
    if reason is not None:
        warnings.warn(
            f"flexpatch: FlashAttention-4 is installed, but does not work here ({reason}): long rows run on Triton's "
            "kernels. Results are the same; backend='flex' chooses them without this warning",
            FlexpatchWarning,
            3,
        )
    return reason is None


def _error(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Return the largest relative error, by norm, of attention over a small row and of its gradients."""
    rows = build_rows([[Tree.of([1] * 300, [2] * 150, [3] * 70), Tree.of([1] * 20, [2] * 90, [3] * 140)]]).to(device)
    length = rows.input_ids.shape[1]
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = (
        torch.randn(1, heads, length, size, device=device, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    )

    def with_gradients(attend: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        qkv = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, gradient.to(wide).transpose(1, 2))]

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        hidden = ~dense_mask(rows.ends, rows.position_ids, None)
        return ((q @ k.mT * size**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    mask = block_mask(rows.ends, rows.position_ids, None)
    found = with_gradients(lambda q, k, v: flex(q, k, v, mask, fa4=True), dtype)
    true = with_gradients(softmax, torch.float32)
    errors = [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, true, strict=True)]
    return max(float("inf") if error != error else error for error in errors)
