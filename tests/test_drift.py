"""benchmarks/drift.py at its smallest: shared and paired train alike, a broken layout does not, and it is judged so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from parameterized import parameterized

import flexpatch
from benchmarks import drift

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
RUN = ("--shape", "nano", "--base-steps", "30", "--steps", str(STEPS), "--eval-every", "2", "--seeds", "0", "1")


PAIRS = ROOT / "examples" / "data" / "direct_answers.jsonl"


def as_text(row: dict[str, Any]) -> dict[str, str]:
    """Whole dialogues as text, as in HH-RLHF."""

    def turns(messages: list[dict[str, str]]) -> str:
        names = dict(user="Human", assistant="Assistant")
        return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)

    return {name: turns(row["prompt"] + row[name]) for name in ("chosen", "rejected")}


def script(*arguments: object) -> int:
    """The script's exit code, called here; what it prints is captured."""
    with mock.patch.object(sys, "argv", ["drift.py", *map(str, arguments)]):
        return drift.main()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    tokens = folder / "tokens.jsonl.gz"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(as_text(row)) + "\n" for row in flexpatch.read_jsonl(PAIRS)))
    assert script("prepare", data, tokens, "--held-out", 12, "--vocabulary", 300) == 0
    layouts = ("--layouts", *drift.LAYOUTS, "--lr", "0.01", "--device", "cpu", "--output", str(folder / "out"))
    # A process of its own, from which it starts another.
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    command = [sys.executable, str(ROOT / "benchmarks" / "drift.py"), "run", str(tokens), *RUN, *layouts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert "wrote drift.md and drift.png" in done.stdout, done.stderr
    return folder / "out"


@pytest.mark.slow
def test_shared_and_paired_train_alike_and_broken_does_not(output: Path) -> None:
    settings, runs = drift.read_records([output / "drift.jsonl"])
    assert settings["base"]["last_loss"] < settings["base"]["first_loss"] - 0.5
    assert len(runs) == 8
    for seed in (0, 1):
        losses = [record["loss"] for record in runs["paired", seed].steps.values()]
        assert len(losses) == STEPS and abs(losses[-1] - losses[0]) > 1e-3, "nothing was learnt"
        assert max(drift.differences(runs, "shared", seed).values()) < 1e-5
        assert max(drift.differences(runs, "eager", seed).values()) < 1e-5
        assert max(drift.differences(runs, "broken", seed).values()) > 1e-4
        assert runs["shared", seed].steps[1]["tokens"] < runs["paired", seed].steps[1]["tokens"]
        for layout in drift.LAYOUTS:
            assert list(runs[layout, seed].held_out) == [0, 2, 4]
            assert runs[layout, seed].held_out[0]["accuracy"] == pytest.approx(0.5)
    # Other seeds are other runs.
    assert runs["paired", 0].steps[STEPS]["loss"] != runs["paired", 1].steps[STEPS]["loss"]


@pytest.mark.slow
def test_a_run_cut_short_can_be_plotted(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (output / "drift.jsonl").read_text().splitlines()
    cut = tmp_path / "drift.jsonl"
    cut.write_text("\n".join([*lines[:15], lines[15][:40]]))
    assert script("plot", cut) == 1
    assert "not complete: " in capsys.readouterr().out
    for made in (tmp_path, output):
        assert (made / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "| shared | " in (output / "drift.md").read_text()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "drift.jsonl"
    damaged.write_text('{"layout"\n{}\n')
    assert script("plot", damaged) == 2
    assert script("prepare", PAIRS, tmp_path / "tokens.jsonl.gz", "--held-out", 4) == 2  # needs a chat template
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"drift.py: error: {damaged}, line 1: ")
    assert second.startswith("drift.py: error: ") and "no pair that can be used: sample 0: " in second


def records(**shifts: float) -> tuple[dict[str, Any], dict[tuple[str, int], drift.Curves]]:
    """Three seeds of layouts, each off from paired by so much at every step and in the end."""
    runs = {}
    for layout, shift in shifts.items():
        for seed in (0, 1, 2):
            value = 0.6 + 0.01 * seed + shift
            steps = {1: dict(loss=value, tokens=10.0, seconds=1.0)}
            runs[layout, seed] = drift.Curves(steps, {1: dict(loss=value, margin=0.0, accuracy=value)})
    settings = dict(
        settings=dict(steps=1, dtype="float32", batch_size=1, max_length=1, lora_rank=1, lr=1.0, beta=1.0, model="m"),
        asked=[(layout, seed) for layout in shifts for seed in (0, 1, 2)], versions={}, device="", base=None,
        training=1, held_out=1,
    )  # fmt: skip
    return settings, runs


@parameterized.expand(
    [
        (dict(paired=0.0, shared=1e-6), True),
        (dict(paired=0.0, shared=0.1), False),  # the end is beyond the noise of seeds, 0.016
        (dict(paired=0.0, shared=1e-6, eager=1e-6, broken=1e-3), True),
        (dict(paired=0.0, shared=1e-3, eager=1e-6, broken=1e-2), False),  # curves are farther apart than rounding
        (dict(paired=0.0, shared=1e-6, eager=1e-6, broken=1e-6), False),  # the control is not seen
        (dict(paired=0.0, eager=1e-6), False),  # nothing to judge
    ]
)
def test_verdicts(shifts: dict[str, float], held: bool) -> None:
    verdict, text = drift.judge(*records(**shifts))
    assert verdict == held, text
    assert ("**failed**" in text) != held


def test_a_missing_run_is_no_verdict() -> None:
    settings, runs = records(paired=0.0, shared=1e-6)
    del runs["shared", 2]
    verdict, text = drift.judge(settings, runs)
    assert not verdict and "not complete: shared, seed 2" in text


def test_records_of_several_calls(tmp_path: Path) -> None:
    """The settings are the first file's; the runs that were asked for are those of all."""
    files = []
    for layout in ("shared", "paired"):
        file = tmp_path / f"{layout}.jsonl"
        settings = dict(settings=dict(layouts=[layout], seeds=[5]), device=layout)
        record = dict(layout=layout, seed=5, step=1, loss=0.5)
        file.write_text(json.dumps(settings) + "\n" + json.dumps(record) + "\n")
        files.append(file)
    settings, runs = drift.read_records(files)
    assert settings["device"] == "shared" and settings["asked"] == [("shared", 5), ("paired", 5)]
    assert runs.keys() == {("shared", 5), ("paired", 5)}
