"""Aria (text): experts."""

from flexpatch.registry import Adapter, register

register(
    Adapter(
        name="Aria (text)",
        masks="single",
        tiny={"aria_text": [dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)]},
    )
)
