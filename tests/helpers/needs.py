"""Tests that an older release cannot run are skipped, with the reason."""

from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flexpatch.models import adapter_of, tiny_types
from flexpatch.registry import adapters, too_old


def needs(package: str, since: str, why: str) -> pytest.MarkDecorator:
    """Skip a test with a ``package`` older than ``since``."""
    reason = f"needs {package} {since} or newer: {why}"
    return pytest.mark.skipif(Version(version(package)) < Version(since), reason=reason)


def needs_packages(packages: Iterable[str], why: str) -> None:
    """Skip a test that needs packages which no extra brings."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{why} needs {package}: pip install {package}")


def needs_type(model_type: str) -> None:
    """Skip a test whose architecture the installed transformers does not have."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"needs a transformers that knows {model_type}")
    for name in (model_type, f"{model_type}_text"):  # the text model of a multimodal type
        if name in adapters() and (reason := too_old(adapters()[name])) is not None:
            pytest.skip(f"{name} is {reason}")


def needs_hybrids() -> None:
    """Skip a file of tests where no model is served whose mixers no mask can cut."""
    if not any(adapter_of(each).branched for each in tiny_types()):
        pytest.skip("needs transformers 5.16, from which on hybrids are served", allow_module_level=True)


needs_licenses = needs("packaging", "24.2", "setuptools reads license expressions with it")
