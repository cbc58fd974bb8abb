"""``python -m flexpatch.env``: the report that a bug report needs."""

import getpass
import json
import os
import platform
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from parameterized import parameterized
from torch import nn

import flexpatch
from flexpatch import env
from flexpatch.models import tiny_model

HEAVY = ("peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "triton", "datasets")


def test_versions_are_read_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HEAVY:
        monkeypatch.setitem(sys.modules, name, None)  # from here on an import of it raises
    found = env.report()
    assert found["model"] is None
    assert found["versions"]["flexpatch"] == flexpatch.__version__
    assert found["versions"]["python"] == platform.python_version()
    for name in ("torch", "transformers", "peft", "numpy"):
        assert found["versions"][name] == version(name)
    assert found["versions"]["cuda of torch"] == torch.version.cuda


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "a-package-that-is-missing"))
    assert env.report()["versions"]["a-package-that-is-missing"] is None
    assert env.main([]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not installed"))
    assert line.split() == ["not", "installed", "a-package-that-is-missing"]


def test_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (*_, processor) = env.devices()
    assert processor["device"] == "cpu" and processor["memory"] > 0

    def module(kind: str) -> SimpleNamespace:
        card = SimpleNamespace(name=f"a {kind} card", major=9, minor=0, total_memory=80 * 2**30)
        return SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 2 if kind == "cuda" else 1,
            get_device_properties=lambda index: card,
        )

    monkeypatch.setattr(torch, "get_device_module", module)
    found = env.devices()
    assert [device["device"] for device in found] == ["cuda:0", "cuda:1", "xpu:0", "cpu"]
    assert found[1] == {"device": "cuda:1", "name": "a cuda card", "capability": "9.0", "memory": 80.0}
    assert found[2]["capability"] is None  # no such thing on XPU
    assert env.main([]) == 0
    assert "a cuda card, 9.0, 80.0 GiB" in capsys.readouterr().out


def test_settings_of_a_model() -> None:
    model: nn.Module = tiny_model("llama", dtype=torch.float32).train()
    before = env.report(model)["model"]
    assert before["applied"] is None and "backend" not in before
    assert before["attention"] == "sdpa" and before["class"] == "LlamaForCausalLM"
    assert (before["dtype"], before["device"], before["training"]) == ("float32", "cpu", True)
    assert before["gradient_checkpointing"] is False

    model.gradient_checkpointing_enable()
    flexpatch.apply(model, backend="dense", fold=False)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0)
    model = peft.get_peft_model(model, lora)
    after = env.report(model)["model"]
    assert after["class"] == "PeftModelForCausalLM of LlamaForCausalLM"
    assert after["gradient_checkpointing"] is True
    assert after["attention"] == "sdpa", "the original"
    assert after["applied"] == flexpatch.patch.settings_of(model)
    assert (after["applied"]["backend"], after["applied"]["fold"], after["backend"]) == ("dense", False, "dense")
    json.dumps(env.report(model))  # JSON types alone


@parameterized.expand([True, False])
def test_a_quantized_model_names_its_method(as_dict: bool) -> None:
    model = tiny_model("llama")
    settings = {"quant_method": "bitsandbytes"}
    model.config.quantization_config = settings if as_dict else SimpleNamespace(**settings)
    assert env.report(model)["model"]["quantized"] == "bitsandbytes"


def test_no_model_is_refused() -> None:
    with pytest.raises(flexpatch.FlexpatchError, match="holds no transformers model"):
        env.report(nn.Linear(2, 2))


@pytest.mark.parametrize(("name", "found"), [("llama", "LlamaForCausalLM"), ("gemma2", "Gemma2ForCausalLM")])
def test_command_line_with_an_architecture(name: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([name, "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["class"] == found and model["model_type"] == name
    assert model["device"] == "meta", "no weights are made"
    assert model["applied"]["backend"] == "auto" and model["backend"] == ("flex" if _accelerator() else "dense")
    assert env.main([name]) == 0
    text = capsys.readouterr().out
    assert any(line.split() == ["model", "class", found] for line in text.splitlines())
    assert "model applied" in text and "backend=auto, fold=True" in text


def _accelerator() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available()


def test_a_saved_model_is_described_from_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path)  # there are no weights to read
    assert env.main([str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["model"]["class"] == "Qwen3ForCausalLM"
    assert str(tmp_path) not in out


@pytest.mark.parametrize(
    ("name", "reason"),
    [("phimoe", "draws random numbers"), ("/nowhere/model.gguf", "there is no GGUF file"), ("", "is not a model")],
)
def test_command_line_with_a_model_that_cannot_be_described(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert env.main([name]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("flexpatch.env: could not describe") and reason in said.err


def test_nothing_is_sent_and_nobody_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert env.main(["llama"]) == 0
    said = capsys.readouterr().out
    assert os.getcwd() not in said and os.path.expanduser("~") not in said
    assert not {socket.gethostname(), getpass.getuser()} & set(said.split())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        env.main(["--help"])
    assert end.value.code == 0
    assert "Nothing is sent" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as end:
        env.main(["--unknown"])
    assert end.value.code == 2
