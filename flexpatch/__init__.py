"""Preference tuning that runs every shared prompt once: exact prefix sharing for Hugging Face models.

>>> import flexpatch
>>> model = flexpatch.apply(model)                                   # doctest: +SKIP
>>> rows = flexpatch.Collator(tokenizer)(examples).to(model.device)  # doctest: +SKIP
>>> logps = flexpatch.answer_logprobs(model, rows).answers           # doctest: +SKIP
>>> loss = flexpatch.dpo_loss(logps, reference_logps).loss           # doctest: +SKIP
"""

from flexpatch.collator import Collator
from flexpatch.errors import FlexpatchError, FlexpatchWarning, UnsupportedModelError
from flexpatch.files import read_jsonl
from flexpatch.fold import Savings
from flexpatch.logprobs import AnswerLogprobs, answer_logprobs, separate_logprobs
from flexpatch.losses import PreferenceLoss, dpo_loss
from flexpatch.packing import pack
from flexpatch.parity import Report, check_parity
from flexpatch.patch import apply, disabled, is_applied, model_inputs, remove, savings
from flexpatch.reference import reference_logprobs
from flexpatch.registry import Adapter, register, support_table
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Layout, Tree, lay_out

__all__ = [
    "Adapter",
    "AnswerLogprobs",
    "Collator",
    "FlexpatchError",
    "FlexpatchWarning",
    "Layout",
    "PreferenceLoss",
    "Report",
    "Rows",
    "Savings",
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
