"""README's first program runs as printed, but for the model's name."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers_offline import make_tokenizer

from flexpatch.models import TINY, tiny_model

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setitem(TINY, "vocab_size", len(tokenizer))
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    program = re.search(r"```python\n(import flexpatch.*?)```", README.read_text(), re.DOTALL)
    assert program is not None
    names: dict[str, object] = {}
    exec(re.sub(r'name = ".*?"', f"name = {str(tmp_path)!r}", program[1]), names)
    logps, model = names["logps"], names["model"]
    assert isinstance(logps, torch.Tensor) and logps.shape == (2,)
    assert isinstance(model, torch.nn.Module)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
