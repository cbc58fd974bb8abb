"""The verifier: every architecture passes, and a wrong model, mask or weight does not."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.needs import needs_type
from parameterized import parameterized
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import flexpatch
from flexpatch import verification, verify
from flexpatch.models import TINY, adapter_of, tiny_model, tiny_types, variants
from flexpatch.patch import settings_of
from flexpatch.registry import adapters
from flexpatch.rows import Rows
from flexpatch.trials import whole_trees

# One of each kind of mask, window, head, router and class. All others are in slow tests.
KINDS = [
    "llama",
    "qwen2_moe",
    "gemma4",
    "gpt_oss",
    "deepseek_v3",
]


@parameterized.expand([(model_type,) for model_type in tiny_types() if model_type in KINDS])
def test_an_architecture_of_each_kind_passes(model_type: str) -> None:
    passes(model_type)


@parameterized.expand([(model_type,) for model_type in tiny_types() if model_type not in KINDS])
@pytest.mark.slow
def test_every_registered_architecture_passes(model_type: str) -> None:
    passes(model_type)


def passes(model_type: str) -> None:
    settings = variants(model_type)
    names = set()
    for variant in range(len(settings)):
        report = flexpatch.check_parity(tiny_model(model_type, variant))
        assert report.passed, str(report)
        checks = {check.name: check for check in report.checks}
        assert checks["log-probs, one row"].error <= 1e-10
        assert checks["gradients of the DPO loss"].error <= 1e-6
        controls = [check for check in report.checks if check.margin]
        assert len(controls) >= 3 and all(check.error >= 1000 * check.bound for check in controls)
        names |= set(checks)
    windowed = any({**variant, **variant.get("text_config", {})}.get("sliding_window") for variant in settings)
    if not adapter_of(model_type).unshared:  # mixers have windows of their own, which are no mask's
        assert ("control, log-probs: windows dropped" in names) == windowed


@parameterized.expand([("llama", torch.float32), ("qwen3", torch.bfloat16), ("gemma2", torch.float32)])
def test_low_precision_passes_within_the_stock_models_own_error(model_type: str, dtype: torch.dtype) -> None:
    report = flexpatch.check_parity(tiny_model(model_type, dtype=dtype))
    assert report.passed, str(report)


def test_a_wrong_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that lets the rejected answer see the chosen one must fail every check, and the exit code say so."""
    honest = verification.model_inputs

    def leaky(model: torch.nn.Module, rows: Rows, **kwargs: object) -> dict[str, object]:
        return honest(model, replace(rows, ends=whole_trees(rows), masks={}), **kwargs)

    monkeypatch.setattr(verification, "model_inputs", leaky)
    monkeypatch.setattr("flexpatch.logprobs.model_inputs", leaky)
    report = flexpatch.check_parity(tiny_model("llama"))
    failed = [check.name for check in report.checks if not check.passed]
    assert [name.split(",")[0].split(" (")[0] for name in failed] == [
        "leak", "log-probs", "log-probs", "gradients of the DPO loss",
    ]  # fmt: skip
    assert "FAILS  worst: sample " in str(report)
    assert verify.main(["llama"]) == 1


def test_a_control_that_is_not_caught_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "whole_trees", lambda rows: rows.ends)  # breaks nothing
    report = flexpatch.check_parity(tiny_model("llama"))
    assert not report.passed
    assert "NOT CAUGHT" in str(report)


