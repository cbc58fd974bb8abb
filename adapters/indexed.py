"""DeepSeek V3.2 and V4, GLM-5 and GLM-5.3: an indexer chooses the keys that a query attends to, or compresses them."""

from typing import Any

from flexpatch.registry import CONVOLUTION, DELTA_RULE, Adapter, Visible, causal, no_mask, register
from flexpatch.tiny import EXPERTS, LATENT

INDEXED = "indexed_attention"
LINEAR = "linear_attention"
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse", "sparse"]
# Few keys are chosen, so that the choice shows. With few heads their scores often tie.
INDEXER = dict(index_topk=6, index_n_heads=16, index_head_dim=16)
TINY = LATENT | EXPERTS | INDEXER | dict(qk_nope_head_dim=16, mlp_layer_types=DENSE_THEN_SPARSE)
SHARED = dict(TINY, indexer_types=["full", "shared", "full", "shared"])

register(
    Adapter(
        name="DeepSeek V3.2, GLM-5, A.X K2",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(INDEXED,),
        unshared=dict.fromkeys(("DeepseekV32Attention", "GlmMoeDsaAttention", "AXK2Attention"), causal),
        padding="masked",
        since="5.24",
        tiny={"deepseek_v32": [TINY], "glm_moe_dsa": [TINY, SHARED], "axk2": [dict(TINY, head_dim=8)]},
    )
)

COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")
V4 = dict(
    num_key_value_heads=1,
    q_lora_rank=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    sliding_window=8,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=2,
    hc_mult=2,
    hc_sinkhorn_iters=3,
    layer_types=["sliding_attention", *COMPRESSED, COMPRESSED[0]],
    compress_rates=dict(zip(COMPRESSED, (2, 4), strict=True)),
    mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
)


def window(module: Any) -> Visible:
    """Every layer has the window; keys beyond it are compressed."""
    return Visible(window=module.sliding_window)


register(
    Adapter(
        name="DeepSeek V4",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=("sliding_attention", *COMPRESSED),
        unshared={"DeepseekV4Attention": window},
        implementations=("eager",),
        restarts=False,
        begins="column",
        since="5.16",
        tiny={"deepseek_v4": [V4]},
        limits="attn_implementation='eager' for ordinary calls; batches padded on the left run as they are given",
    )
)

GLM5 = TINY | dict(
    qk_rope_head_dim=0,
    head_dim=0,
    layer_types=[LINEAR, INDEXED, INDEXED, LINEAR],
    indexer_types=["full", "full", "shared", "shared"],
    linear_head_dim=16,
    linear_num_heads=4,
    hc_mult=2,
    hc_sinkhorn_iters=3,
    index_kpool=2,
)
VISION = dict(
    hidden_size=32, intermediate_size=32, depth=1, num_heads=2, image_size=28, patch_size=14, out_hidden_size=64,
    projection_intermediate_size=32,
)  # fmt: skip


def flat(module: Any) -> Visible:
    """The indexer makes the mask of queries and keys."""
    return Visible(flat=True)


register(
    Adapter(
        name="GLM-5.3",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(INDEXED, LINEAR),
        unshared={"Glm5NextTextAttention": flat, "Glm5NextTextLinearAttention": no_mask},
        branched={"Glm5NextTextLinearAttention": (CONVOLUTION, DELTA_RULE)},
        restarts=False,
        since="5.24",
        tiny={
            "glm5_next": [dict(text_config=GLM5, vision_config=VISION)],
            "glm5_next_text": [dict(model_type="glm5_next", text_config=GLM5, vision_config=VISION)],
        },
        limits="calls with images run as they are given",
    )
)
