"""gpt-oss: a learned sink in every head's softmax, windows in every second layer, mixture of experts."""

from flexpatch.registry import Adapter, register, sliding_windows

register(
    Adapter(
        name="gpt-oss",
        masks="by_layer_type",
        windows=sliding_windows,
        restarts=False,
        # sdpa has no sinks.
        implementations=("eager",),
        tiny={"gpt_oss": [dict(sliding_window=8, num_local_experts=4, num_experts_per_tok=2)]},
        limits="attn_implementation='eager' for ordinary calls; not with backend='fa4'",
    )
)