def test_a_misdeclared_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral declared without its window: exactly what a wrong adapter file would do."""
    wrong = replace(adapters()["mistral"], windows=lambda config: {"full_attention": None})
    monkeypatch.setitem(flexpatch.registry._adapters, "mistral", wrong)
    report = flexpatch.check_parity(tiny_model("mistral", 1))
    assert not report.passed


def test_nan_weights_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(flexpatch.FlexpatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        flexpatch.check_parity(model)


@parameterized.expand([(None,), ("dense",)])
def test_the_model_is_left_as_it_was(backend: str | None) -> None:
    model = tiny_model("qwen3")
    if backend:
        flexpatch.apply(model, backend=backend)
    name, settings = model.config._attn_implementation, settings_of(model)
    flexpatch.check_parity(model)
    assert settings_of(model) == settings
    assert model.config._attn_implementation == name
    assert all(parameter.grad is None for parameter in model.parameters())


SETTINGS = [["--lora"], ["--gradient-checkpointing"], ["--lora", "--gradient-checkpointing", "reentrant"]]


@parameterized.expand([(["gemma2", *options],) for options in SETTINGS])
def test_training_settings(arguments: list[str]) -> None:
    assert verify.main(arguments) == 0


@parameterized.expand([(["mixtral", *options],) for options in SETTINGS])
@pytest.mark.slow
def test_training_settings_of_experts(arguments: list[str]) -> None:
    assert verify.main(arguments) == 0


def test_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["gemma", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["settings"]["dtype"] == "float64"
    assert {"name", "error", "bound", "passed", "margin", "detail"} == set(report["checks"][0])
    assert verify.main(["gemma"]) == 0
    assert "parity holds" in capsys.readouterr().out


MISTAKES = [
    (["no-such-architecture-or-folder"], "no-such-architecture-or-folder"),
    (["missing.gguf"], "there is no GGUF file missing.gguf"),
    (["llama", "--device", "nowhere"], "nowhere"),
]


@parameterized.expand(MISTAKES)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert verify.main(arguments) == 2
    check_one_line(said.getvalue(), words)


def test_a_users_mistake_in_a_process() -> None:
    """Through Python's own handling of ``-m``, exit codes and streams."""
    arguments, words = MISTAKES[1]
    command = [sys.executable, "-m", "flexpatch.verify", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 2, run.stderr
    check_one_line(run.stderr, words)


def check_one_line(said: str, words: str) -> None:
    assert words in said and "Traceback" not in said
    # bitsandbytes, which peft imports, says at once on some CPUs what else could be installed.
    assert len([line for line in said.strip().splitlines() if "kernels-community" not in line]) == 1, said


@parameterized.expand([
    (["llama", "--backend", "flex"], "FlexAttention has no backward on the CPU: .*backend='dense'.*, or 'auto'"),
    (["llama", "--compile"], "nothing would be compiled, so nothing verified. .* without compile"),
    (["llama", "--compile", "--backend", "dense"], "nothing would be compiled, so nothing verified"),
    (["phimoe"], "model type 'phimoe': its router draws random numbers"),
    (["llama4"], "model type 'llama4' is a multimodal model, which no adapter serves; its text model is served"),
    (["bert"], "model type 'bert': is an encoder, whose tokens see later ones"),
    (["imagegpt"], "no adapter for model type 'imagegpt'"),
    (["t5"], "model type 't5' is an encoder-decoder"),
    (["nougat"], "no adapter for model type 'nougat'"),
])  # fmt: skip
def test_refused_at_once(arguments: list[str], words: str) -> None:
    """Before any hub is asked, and before anything is computed."""
    needs_type(arguments[0])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(verify, "load_model", None)
        patch.setattr("flexpatch.verification.separate_logprobs", None)
        assert verify.main(arguments) == 2
    assert re.search(words, said.getvalue()), said.getvalue()


@parameterized.expand([("lama", "llama"), ("Qwen-3", "qwen3"), ("mamba-2", "mamba2"), ("nothing-like-it", None)])
def test_a_name_that_nobody_has(name: str, like: str | None) -> None:
    """It may be a model of the hub, so the hub is asked first."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise flexpatch.FlexpatchError("no such model")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(verify, "load_model", load)
        assert verify.main([name]) == 2
    assert ("no such model; did you mean the architecture" in said.getvalue()) == (like is not None)
    assert like is None or f"architecture {like}?" in said.getvalue()


@parameterized.expand([
    (dict(backend="flex"), "FlexAttention has no backward on the CPU"),
    (dict(backend="flex", compile=True), "FlexAttention has no backward on the CPU"),
    (dict(compile=True), "nothing would be compiled"),
    (dict(backend="cuda"), "backend='cuda'; expected one of"),
])  # fmt: skip
def test_what_cannot_run_here_leaves_the_model_as_it_was(options: dict[str, Any], words: str) -> None:
    model = flexpatch.apply(tiny_model("qwen3"), fold=False)
    before = settings_of(model)
    with pytest.raises(flexpatch.FlexpatchError, match=words):
        flexpatch.check_parity(model, **options)
    assert settings_of(model) == before


@parameterized.expand([
    (None, "expects a loaded causal language model, and got NoneType None"),
    ("name", "and got str 'name'. .* python -m flexpatch.verify NAME"),
    (torch.nn.Linear, "and got the class Linear"),
    (torch.nn.Linear(3, 3), "Linear holds no transformers model"),
])  # fmt: skip
def test_what_is_no_model(given: Any, words: str) -> None:
    with pytest.raises(flexpatch.FlexpatchError, match=words):
        flexpatch.check_parity(given)


@parameterized.expand([
    (AutoModel, "llama", "LlamaModel has no language model head"),
    (AutoModelForSequenceClassification, "llama", "LlamaForSequenceClassification has no language model head"),
    (AutoModelForTokenClassification, "qwen3", "Qwen3ForTokenClassification has no language model head"),
    (AutoModelForSeq2SeqLM, "t5", "model type 't5' is an encoder-decoder"),
    (AutoModel, "imagegpt", "no adapter for model type 'imagegpt'"),
])  # fmt: skip
def test_models_without_log_probs(kind: Any, model_type: str, words: str) -> None:
    sizes = dict(TINY, num_layers=1, d_model=32, d_kv=8, d_ff=32, num_heads=2) if model_type == "t5" else TINY
    model = kind.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(flexpatch.UnsupportedModelError, match=words):
        flexpatch.check_parity(model)
    assert not flexpatch.is_applied(model)


def test_a_saved_model_directory(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("qwen2", 1, dtype=torch.float32).save_pretrained(tmp_path)
    assert verify.main([str(tmp_path), "--dtype", "float32"]) == 0
    assert "windows dropped" in capsys.readouterr().out


def test_a_refused_model_directory(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path)
    assert verify.main([str(tmp_path)]) == 2
    assert "attention_dropout=0.1" in capsys.readouterr().err
