"""The table of architectures: what is found, what is refused and why, and that a new family is one new file."""

import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.needs import needs_type
from packaging.version import Version
from parameterized import parameterized
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, VipLlavaForConditionalGeneration

import flexpatch
from flexpatch import Adapter, FlexpatchError, UnsupportedModelError, registry
from flexpatch.layouts import multimodal_types
from flexpatch.models import TINY, tiny_config, tiny_model, tiny_types
from flexpatch.registry import FULL, SLIDING, adapter_for, adapters, refused_types

REPOSITORY = Path(__file__).resolve().parent.parent


FILES = sorted(path for path in (REPOSITORY / "adapters").glob("*.py") if path.stem != "__init__")


def config(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **settings})


def test_all_families_are_found() -> None:
    """Every adapter in a file is in the table, from which the documentation and every test of all types are made."""
    known = {adapter.name for adapter in registry._adapters.values()} if adapters() else set()
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        names = re.findall(r"^ *(?:register\()?Adapter\(\s*name=\"(.+?)\"", source, re.MULTILINE)
        assert len(names) == source.count("Adapter(") and names + re.findall(r"\bMedia\(", source), file.name
        assert set(names) <= known, file.name
    for model_type, adapter in adapters().items():
        assert adapter.tiny[model_type], "nothing to verify it with"
    for model_type in tiny_types():
        made = tiny_config(model_type)
        assert adapter_for(made) is adapters()[made.get_text_config().model_type]


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


NOISE = "its router draws random numbers .* Train it unpatched"
ENCODER = "use_bidirectional_attention=True lets a prompt see its answer"


@parameterized.expand(
    [
        ("phimoe", {}, NOISE),
        ("xlstm", dict(mode="train_with_padding"), "mode='train_with_padding' does not take sequences of any length"),
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
    needs_type(model_type)
    with pytest.raises(UnsupportedModelError, match=f"^model type '{model_type}': .*{message}"):
        adapter_for(config(model_type, **settings))


@parameterized.expand([(FULL,), (SLIDING,)])
def test_refuses_rope_of_any_layer_type(layer_type: str) -> None:
    refused = config("gemma3_text")
    assert {FULL, SLIDING} <= set(refused.rope_parameters)  # transformers 5.0 leaves flat entries beside them
    refused.rope_parameters[layer_type] = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    with pytest.raises(UnsupportedModelError, match=r"rope type dynamic is not exact: .* Exact here: default, linear"):
        adapter_for(refused)


def config_of(model_type: str) -> Any:
    """Its configuration by default; ``None`` for the few types that have none."""
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:
        return None


@functools.cache
def configs() -> dict[str, Any]:
    """A configuration of every type that transformers has, made without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {model_type: config_of(model_type) for model_type in CONFIG_MAPPING}
    return {model_type: made for model_type, made in found.items() if made is not None}


def test_every_type_of_transformers_is_served_or_told_why_not() -> None:
    """A multimodal type is sent to its text model only if that one is served; others hear that one's reason."""
    assert len(configs()) > 300
    seen = Counter()
    for model_type, made in configs().items():
        kind, words = expected(made)
        seen[kind] += 1
        try:
            adapter_for(made)
        except UnsupportedModelError as error:
            assert re.search(words, str(error)), f"{model_type}, {kind}: {error}"
        else:
            assert kind == "served", f"{model_type}, {kind}: taken"
    assert min(seen[kind] for kind in ("served", "unknown", "encoder-decoder")) > 3 and seen["refused"], seen
    assert min(seen[f"multimodal, {kind}"] for kind in ("served", "unknown")) > 1, seen


def expected(made: Any) -> tuple[str, str]:
    """What must become of a configuration, and words of the refusal."""
    model_type = made.model_type
    if model_type in adapters() or model_type in multimodal_types():
        # Some are refused for a setting that they have by default, such as dropout, or in an old release.
        reasons = "(Set config|so nothing can be shared|is installed: upgrade it$)"
        return "served", rf"^model type '{made.get_text_config().model_type}': .*{reasons}"
    if model_type in refused_types():
        return "refused", rf"^model type '{model_type}': {re.escape(refused_types()[model_type])}$"
    if getattr(made, "is_encoder_decoder", False):
        return "encoder-decoder", rf"^model type '{model_type}' is an encoder-decoder: .*Train it unpatched$"
    try:
        text = made.get_text_config()
    except ValueError:
        return "several", "several text models.*Train it unpatched$"
    if text is made:
        return "unknown", rf"^no adapter for model type '{model_type}'; known: "
    start = rf"^model type '{model_type}' is a multimodal model, which no adapter serves"
    neither = f"{start}, and neither is its text model:"
    if text.model_type in refused_types():
        reason = re.escape(refused_types()[text.model_type])
        return "multimodal, refused", f"{neither} model type '{text.model_type}': {reason}$"
    if text.model_type not in adapters():
        return "multimodal, unknown", f"{neither} no adapter for .*'{text.model_type}';"
    # Unless it is refused for a setting.
    return "multimodal, served", f"{start}; its text model is served: |{neither} model type '{text.model_type}': "


def test_the_text_model_of_a_multimodal_checkpoint_as_advised(tmp_path: Path) -> None:
    """Loaded as its class, it would have random weights."""
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    text = dict(TINY, model_type="llama")
    made = CONFIG_MAPPING["vipllava"](
        text_config=text, vision_config=dict(vision, patch_size=14, model_type="clip_vision_model")
    )
    model = VipLlavaForConditionalGeneration(made).eval()
    with pytest.raises(UnsupportedModelError, match="its text model is served: make text = AutoModelForCausalLM"):
        flexpatch.apply(model)
    advised = AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    advised.model.load_state_dict(model.model.language_model.state_dict())
    advised.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 8, 9]])
    with torch.no_grad():
        true = model(input_ids=ids, use_cache=False).logits
        assert (flexpatch.apply(advised)(input_ids=ids, use_cache=False).logits - true).abs().max() < 1e-6
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=made.get_text_config())
        assert (loaded(input_ids=ids, use_cache=False).logits - true).abs().max() > 1e-3, (
            "the advice can be shorter now"
        )


