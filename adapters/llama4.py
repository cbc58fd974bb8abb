"""Llama 4: attention in chunks by position, and layers without rope that scale a query by its index in the sequence."""

from typing import Any

from flexpatch.registry import FULL, Adapter, Visible, register

CHUNKED = "chunked_attention"
TINY = dict(
    intermediate_size_mlp=96,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    attention_chunk_size=8,
    no_rope_layers=[1, 1, 1, 0],
    # Queries are scaled from this index on. The default of 8,192 would hide wrong indices.
    floor_scale=4,
    attn_scale=0.7,
)


def visible(module: Any) -> Visible:
    """Layers with rope see a chunk, others the whole past."""
    return Visible(chunk=module.config.attention_chunk_size if module.use_rope else None)


register(
    Adapter(
        name="Llama 4",
        masks="by_layer_type",
        unmasked=(FULL, CHUNKED),
        unshared={"Llama4TextAttention": visible},
        restarts=False,
        begins="column",
        since="5.16",
        tiny={"llama4_text": [TINY, dict(TINY, use_qk_norm=False, attn_temperature_tuning=False)]},
        limits="batches padded on the left run as they are given",
    )
)
