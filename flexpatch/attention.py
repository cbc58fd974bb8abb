"""Attention over packed rows: compiled FlexAttention, with soft caps, one dtype and a small set of lengths.

Shapes: B rows, H query heads, G key/value heads, L tokens, P = bucket(L) tokens, D head size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexpatch.devices import tiles
from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.masks import DEEP
from flexpatch.progress import compiling

# Compiled variants one process may hold: buckets x (full, windowed) x (train, no grad) x head shapes. Torch's own
# limit of 8 would switch to unfused O(L^2) attention without a word; with fullgraph=True passing ours is an error.
RECOMPILE_LIMIT = 512
FA4_HEADS = (64, 96, 128)  # sizes of heads on FlashAttention-4


def flex(
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    mask: BlockMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    fa4: bool = False,
    **others: Any,
) -> Tensor:
    """FlexAttention under a row's block mask.

    Args:
        q_BHLD, k_BGLD, v_BGLD: Queries, keys and values; H is a multiple of G. Mixed dtypes, as autocast makes them
            from fp32 parameters, are brought to one.
        mask: A mask from :func:`flexpatch.masks.block_mask`, for P >= L tokens.
        scaling: Factor of the scores; ``None``: 1/sqrt(D).
        softcap: Scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
        dropout: Must be 0.
        s_aux: (H,) attention sinks: a score of each head that takes part in the softmax and has no value (gpt-oss,
            arXiv 2508.10925).
        fa4: Run on FlashAttention-4's kernels instead of Triton's: 16 bits, D of 64, 96 or 128, no soft cap, no
            window, no sinks. Their gradients are not deterministic. Masks of deep rows ask for them where they can.
        others: What else the model passes; nothing of it matters to attention.

    Returns:
        (B, L, H, D), in the dtype of ``v``.

    Raises:
        UnsupportedModelError: For dropout, and for what ``fa4`` does not support.
        FlexpatchError: If the mask is for other rows than these tokens.
    """
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout {dropout} is not exact on shared tokens; set attention_dropout=0.0"
        )
    length, padded = q_BHLD.shape[2], mask.seq_lengths[0]
    # A mask of one row must not serve several: its rule would read the ends of other rows, beyond its own.
    if not length <= padded < 2 * length + 128 or k_BGLD.shape[2] != length or mask.shape[0] != q_BHLD.shape[0]:
        raise FlexpatchError(
            f"the block mask is for {mask.shape[0]} rows of up to {padded} tokens, but attention got queries "
            f"{tuple(q_BHLD.shape)} and keys {tuple(k_BGLD.shape)}: pass use_cache=False and the mask of the same rows"
        )
    dtype = v_BGLD.dtype
    if torch.is_autocast_enabled(q_BHLD.device.type):
        dtype = torch.get_autocast_dtype(q_BHLD.device.type)
    # Only attention is padded to the bucket: the linear layers around it never see a padding token.
    extra = padded - length
    # Contiguous in every case: Dynamo guards on strides, and rows that fill their bucket would compile anew.
    if torch.compiler.is_compiling():
        # Heads first: within a larger graph FlashAttention-4 was handed strides it refuses otherwise (torch 2.11).
        q_BHPD, k_BGPD, v_BGPD = (
            F.pad(x.to(dtype), (0, 0, 0, extra)) if extra else x.to(dtype).contiguous()
            for x in (q_BHLD, k_BGLD, v_BGLD)
        )
    else:
        # Token by token, as linear layers make and take them: a row that fills its bucket is not copied at all.
        tokens_BLHD = (x.transpose(1, 2).to(dtype) for x in (q_BHLD, k_BGLD, v_BGLD))
        padded_BPHD = (F.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x for x in tokens_BLHD)
        # Flattened in between, because dimensions of size 1 may have any stride.
        q_BHPD, k_BGPD, v_BGPD = (x.reshape(-1).view(x.shape).transpose(1, 2) for x in padded_BPHD)
    if fa4:
        check_fa4_model(q_BHPD.shape[-1], softcap)
        if s_aux is not None:
            raise UnsupportedModelError("backend='fa4' gives sinks no gradient: apply with backend='flex'")
    elif getattr(mask, DEEP, False):
        sizes = {q_BHPD.shape[-1], v_BGPD.shape[-1]}
        able = len(sizes) == 1 and sizes <= set(FA4_HEADS) and dtype.itemsize == 2
        fa4 = able and softcap is None and s_aux is None
    _check_device(q_BHPD, k_BGPD, v_BGPD)
    # Constants of a device, a size of heads and a dtype, each of which has a graph of its own anyway.
    kernels: dict[str, Any] = dict(tiles(q_BHPD.device, q_BHPD.shape[-1], v_BGPD.shape[-1], dtype))
    if fa4:
        kernels = {"BACKEND": "FLASH"}
    if torch.compiler.is_compiling():
        out_BHPD = _attend(q_BHPD, k_BGPD, v_BGPD, mask, scaling, softcap, s_aux, kernels)
    else:
        rule = getattr(mask.mask_mod, "__name__", "")  # masks with a window have a graph of their own
        kind = (*q_BHPD.shape, k_BGPD.shape[1], dtype, rule, fa4, softcap, torch.is_grad_enabled())
        with many_recompiles(), compiling("attention", padded, *kind):
            out_BHPD = _compiled()(q_BHPD, k_BGPD, v_BGPD, mask, scaling, softcap, s_aux, kernels)
    return out_BHPD[:, :, :length].transpose(1, 2).contiguous()


def many_recompiles() -> Any:
    """A context in which torch compiles up to ``RECOMPILE_LIMIT`` variants of a function, each in one graph.

    Inside a forward of DDP torch would split each layer's graph by DDP's buckets, so that gradients of a part can be
    averaged while another part is computed. A layer alone is such a part: split, it has fewer fused kernels.
    """
    return torch._dynamo.config.patch(
        recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT, optimize_ddp=False
    )


def _check_device(*tensors: Tensor) -> None:
    """Torch 2.11 to 2.15 cannot train with flex on a CPU, and says so in a trace of many screens."""
    if tensors[0].device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise FlexpatchError(
            "FlexAttention has no backward on the CPU: flexpatch.apply(model, backend='dense'), or 'auto', trains there"
        )


def check_fa4_model(head_dim: int, softcap: float | None) -> None:
    """Refuse heads and soft caps that FlashAttention-4 does not take.

    Args:
        head_dim: Size of a head.
        softcap: Of attention scores; ``None`` without one.

    Raises:
        UnsupportedModelError: Naming the backend that takes them.
    """
    if softcap is not None:
        raise UnsupportedModelError(
            f"this model caps its attention scores (at {softcap}), which backend='fa4' cannot: apply with 'flex'"
        )
    if head_dim not in FA4_HEADS:
        raise UnsupportedModelError(
            f"backend='fa4' takes heads of {', '.join(map(str, FA4_HEADS))}, and this model's have {head_dim}: apply "
            "with backend='flex'"
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    kernels: dict[str, Any],
) -> Tensor:
    """Compute attention; this function is compiled, with options for its kernels.

    Never call it uncompiled with gradients: eager flex with a non-linear score_mod under non-reentrant checkpointing
    gives wrong gradients in silence (torch 2.11 and 2.13).
    """

    def cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    options: dict[str, Any] = dict(
        score_mod=None if softcap is None else cap,
        block_mask=mask,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernels,
    )
    if sinks_H is None:
        return flex_attention(q, k, v, **options)
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
    # exp(lse) / (exp(lse) + exp(sink)): the share of the softmax that its sink leaves. In the precision of lse, which
    # is float32 for 16 bits.
    share = torch.sigmoid(aux.lse - sinks_H.to(aux.lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)


@cache
def _compiled() -> Any:
    """Our own compiled function: its recompile counter is not shared with anyone else's flex_attention."""
    return torch.compile(_attend, fullgraph=True, dynamic=False)
