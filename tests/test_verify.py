"""The verifier: every architecture passes, and a wrong model, mask or weight does not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from parameterized import parameterized

import flexpatch
from flexpatch import parity, verify
from flexpatch.models import tiny_model, tiny_types
from flexpatch.patch import settings_of
from flexpatch.registry import adapters
from flexpatch.tree import Rows


@parameterized.expand(tiny_types())
def test_every_registered_architecture_passes(model_type: str) -> None:
    variants = adapters()[model_type].tiny[model_type]
    names = set()
    for variant in range(len(variants)):
        report = flexpatch.check_parity(tiny_model(model_type, variant))
        assert report.passed, str(report)
        checks = {check.name: check for check in report.checks}
        assert checks["log-probs, one row"].error <= 1e-10
        assert checks["gradients of the DPO loss"].error <= 1e-6
        controls = [check for check in report.checks if check.margin]
        assert len(controls) >= 3 and all(check.error >= 1000 * check.bound for check in controls)
        names |= set(checks)
    windowed = any({**variant, **variant.get("text_config", {})}.get("sliding_window") for variant in variants)
    assert ("control, log-probs: windows dropped" in names) == windowed


@parameterized.expand([("llama", torch.float32), ("qwen3", torch.bfloat16), ("gemma2", torch.float32)])
def test_low_precision_passes_within_the_stock_models_own_error(model_type: str, dtype: torch.dtype) -> None:
    report = flexpatch.check_parity(tiny_model(model_type, dtype=dtype))
    assert report.passed, str(report)


def test_a_wrong_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that lets the rejected answer see the chosen one must fail every check, and the exit code say so."""
    honest = parity.model_inputs

    def leaky(model: torch.nn.Module, rows: Rows, **kwargs: object) -> dict[str, object]:
        return honest(model, parity.replace(rows, ends=parity._whole_trees(rows), masks={}), **kwargs)

    monkeypatch.setattr(parity, "model_inputs", leaky)
    monkeypatch.setattr("flexpatch.logprobs.model_inputs", leaky)
    report = flexpatch.check_parity(tiny_model("llama"))
    failed = [check.name for check in report.checks if not check.passed]
    assert [name.split(",")[0].split(" (")[0] for name in failed] == [
        "leak", "log-probs", "log-probs", "gradients of the DPO loss",
    ]  # fmt: skip
    assert "FAILS  worst: sample " in str(report)
    assert verify.main(["llama"]) == 1


def test_a_control_that_is_not_caught_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_whole_trees", lambda rows: rows.ends)  # breaks nothing
    report = flexpatch.check_parity(tiny_model("llama"))
    assert not report.passed
    assert "NOT CAUGHT" in str(report)


def test_a_misdeclared_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral declared without its window: exactly what a wrong adapter file would do."""
    wrong = parity.replace(adapters()["mistral"], windows=lambda config: {"full_attention": None})
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


@parameterized.expand(
    [(["--lora"],), (["--gradient-checkpointing"],), (["--lora", "--gradient-checkpointing", "reentrant"],)]
)
def test_training_settings(
    options: list[str],
) -> None:
    for model_type in ("gemma2", "mixtral"):
        assert verify.main([model_type, *options]) == 0


def test_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["gemma", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["settings"]["dtype"] == "float64"
    assert {"name", "error", "bound", "passed", "margin", "detail"} == set(report["checks"][0])
    assert verify.main(["gemma"]) == 0
    assert "parity holds" in capsys.readouterr().out


@parameterized.expand([
    (["no-such-architecture-or-folder"], "no-such-architecture-or-folder"),
    (["missing.gguf"], "there is no GGUF file missing.gguf"),
    (["llama", "--device", "nowhere"], "nowhere"),
    (["llama", "--backend", "flex"], "FlexAttention"),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "flexpatch.verify", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 2, run.stderr
    assert words in run.stderr and "Traceback" not in run.stderr
    # bitsandbytes, which peft imports, says at once on some CPUs what else could be installed.
    lines = [line for line in run.stderr.strip().splitlines() if "kernels-community" not in line]
    assert len(lines) == 1


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
