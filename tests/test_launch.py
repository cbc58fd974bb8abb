"""``python -m flexpatch.launch``: programs that know nothing of flexpatch, with all models that they load patched."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import PROGRAMS, start_python

from benchmarks import frameworks
from flexpatch import launch
from flexpatch.models import tiny_model

LAUNCH = ["-m", "flexpatch.launch"]
QUICK = """
import os, sys
print(sys.argv[1:], os.environ["FLEXPATCH_OPTIONS"])
sys.exit(3)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_all_models_of_all_processes(model: str, tmp_path: Path) -> None:
    done = start_python([*LAUNCH, "--backend", "dense", str(PROGRAMS / "launched.py"), model], tmp_path, fails=True)
    assert done.returncode == 7, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flexpatch: ")]
    told = [re.sub(r" batches folded.*", "", line) for line in lines]
    # Loaded and made from a configuration, in a process that was started, and in one of multiprocessing.
    assert told.count("flexpatch: LlamaForCausalLM: 1 of 1") == 4
    assert told.count("flexpatch: LlamaForCausalLM (model): 2 of 2") == 1
    assert told.count("flexpatch: LlamaForCausalLM (reference): 2 of 2") == 2
    assert len(told) == 9
    assert [line for line in lines if line.startswith("flexpatch: NanoChatForCausalLM runs as it is: no adapter for")]
    assert [line for line in lines if "PeftModelForCausalLM runs as it is: dropout 0.5 in" in line]


def test_without_it_nothing_is_patched(model: str, tmp_path: Path) -> None:
    done = start_python([str(PROGRAMS / "launched.py"), model, "alone"], tmp_path, fails=True)
    assert done.returncode == 7 and "flexpatch" not in done.stderr
    with pytest.raises(ValueError, match="no batch was folded"):
        frameworks.folded(done.stdout + done.stderr)


@pytest.mark.parametrize("way", ["script", "module", "command"])
def test_programs(way: str, tmp_path: Path) -> None:
    """Arguments, the exit code, and a sitecustomize of the program's own."""
    (tmp_path / "quick.py").write_text(QUICK)
    (tmp_path / "quick").write_text(f"#!{sys.executable}\n{QUICK}")
    (tmp_path / "quick").chmod(0o755)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('of the program itself')")
    program = dict(script=["quick.py"], module=["-m", "quick"], command=["quick"])[way]
    paths = dict(
        PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        PYTHONPATH=os.pathsep.join([str(Path(launch.__file__).parents[1]), str(tmp_path / "site"), str(tmp_path)]),
    )
    arguments = [*LAUNCH, "--shared-dropout", "--recompute-layers=4", *program, "--backend", "-m", "two words"]
    done = start_python(arguments, tmp_path, paths, fails=True)
    assert done.returncode == 3
    own, said = done.stdout.splitlines()[-2:]  # the launcher's own Python has the program's sitecustomize too
    assert own == "of the program itself"
    assert said == "['--backend', '-m', 'two words'] --shared-dropout --recompute-layers=4"


def test_options_travel_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXPATCH_OPTIONS", raising=False)
    assert launch.options_of_environment() == {}
    monkeypatch.setenv("FLEXPATCH_OPTIONS", "--compile --recompute-layers auto --backend flex --shared-dropout")
    assert launch.options_of_environment() == dict(
        compile=True, recompute_layers="auto", backend="flex", shared_dropout=True
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no program was given"),
        (["no-such-command"], "there is no console command 'no-such-command'"),
        (["--backend", "fast", "train.py"], "invalid choice: 'fast'"),
    ],
)
def test_wrong_command_lines(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        launch.main(arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        launch.main(["--help"])
    shown = capsys.readouterr().out
    assert error.value.code == 0 and "--shared-dropout" in shown and "a console command" in shown


def test_another_python_runs_as_it_is(tmp_path: Path) -> None:
    """One without flexpatch, which a program of the environment may start."""
    (tmp_path / "flexpatch").mkdir()
    (tmp_path / "flexpatch" / "__init__.py").touch()
    path = os.pathsep.join([str(Path(launch.__file__).parent / "launched"), str(tmp_path)])
    done = start_python(["-c", "print('ran')"], tmp_path, dict(PYTHONPATH=path))
    assert done.stdout == "ran\n" and "flexpatch: it is not installed for" in done.stderr
