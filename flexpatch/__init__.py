"""Preference tuning that runs every shared prompt once: exact prefix sharing for Hugging Face models.

>>> import flexpatch
>>> model = flexpatch.apply(model)                                   # doctest: +SKIP
>>> rows = flexpatch.Collator(tokenizer)(examples).to(model.device)  # doctest: +SKIP
>>> logps = flexpatch.answer_logprobs(model, rows).answers           # doctest: +SKIP
>>> loss = flexpatch.dpo_loss(logps, reference_logps).loss           # doctest: +SKIP

Names are imported when they are first used: ``import flexpatch`` alone takes milliseconds, and imports no framework.
"""

import importlib
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpatch.collator import Collator
    from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
    from flexpatch.files import read_jsonl
    from flexpatch.logprobs import answer_logprobs, separate_logprobs
    from flexpatch.losses import dpo_loss
    from flexpatch.packing import pack
    from flexpatch.parity import check_parity
    from flexpatch.patch import apply, disabled, is_applied, model_inputs, remove, savings
    from flexpatch.reference import reference_logprobs
    from flexpatch.registry import Adapter, register
    from flexpatch.rows import Rows, build_rows
    from flexpatch.support import support_table
    from flexpatch.tree import Tree, lay_out

__all__ = [
    "Adapter",
    "Collator",
    "FlexpatchError",
    "FlexpatchWarning",
    "Rows",
    "Tree",
    "UnsupportedModelError",
    "answer_logprobs",
    "apply",
    "build_rows",
    "check_parity",
    "disabled",
    "dpo_loss",
    "is_applied",
    "lay_out",
    "model_inputs",
    "pack",
    "read_jsonl",
    "reference_logprobs",
    "register",
    "remove",
    "savings",
    "separate_logprobs",
    "support_table",
]

__version__ = "0.1.0"

_MODULES = {
    "collator": ["Collator"],
    "errors": ["FlexpatchError", "FlexpatchWarning", "UnsupportedModelError"],
    "files": ["read_jsonl"],
    "logprobs": ["answer_logprobs", "separate_logprobs"],
    "losses": ["dpo_loss"],
    "packing": ["pack"],
    "parity": ["check_parity"],
    "patch": ["apply", "disabled", "is_applied", "model_inputs", "remove", "savings"],
    "reference": ["reference_logprobs"],
    "registry": ["Adapter", "register"],
    "rows": ["Rows", "build_rows"],
    "support": ["support_table"],
    "tree": ["Tree", "lay_out"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
# Result types that stood here before, by the modules that have them. To be dropped after one release.
_MOVED = dict(AnswerLogprobs="logprobs", Layout="tree", PreferenceLoss="losses", Report="report", Savings="counts")


def __getattr__(name: str) -> Any:
    """Import a name, or a module of this package, when it is first asked for."""
    if name in _MOVED:
        module = f"flexpatch.{_MOVED[name]}"
        warnings.warn(f"flexpatch.{name} is now {module}.{name}", DeprecationWarning, 2)
        return getattr(importlib.import_module(module), name)
    if name in _HOMES:
        value = getattr(importlib.import_module(f"flexpatch.{_HOMES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"flexpatch.{name}") is not None:
        value = importlib.import_module(f"flexpatch.{name}")
    else:
        raise AttributeError(f"module 'flexpatch' has no attribute {name!r}")
    globals()[name] = value
    return value
