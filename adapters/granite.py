"""Granite, dense and mixture of experts: logits are divided by a constant. Hybrids: adapters/hybrid_mamba.py."""

from flexpatch.registry import FULL, SLIDING, Adapter, LogitTransform, register, sliding_windows

SCALES = dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=4.0)
MOE = dict(SCALES, num_local_experts=4, num_experts_per_tok=2)

register(
    Adapter(
        name="Granite",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=1 / config.logits_scaling),
        tiny={
            "granite": [SCALES],
            "granitemoe": [MOE],
            "granitemoeshared": [dict(MOE, shared_intermediate_size=32)],
        },
    )
)

SHORT = dict(SCALES, sliding_window=8, layer_types=[FULL, SLIDING] * 2, layer_rope_theta=[1e4, 1e4, 2e4, 2e4])

register(
    Adapter(
        name="Granite with windows",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(scale=1 / config.logits_scaling),
        # sdpa has no sinks.
        implementations=("eager",),
        tiny={
            "granite_swa": [SHORT],
            "granitemoe_swa": [dict(MOE | SHORT, shared_intermediate_size=32)],
        },
        limits="attn_implementation='eager' for ordinary calls; not with backend='fa4'",
    )
)
