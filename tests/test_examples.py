"""examples/lora_dpo.py, run as a user runs it, on a small random model."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tokenizers_offline import make_tokenizer
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch.models import TINY, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DATA = EXAMPLES / "data" / "direct_answers.jsonl"
HELD_OUT = 4
ROWS = 16


def example(*args: object) -> subprocess.CompletedProcess[str]:
    # Offline: the example must not look anything up on the hub.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "lora_dpo.py"), "--device", "cpu", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **sizes})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def outputs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    outputs = {}
    for layout in ("shared", "paired"):
        outputs[layout] = tmp_path_factory.mktemp(layout)
        settings = ("--steps", 3, "--batch-size", 4, "--limit", ROWS, "--held-out", HELD_OUT, "--lr", 0.01)
        arguments = [f"--{layout}", "--model", model_dir, "--output", outputs[layout], *settings]
        if layout == "shared":  # as a user starts it; the other one without the seconds that imports take
            done = example(*arguments)
            assert done.returncode == 0, done.stderr
        else:
            assert not runpy.run_path(str(EXAMPLES / "lora_dpo.py"))["main"]([*map(str, arguments), "--device", "cpu"])
    return outputs


def report(output: Path) -> dict:
    return json.loads((output / "losses.json").read_text())


def test_shared_and_paired_train_alike(outputs: dict[str, Path]) -> None:
    shared, paired = report(outputs["shared"]), report(outputs["paired"])
    losses = [torch.tensor([step["loss"] for step in r["steps"]], dtype=torch.float64) for r in (shared, paired)]
    assert len(losses[0]) == 3
    assert (losses[0] - losses[1]).abs().max() <= 1e-5
    # The steps have to do something for that to mean anything.
    assert (losses[0] - losses[0][0]).abs().max() > 1e-3
    assert shared["tokens"] == paired["tokens"]
    assert shared["tokens"]["shared"] < shared["tokens"]["paired"] < shared["tokens"]["paired_with_padding"]


def test_report_and_plot(outputs: dict[str, Path]) -> None:
    for layout, output in outputs.items():
        results = report(output)
        assert results["settings"]["paired"] == (layout == "paired")
        assert results["versions"]["flexpatch"] == flexpatch.__version__
        assert results["held_out"]["before"]["loss"] == pytest.approx(0.6931472, abs=1e-5)
        assert results["held_out"]["before"]["accuracy"] == 0.5
        assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_plain_peft_reloads_the_trained_adapter(outputs: dict[str, Path], model_dir: Path) -> None:
    """The reloaded adapter must give the held-out loss that the example measured on the model it trained."""
    collator = flexpatch.Collator(load_tokenizer(str(model_dir)))
    layouts = [collator.layout(row) for row in flexpatch.read_jsonl(DATA)[ROWS - HELD_OUT : ROWS]]
    for output in outputs.values():
        model = PeftModel.from_pretrained(load_model(str(model_dir), torch.float32), output)
        with torch.no_grad():
            policy = flexpatch.separate_logprobs(model, layouts).answers
            with model.disable_adapter():
                reference = flexpatch.separate_logprobs(model, layouts).answers
        after = report(output)["held_out"]["after"]["loss"]
        assert flexpatch.dpo_loss(policy, reference).loss.item() == pytest.approx(after, abs=1e-5)
        assert abs(after - 0.6931472) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "nowhere"),
        ("--device", "cuda:99"),
        ("--lr", "nan"),
        ("--beta", "-1"),
        ("--seed", "-1"),
        ("--steps", "0"),
        ("--seed", "9" * 30),
    ],
)
def test_settings_that_cannot_be_used(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "lora_dpo.py"))["main"](list(options))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1].partition(": error: ")[2]
    assert said.startswith((f"argument {options[0]}: ", f"{options[0]} "))


def test_bad_rows(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "lora_dpo.py"))["main"]
    lines = DATA.read_text(encoding="utf-8").splitlines()[:6]
    lines[2] = json.dumps({**json.loads(lines[2]), "rejected": []})
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    files = ("--model", model_dir, "--data", data, "--output", tmp_path / "out")
    settings = [*map(str, files), "--held-out", "2", "--steps", "1", "--device", "cpu"]
    assert main(settings) == 2
    said = capsys.readouterr()
    assert "sample 2: answer 1 is empty" in said.err
    assert not main([*settings, "--skip-bad-rows"])
    said = capsys.readouterr()
    assert said.out.count("skipped ") == 1 and "skipped sample 2: answer 1 is empty" in said.out
    assert not report(tmp_path / "out")["settings"]["paired"]  # shared is the default
