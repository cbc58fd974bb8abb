"""ERNIE 4.5, dense and mixture of experts: one mask for all layers."""

from flexpatch.registry import Adapter, register

MOE = dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1, moe_layer_start_index=1)

register(
    Adapter(
        name="ERNIE 4.5",
        masks="single",
        tiny={"ernie4_5": [{}], "ernie4_5_moe": [MOE]},
    )
)
