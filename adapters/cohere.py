"""Cohere: Command R (one mask for all layers), Command R7B and Command A (rope and windows in three layers of four)."""

from flexpatch.registry import Adapter, LogitTransform, register, sliding_windows

register(
    Adapter(
        name="Cohere",
        masks="single",
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale),
        tiny={"cohere": [dict(logit_scale=0.5), dict(logit_scale=0.5, use_qk_norm=True)]},
    )
)

register(
    Adapter(
        name="Cohere 2, dense and mixture of experts",
        masks="by_layer_type",
        windows=sliding_windows,
        logit_transform=lambda config: LogitTransform(scale=config.logit_scale),
        tiny={
            "cohere2": [dict(sliding_window=8, logit_scale=0.5)],
            "cohere2_moe": [
                dict(sliding_window=8, logit_scale=0.5, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
            ],
        },
    )
)
