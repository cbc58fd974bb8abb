"""What flexpatch relies on beyond public promises, by name: the first tests to fail under a new release.

The facts are in helpers/probes. Where one is gone or changed, its test fails with a sentence that says what it is, and
which function of flexpatch needs it for what.
"""

import functools
import importlib
import re
from importlib import metadata
from typing import Any

import pytest
import transformers
from helpers.oracle import FIRST
from helpers.probes import PROBES, Probe, pytorch

from flexpatch.internals import text_config
from flexpatch.models import tiny_model, tiny_types
from flexpatch.registry import adapters

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def name_of(entry: Probe) -> str:
    return f"{entry.package}: {entry.name}, {entry.user}"


def marked(entry: Probe) -> Any:
    """A probe as a parameter, which is skipped where its package may be missing and is."""
    return pytest.param(entry, marks=pytest.mark.heavy(entry.package)) if entry.package == "bitsandbytes" else entry


@pytest.mark.parametrize("entry", [marked(entry) for entry in PROBES if not entry.of], ids=name_of)
def test_what_flexpatch_relies_on(entry: Probe) -> None:
    entry.check()


@pytest.mark.parametrize(
    ("entry", "model_type"),
    [
        pytest.param(
            entry, model_type, id=f"{entry.name}, {model_type}", marks=[] if model_type in FIRST else pytest.mark.slow
        )
        for entry in PROBES
        for model_type in entry.of
    ],
)
def test_what_flexpatch_relies_on_in_every_architecture(entry: Probe, model_type: str) -> None:
    entry.check(model_type)


def test_the_table() -> None:
    """Each fact once, and each of a function that exists."""
    assert len(set(map(name_of, PROBES))) == len(PROBES)
    for entry in PROBES:
        module, *path = entry.user.split(".")
        assert path, f"{entry.name}: {entry.user} names no function"
        functools.reduce(getattr, path, importlib.import_module(f"flexpatch.{module}"))


@pytest.mark.parametrize("entry", [marked(entry) for entry in PROBES if entry.gone], ids=name_of)
def test_a_missing_internal_is_named(entry: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With package and version, and the function that needs it."""
    entry.skip_old()
    monkeypatch.delattr(entry.gone)
    version = metadata.version(entry.package)
    with pytest.raises(pytest.fail.Exception) as failure:
        entry.check()
    message = str(failure.value)
    assert message.startswith(f"{entry.package} {version}: {entry.name} is gone or changed"), message
    assert message.endswith(f"flexpatch.{entry.user} relies on it {entry.why}"), message


def test_a_changed_internal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in its place that behaves otherwise."""
    of = {entry.name: entry for entry in PROBES}
    changed: dict[str, tuple[Any, str, Any]] = {
        "config.get_text_config": (transformers.PreTrainedConfig, "get_text_config", lambda self: None),
        "PreTrainedModel.base_model": (transformers.PreTrainedModel, "base_model", property(lambda self: self)),
        "get_output_embeddings": (transformers.LlamaForCausalLM, "get_output_embeddings", lambda self: None),
        "is_in_torch_dispatch_mode": (pytorch, "is_in_torch_dispatch_mode", lambda: False),
    }
    for name, (owner, attribute, other) in changed.items():
        of[name].check()
        with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match=re.escape(name)):
            patch.setattr(owner, attribute, other)
            of[name].check()


class Recorder:
    """A configuration that notes what is asked of it."""

    def __init__(self, config: Any, asked: set[str]) -> None:
        self._given = config, asked

    def __getattr__(self, name: str) -> Any:
        config, asked = self._given
        asked.add(name)
        return getattr(config, name)


@pytest.mark.parametrize("adapter", dict.fromkeys(adapters().values()), ids=lambda adapter: adapter.name)
def test_configurations_have_what_adapters_read(adapter: Any) -> None:
    """A renamed setting would be read as its default, in silence: a window as none."""
    if unknown := set(adapter.tiny) - set(tiny_types()):
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(sorted(unknown))}")
    asked: set[str] = set()
    configs = [
        text_config(tiny_model(model_type, variant))
        for model_type, variants in adapter.tiny.items()
        for variant in range(len(variants))
    ]
    for config in configs:
        for rule in (adapter.windows, adapter.logit_transform, adapter.reject):
            rule(Recorder(config, asked))
    for name in sorted(asked):
        assert any(hasattr(config, name) for config in configs), (
            f"transformers {transformers.__version__}: configurations of {', '.join(adapter.tiny)} lack '{name}'. "
            f"The adapter {adapter.name} in adapters/ reads it for windows, logits or refusals"
        )


def test_the_message() -> None:
    """Read it once as a maintainer would."""
    (entry,) = (entry for entry in PROBES if entry.name == "PreTrainedModel.set_attn_implementation")
    entry = entry._replace(holds=lambda: transformers.gone)
    with pytest.raises(pytest.fail.Exception) as failure:
        entry.check()
    assert str(failure.value) == (
        f"transformers {transformers.__version__}: PreTrainedModel.set_attn_implementation is gone or changed "
        "(AttributeError: module transformers has no attribute gone). flexpatch.internals.set_attention relies on it "
        "to put its attention into every layer"
    )
