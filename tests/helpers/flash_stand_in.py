"""Stand in for FlashAttention on a CPU: its way with padding, windows and padding-free rows, in plain torch.

transformers takes every attention implementation with "flash" in its name for FlashAttention, and prepares its masks.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from flexpatch.models import tiny_model

NAME = "flash_stand_in"


def flash_model(model_type: str, variant: int = 0) -> PreTrainedModel:
    """Make a tiny model as if it had been loaded with FlashAttention."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model = tiny_model(model_type, variant)
    model.config._attn_implementation = NAME
    return model


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend within each sequence, token by token without its padding; padding gets zeros."""
    assert module.config._attn_implementation == NAME, "kernels are looked up by the original's name"
    B, H, Q, _ = q.shape
    L = k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    out = q.new_zeros(B, Q, H, v.shape[-1])
    for b in range(B):
        tokens = torch.arange(L) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
        bounds = _bounds(tokens, attention_mask, B, kwargs)
        for start, stop in pairwise(bounds):
            keys = tokens[start:stop]
            queries = keys[keys >= L - Q]  # with a cache there are fewer
            distance = torch.searchsorted(keys, queries)[:, None] - torch.arange(len(keys))
            visible = distance >= 0
            if kwargs.get("sliding_window"):
                visible &= distance < kwargs["sliding_window"]
            found = F.scaled_dot_product_attention(
                q[b, :, queries - (L - Q)], k[b, :, keys], v[b, :, keys], visible, scale=kwargs.get("scaling")
            )
            out[b, queries - (L - Q)] = found.transpose(0, 1)
    return out, None


def _bounds(tokens: Tensor, mask: Tensor | None, rows: int, kwargs: dict[str, Any]) -> list[int]:
    """Where sequences begin and end, as transformers tells FlashAttention."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    positions = kwargs.get("position_ids")
    if all(kwargs.get(name) is not None for name in names):
        return kwargs["cu_seq_lens_q"].tolist()
    if mask is None and rows == 1 and positions is not None and positions.shape[1] == len(tokens):
        least = positions.min()
        if (positions[0] - least != torch.arange(len(tokens))).any():
            return [*(positions[0] == least).nonzero()[:, 0].tolist(), len(tokens)]
    return [0, len(tokens)]
