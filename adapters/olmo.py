"""OLMo 1 to 3, OLMoE and FlexOLMo. OLMo 3 has a rope for each layer type; OLMo Hybrid: adapters/hybrid_linear.py."""

from flexpatch.registry import Adapter, register, sliding_windows

MOE = dict(num_experts=4, num_experts_per_tok=2)

register(
    Adapter(
        name="OLMo, OLMo 2, OLMoE, FlexOLMo",
        masks="single",
        tiny={"olmo": [dict(clip_qkv=1.0)], "olmo2": [{}], "olmoe": [MOE], "flex_olmo": [MOE]},
    )
)

register(
    Adapter(
        name="OLMo 3",
        masks="by_layer_type",
        windows=sliding_windows,
        tiny={"olmo3": [dict(sliding_window=8)]},
    )
)
