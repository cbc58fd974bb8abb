"""JetMoE: experts in attention too."""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="JetMoE",
        masks="single",
        tiny={"jetmoe": [dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=16)]},
    )
)
