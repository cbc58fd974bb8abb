"""DBRX: experts, and clamped queries, keys and values."""

from typing import Any

from flexpatch.registry import Adapter, register

TINY = dict(
    d_model=64,
    attn_config=dict(kv_n_heads=2, clip_qkv=1.0, rope_theta=10000.0),
    ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
)


def reject(config: Any) -> str | None:
    """Refuse dropout of attention, which the model keeps in a configuration of its own."""
    if rate := config.attn_config.attn_pdrop:
        return (
            f"attn_config.attn_pdrop={rate} draws one mask for all answers that share a token, which is not what the "
            "unpatched model does. Set config.attn_config.attn_pdrop = 0.0"
        )
    return None


register(Adapter(name="DBRX", masks="single", reject=reject, since="5.24", tiny={"dbrx": [TINY]}))
