"""Benchmarks take the options that docs and results show, and their dry runs, which need no GPU, run to the end."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
COMMAND = re.compile(r"python benchmarks/[a-z_]+\.py[^`#\n]*")
CONTINUED = re.compile(r"\\+\n\s*")


def commands() -> dict[str, list[str]]:
    """Every command of a benchmark that a page or a benchmark shows, by its text: its words."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    texts = [*SCRIPTS.values(), *(page.read_text(encoding="utf-8") for page in pages)]
    found = {match.strip() for text in texts for match in COMMAND.findall(CONTINUED.sub(" ", text))}
    return {text: shlex.split(text)[1:] for text in sorted(found)}


def unknown(words: list[str]) -> list[str]:
    """The options of a command that its program, or one whose parser it takes, does not have."""
    source = SCRIPTS[Path(words[0]).name]
    taken = {f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)}
    source += "".join(SCRIPTS[name] for name in sorted(taken & set(SCRIPTS)))
    options = (word.partition("=")[0] for word in words[1:] if word.startswith("--"))
    return [option for option in options if f'"{option}"' not in source]


def test_options_of_commands_exist() -> None:
    assert len(commands()) > 60
    assert {text: missing for text, words in commands().items() if (missing := unknown(words))} == {}
    assert unknown(["benchmarks/paper.py", "--pieces", "sets", "--no-such-option"]) == ["--no-such-option"]


DRY = {text: words for text, words in commands().items() if "cpu" in words or "--tiny" in words}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("text", DRY)
def test_dry_runs(text: str, tmp_path: Path) -> None:
    program, *words = DRY[text]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
    command = [sys.executable, str(ROOT / program), *words, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir())
