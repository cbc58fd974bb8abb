"""ZAYA: attention whose queries, keys and values pass convolutions."""

from typing import Any

from flexpatch.registry import Adapter, Visible, register

TINY = dict(
    num_experts=4,
    num_experts_per_tok=1,
    moe_intermediate_size=32,
    router_hidden_size=16,
    sliding_window=8,
    layer_types=["hybrid", "hybrid_sliding"] * 2,
)


def visible(module: Any) -> Visible:
    """Layers of one type have a window."""
    return Visible(window=module.sliding_window)


register(
    Adapter(
        name="ZAYA",
        masks="by_layer_type",
        windows=lambda config: {"hybrid": None, "hybrid_sliding": None},  # not of the row's masks
        unmasked=("conv",),
        unshared={"ZayaAttention": visible},
        restarts=False,
        padding="in_front",
        since="5.16",
        tiny={"zaya": [TINY]},
    )
)