def test_refuses_unknown_types_and_lists_the_known() -> None:
    known = ", ".join(sorted(adapters()))
    with pytest.raises(UnsupportedModelError, match=f"no adapter for model type 'imagegpt'; known: {known}. Write one"):
        adapter_for(AutoConfig.for_model("imagegpt"))


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
    del table["arcee"], table["persimmon"]
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
        ("refused", dict(tiny={"phimoe": [{}]}), "'phimoe' is already served by the Phi 3, Phi 4 adapter"),
        ("refused again", dict(tiny={}, refused={"llama": "why"}), "'llama' is already served by the Llama adapter"),
    ]
)
def test_duplicates_are_refused(_name: str, entries: dict[str, Any], message: str) -> None:
    before = dict(registry._adapters)
    with pytest.raises(FlexpatchError, match=message):
        flexpatch.register(Adapter(name="Mine", masks="single", **entries))
    assert registry._adapters == before


def test_releases_that_are_too_old_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "INSTALLED", Version("5.0.0"))
    with pytest.raises(UnsupportedModelError, match=r"exact from transformers 5.\d+ on, and 5.0.0 is"):
        adapter_for(config("mamba"))
    assert "mamba" not in tiny_types() and "llama" in tiny_types()


def test_support_table_names_every_type_once() -> None:
    table = flexpatch.support_table()
    for model_type in [*adapters(), *refused_types()]:
        assert table.count(f"`{model_type}`") == 1


ARCEE = '''"""Arcee: one mask for all layers, no windows."""

from flexpatch.registry import Adapter, register

register(Adapter(name="Arcee, in a file of its own", masks="single", tiny={"arcee": [{}]}))
'''


def test_a_new_family_is_one_new_file(tmp_path: Path) -> None:
    for folder in ("flexpatch", "adapters"):
        shutil.copytree(
            REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "arcee.py")
        )

    (tmp_path / "adapters" / "arcee.py").write_text(ARCEE)
    code = """
import sys
from flexpatch.registry import adapters
from flexpatch.verify import main
assert adapters()["arcee"].name == "Arcee, in a file of its own"
sys.exit(main(["arcee"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arcee" in done.stdout
