"""MiniMax M3 (text): an indexer chooses the blocks of keys that a query attends to."""

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

register(
    Adapter(
        name="MiniMax M3 (text)",
        masks="by_layer_type",
        windows=lambda config: {},
        unmasked=(FULL, SPARSE),
        unshared={"MiniMaxM3VLAttention": causal},
        restarts=False,
        begins="column",
        since="5.24",
        tiny={"minimax_m3_vl_text": [TINY]},
        limits="batches padded on the left run as they are given",
    )
)
