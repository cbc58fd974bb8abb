"""Settings of configurations: those with which no architecture is exact, and those that a call may overrule."""

from collections.abc import Mapping
from typing import Any


def ropes(config: Any) -> dict[str, Mapping[str, Any]]:
    """Map rope types to their parameters, from ``config.rope_parameters``, which is flat or keyed by layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in parameters.values() if isinstance(rope, Mapping)]
    return {rope.get("rope_type", "default"): rope for rope in nested or [parameters]}


def asked(config: Any, call: Mapping[str, Any], name: str) -> Any:
    """Find what a call asks for: by its argument, or the configuration's setting where it has none.

    Args:
        config: The configuration of a text model.
        call: Arguments of a call by name.
        name: Of the argument, and of the setting.

    Returns:
        The value; ``None`` if neither says.
    """
    return call[name] if call.get(name) is not None else getattr(config, name, None)


def inexact_setting(config: Any, adapter: Any) -> str | None:
    """Find a setting that no architecture can run exactly.

    Args:
        config: The configuration of a text model.
        adapter: The record of its architecture.

    Returns:
        Why it cannot, and what to do instead; ``None`` if there is none.
    """
    if inexact := set(ropes(config)) - adapter.ropes:
        return (
            f"rope type {', '.join(sorted(inexact))} is not exact: its frequencies depend on the longest sequence of "
            f"the call, so a sequence changes with its neighbours. Exact here: {', '.join(sorted(adapter.ropes))}"
        )
    if getattr(config, "attention_dropout", 0):
        return (
            f"attention_dropout={config.attention_dropout} draws one mask for all answers that share a token, which is "
            "not what the unpatched model does. Set config.attention_dropout = 0.0"
        )
    if not getattr(config, "is_causal", True):
        return "is_causal=False lets a prompt see its answer, so nothing can be shared. Train it unpatched"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if adapter.masks == "by_layer_type" and (
        unknown := layer_types - set(adapter.windows(config)) - set(adapter.unmasked)
    ):
        return f"layer types {', '.join(sorted(unknown))} cannot be isolated by an attention mask"
    return None
