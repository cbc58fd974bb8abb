"""Solar Open: experts in every layer. (Solar 10.7B is a Llama.)"""

from flexpatch.registry import Adapter, register

MOE = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32)

register(Adapter(name="Solar Open", masks="single", tiny={"solar_open": [MOE]}))
