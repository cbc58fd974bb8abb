"""The table of supported architectures, made from the records."""

from flexpatch.layouts import multimodal_types
from flexpatch.registry import EVERY, Adapter, adapters, refused_types


def support_table() -> str:
    """Make the table of supported architectures, as Markdown."""
    lines = [
        "| family | `model_type` | masks | sliding windows | mixers that no mask can cut | limits |",
        "|---|---|---|---|---|---|",
    ]
    for adapter in dict.fromkeys(adapters().values()):
        types = ", ".join(f"`{model_type}`" for model_type in adapter.tiny)
        masks = {"single": "one for all layers", "by_layer_type": "one per layer type", "none": "–", "own": "–"}[
            adapter.masks
        ]
        windows = "exact" if _has_windows(adapter) else "–"
        since = f"transformers {adapter.since} or later" if adapter.since != EVERY else ""
        limits = "; ".join(filter(None, (adapter.limits, since))) or "–"
        ways = {"branched" if name in adapter.branched else "unshared" for name in adapter.unshared}
        mixers = ", ".join(sorted(ways)) or "–"
        lines.append(f"| {adapter.name} | {types} | {masks} | {windows} | {mixers} | {limits} |")
    lines += ["", "Multimodal classes whose calls with images fold, around any text model above:", ""]
    lines += ["| family | `model_type` | two-way blocks | videos | limits |", "|---|---|---|---|---|"]
    for record in dict.fromkeys(multimodal_types().values()):
        types = ", ".join(f"`{model_type}`" for model_type in record.tiny)
        videos = "as given" if record.videos is None else "fold"
        lines.append(
            f"| {record.name} | {types} | {'exact' if record.blocks else '–'} | {videos} | {record.limits or '–'} |"
        )
    by_reason: dict[str, list[str]] = {}
    for model_type, reason in refused_types().items():
        by_reason.setdefault(reason, []).append(f"`{model_type}`")
    lines += ["", "Refused, with the reason:", ""]
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "\n".join(lines)


def _has_windows(adapter: Adapter) -> bool:
    """Tell whether an adapter's window rule looks at configurations: one that does not can know no window."""
    try:
        return any(adapter.windows(None).values())
    except AttributeError:
        return True
