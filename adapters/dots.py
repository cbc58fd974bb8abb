"""dots.llm1: experts, and windows from ``max_window_layers`` on."""

from flexpatch.registry import FULL, SLIDING, Adapter, register

MOE = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1
)

register(
    Adapter(
        name="dots.llm1",
        masks="by_layer_type",
        windows=lambda config: {FULL: None, SLIDING: config.sliding_window},
        tiny={"dots1": [MOE, dict(MOE, sliding_window=8, max_window_layers=2)]},
    )
)
