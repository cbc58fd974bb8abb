"""Doge: attention with a number for each key, made from its value, and with the keys of the largest ones alone."""

from typing import Any

from flexpatch.registry import FULL, Adapter, Visible, register


def window(module: Any) -> Visible:
    """All layers have the window, if there is one."""
    return Visible(window=module.config.sliding_window)


def no_experts(config: Any) -> str | None:
    """Refuse the mixture of experts: its router is not causal."""
    if not config.is_moe:
        return None
    return (
        "is_moe=True: its router mixes the scores of all tokens of a call, so lets tokens see later ones: a prompt "
        "changes with its answer, so nothing can be shared. Train it unpatched"
    )


register(
    Adapter(
        name="Doge",
        masks="single",
        unmasked=(FULL,),
        unshared={"DogeAttention": window},
        reject=no_experts,
        # A query of a longer one keeps so many keys. Equal tokens tie in the first layer, and topk takes any of them.
        longest=lambda config: config.keep_window_size,
        since="5.24",
        tiny={"doge": [{}, dict(sliding_window=12)]},
        limits="no mixture of experts; sequences of at most keep_window_size tokens; batches padded on the left "
        "run as they are given",
    )
)
