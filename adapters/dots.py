"""dots.llm1: experts, and windows from ``max_window_layers`` on."""

from flexpatch.registry import Adapter, register, sliding_windows

MOE = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1
)

register(
    Adapter(
        name="dots.llm1",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"dots1": [MOE, dict(MOE, sliding_window=8, max_window_layers=2)]},
    )
)
