"""Mellum, Laguna, Kolibri, Beam, Dory and Flint: layers with a window between others."""

from flexpatch.registry import FULL, SLIDING, Adapter, LogitTransform, register, sliding_windows

SHORT = dict(sliding_window=8, layer_types=[FULL, SLIDING] * 2)
MOE = dict(SHORT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SHARED_EXPERT = dict(MOE, shared_expert_intermediate_size=32)

register(
    Adapter(
        name="Mellum, Laguna, Kolibri",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={
            "mellum": [MOE],
            "laguna": [dict(SHARED_EXPERT, num_attention_heads_per_layer=[4, 2, 4, 2])],
            "kolibri1": [SHARED_EXPERT],
        },
    )
)

register(
    Adapter(
        name="Beam",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(softcap=config.final_logit_softcapping),
        begins="position",
        tiny={"beam": [dict(MOE, n_group=2, topk_group=1)]},
        limits="batches padded on the left fold if they have position_ids",
    )
)

register(
    Adapter(
        name="Dory",
        masks="by_layer_type",
        windows=sliding_windows,
        begins="position",
        tiny={"dory": [dict(SHORT, n_input_layers=1, n_output_layers=1, n_recurrent_loops=2)]},
        limits="batches padded on the left fold if they have position_ids",
    )
)

register(
    Adapter(
        name="Flint",
        masks="by_layer_type",
        windows=sliding_windows,
        # sdpa has no sinks.
        implementations=("eager",),
        tiny={"flint": [SHARED_EXPERT]},
        limits="attn_implementation='eager' for ordinary calls; not with backend='fa4'",
    )
)
