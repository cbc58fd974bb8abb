"""MiniMax M3: an indexer chooses the blocks of keys that a query attends to."""

from flexpatch.registry import FULL, Adapter, causal, register

SPARSE = "minimax_m3_sparse"
TINY = dict(
    layer_types=[FULL, SPARSE, SPARSE, SPARSE],
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    num_local_experts=4,
    num_experts_per_tok=2,
    dense_intermediate_size=96,
    shared_intermediate_size=32,
    index_n_heads=2,
    index_head_dim=16,
    # Small blocks, and few of them, so that the choice shows.
    index_block_size=4,
    index_topk_blocks=3,
    # The block of a query is chosen by its position, and a wrong one is an error, not a number.
    index_local_blocks=0,
)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
MEDIA = dict(vision_config=VISION, projector_hidden_size=64, image_token_index=149, video_token_index=148)

register(
    Adapter(
        name="MiniMax M3",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(FULL, SPARSE),
        unshared={"MiniMaxM3VLAttention": causal},
        restarts=False,
        begins="column",
        since="5.24",
        tiny={"minimax_m3_vl_text": [TINY], "minimax_m3_vl": [dict(text_config=TINY, **MEDIA)]},
        limits="batches padded on the left, and calls with images, run as they are given",
    )
)
