"""Every causal language model class of the installed transformers is served, or refused for a reason of its own."""

import functools
import warnings
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from flexpatch.errors import UnsupportedModelError
from flexpatch.registry import adapter_for, adapters, refused_types

# Served by a package of its own, which tests/test_adapter_package.py verifies: type -> its module.
PACKAGED = {"nanochat": "examples/adapter_package/flexpatch_nanochat.py"}
# Words of a refusal by what is not causal, not deterministic, or not one sequence of tokens.
REASONS = (
    *("later ones", "draws random", "is an encoder-decoder", "several text models", "drafts tokens"),
    *("its text model is served", "neither is its text model", "all of it would have to run on separate sequences"),
)


@functools.cache
def mapped() -> dict[str, Any]:
    """All types of ``AutoModelForCausalLM``, with their configuration classes."""
    return {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}


def refusal(model_type: str) -> str | None:
    """Say why a type is refused in its default configuration; ``None`` if it is not, or for a setting alone."""
    if model_type in adapters():
        return None
    if model_type in refused_types():
        return refused_types()[model_type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[model_type]()
        adapter_for(config)
    except UnsupportedModelError as error:
        return str(error)
    except TypeError:
        return None  # transformers 5.0 has no default configuration of Musicgen, which newer ones refuse by its name
    return None


def test_every_causal_language_model_is_served_or_refused_with_a_reason() -> None:
    unknown = {}
    for model_type in mapped():
        said = None if model_type in PACKAGED else refusal(model_type)
        if said is not None and ("no adapter for" in said or not any(words in said for words in REASONS)):
            unknown[model_type] = said
    assert not unknown


def test_packages_serve_what_no_record_does() -> None:
    """A record of ours would be in the way of the package's."""
    root = Path(__file__).resolve().parent.parent
    for model_type, module in PACKAGED.items():
        assert f'"{model_type}": [' in (root / module).read_text()
        assert model_type in mapped() and model_type not in {*adapters(), *refused_types()}
