"""MiniMax M2: experts, and rope on half of each head. (MiniMax 01 has linear attention: adapters/hybrid_linear.py.)"""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="MiniMax M2",
        masks="single",
        tiny={"minimax_m2": [dict(num_local_experts=4, num_experts_per_tok=2, rotary_dim=8)]},
    )
)
