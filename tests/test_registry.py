"""The table of architectures: what is found, what is refused and why, and that a new family is one new file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parameterized import parameterized
from transformers import CONFIG_MAPPING, AutoConfig

import flexpatch
from flexpatch import Adapter, FlexpatchError, UnsupportedModelError, registry
from flexpatch.models import TINY, tiny_model, tiny_types
from flexpatch.registry import FULL, SLIDING, adapter_for, adapters

REPOSITORY = Path(__file__).resolve().parent.parent


FAMILIES = """
afmoe apertus cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4
glm4_moe glm4_moe_lite gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium llama
minimax_m2 ministral ministral3 mistral mixtral olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe
seed_oss smollm3 solar_open starcoder2 vaultgemma
"""


def config(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **settings})


def test_all_families_are_found() -> None:
    assert sorted(adapters()) == FAMILIES.split()
    for model_type, adapter in adapters().items():
        assert adapter.tiny[model_type], "nothing to verify it with"
    for model_type in tiny_types():
        assert adapter_for(tiny_model(model_type).config) is adapters()[model_type]


@parameterized.expand(
    [
        ("llama", {}, {FULL: None}),
        ("mistral", dict(sliding_window=None), {FULL: None}),
        ("mistral", dict(sliding_window=8), {FULL: 8}),
        ("qwen2", dict(sliding_window=8), {FULL: None, SLIDING: None}),
        ("qwen2", dict(sliding_window=8, use_sliding_window=True), {FULL: None, SLIDING: 8}),
        ("qwen2_moe", dict(sliding_window=8), {FULL: None, SLIDING: None}),
        ("qwen3_moe", dict(sliding_window=8), {FULL: None}),
        ("qwen3_moe", dict(sliding_window=8, use_sliding_window=True), {FULL: 8}),
        ("gemma3_text", dict(sliding_window=8), {FULL: None, SLIDING: 8}),
    ]
)
def test_windows(model_type: str, settings: dict[str, Any], windows: dict[str, int | None]) -> None:
    assert adapter_for(config(model_type, **settings)).windows(config(model_type, **settings)) == windows


LLAMA4 = "Llama 4 attends in chunks .* Train it unpatched"
LINEAR = "linear-attention layers, .* Train it unpatched"
ENCODER = "use_bidirectional_attention=True lets a prompt see its answer"


@parameterized.expand(
    [
        ("llama4_text", {}, LLAMA4),
        ("qwen3_next", {}, LINEAR),
        ("qwen3_5_text", {}, LINEAR),
        ("qwen3_5_moe_text", {}, LINEAR),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope type dynamic is"),
        ("llama", dict(attention_dropout=0.1), r"attention_dropout=0.1 .* Set config.attention_dropout = 0.0"),
        ("gemma3_text", dict(use_bidirectional_attention=True), ENCODER),
        ("gemma2", dict(use_bidirectional_attention=True), ENCODER),
        ("gemma4_text", dict(use_bidirectional_attention="all"), "use_bidirectional_attention=all lets a prompt see"),
        (
            "qwen2",
            dict(layer_types=[FULL, "chunked_attention"] * 2),
            "layer types chunked_attention cannot be isolated",
        ),
        ("qwen3", dict(layer_types=[FULL, "linear_attention"] * 2), "layer types linear_attention cannot be isolated"),
    ]
)
def test_refuses(model_type: str, settings: dict[str, Any], message: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"needs a transformers that knows {model_type}")
    with pytest.raises(UnsupportedModelError, match=f"^model type '{model_type}': .*{message}"):
        adapter_for(config(model_type, **settings))


@parameterized.expand([(FULL,), (SLIDING,)])
def test_refuses_rope_of_any_layer_type(layer_type: str) -> None:
    refused = config("gemma3_text")
    assert {FULL, SLIDING} <= set(refused.rope_parameters)  # transformers 5.0 leaves flat entries beside them
    refused.rope_parameters[layer_type] = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    with pytest.raises(UnsupportedModelError, match=r"rope type dynamic is not exact: .* Exact here: default, linear"):
        adapter_for(refused)


def test_refuses_unknown_types_and_lists_the_known() -> None:
    known = ", ".join(sorted(adapters()))
    with pytest.raises(UnsupportedModelError, match=f"no adapter for model type 'gpt2'; known: {known}. Write one"):
        adapter_for(AutoConfig.for_model("gpt2"))


def test_refused_models_are_not_patched() -> None:
    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(UnsupportedModelError, match="attention_dropout"):
        flexpatch.apply(model)
    assert not flexpatch.is_applied(model)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Adapter]:
    """A table of adapters that the test may change."""
    adapters()
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    return registry._adapters


def test_register_at_run_time(table: dict[str, Adapter]) -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter for model type 'arcee'"):
        adapter_for(config("arcee"))
    arcee = Adapter(name="Arcee", masks="single", tiny={"arcee": [{}]}, refused={"persimmon": "not yet"})
    assert flexpatch.register(arcee) is arcee
    assert adapter_for(config("arcee")) is arcee
    assert adapters()["arcee"] is arcee and "persimmon" not in adapters()
    assert "| Arcee | `arcee` |" in flexpatch.support_table()
    assert "- `persimmon`: not yet" in flexpatch.support_table()
    with pytest.raises(UnsupportedModelError, match="model type 'persimmon': not yet"):
        adapter_for(config("persimmon"))


@parameterized.expand(
    [
        ("served", dict(tiny={"mixtral": [{}]}), "'mixtral' is already served by the Mistral, Ministral 3 adapter"),
        ("refused", dict(tiny={"llama4_text": [{}]}), "'llama4_text' is already served by the Llama adapter"),
        ("refused again", dict(tiny={}, refused={"llama": "why"}), "'llama' is already served by the Llama adapter"),
    ]
)
def test_duplicates_are_refused(_name: str, entries: dict[str, Any], message: str) -> None:
    before = dict(registry._adapters)
    with pytest.raises(FlexpatchError, match=message):
        flexpatch.register(Adapter(name="Mine", masks="single", **entries))
    assert registry._adapters == before


def test_support_table_names_every_type_once() -> None:
    table = flexpatch.support_table()
    for model_type in [*adapters(), "llama4_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]:
        assert table.count(f"`{model_type}`") == 1


ARCEE = '''"""Arcee: one mask for all layers, no windows."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Arcee", masks="single", tiny={"arcee": [{}]}))
'''


def test_a_new_family_is_one_new_file(tmp_path: Path) -> None:
    for folder in ("flexpatch", "adapters"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flexpatch.verify", "arcee"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    without = verify()
    assert without.returncode == 2, without.stdout + without.stderr
    (tmp_path / "adapters" / "arcee.py").write_text(ARCEE)
    with_file = verify()
    assert with_file.returncode == 0, with_file.stdout + with_file.stderr
    assert "arcee" in with_file.stdout
