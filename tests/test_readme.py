"""Programs in README and docs/ run as printed, but for the model's name and the length of training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenizers_offline import make_tokenizer

import flexpatch
from flexpatch.models import TINY, tiny_model

ROOT = Path(__file__).resolve().parent.parent


def programs(page: Path) -> list[str]:
    """Find the whole programs of a page: they import what they use."""
    return re.findall(r"```python\n(import flexpatch.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PROGRAMS = programs(ROOT / "README.md")
PAGES = {page.name: programs(page) for page in sorted((ROOT / "docs").glob("*.md")) if programs(page)}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with its tokenizer, in a directory; the working directory is the checkout."""
    tokenizer = make_tokenizer()
    monkeypatch.setitem(TINY, "vocab_size", len(tokenizer))
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    return tmp_path


def run(program: str, model: Path, **replaced: str) -> dict[str, Any]:
    name = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    for old, new in {name: repr(str(model)), **replaced}.items():
        assert old in program
        program = program.replace(old, new)
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def test_the_first_program(model: Path) -> None:
    out = str(model / "out")
    settings = f'DPOConfig("{out}", max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True)'
    names = run(PROGRAMS[0], model, **{'DPOConfig("out")': settings})
    saved = flexpatch.savings(names["model"])
    assert saved.batches == 4 and saved.factor > 1.2  # two steps, each with a reference pass


def test_rows_of_your_own(model: Path) -> None:
    names = run(PROGRAMS[1], model)
    assert names["logps"].shape == (2,)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())
    assert len(PROGRAMS) == 2


def test_rows_of_three_answers(model: Path) -> None:
    assert {name: len(found) for name, found in PAGES.items()} == {"trainers.md": 1}  # every program is run here
    names = run(PAGES["trainers.md"][0], model)
    assert names["logps"].shape == (3,) and names["rows"].sample_of_answer.tolist() == [0, 0, 0]
