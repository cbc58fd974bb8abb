"""Stand-ins of the programs that flexpatch/integrations serves: their interfaces, as their releases have them.

Each is read from the release that benchmarks/frameworks.py installs and runs: axolotl 0.19, ms-swift 4.6, verl 0.9.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def put(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """Let a module of another project be importable, with the packages it is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import a module of flexpatch/integrations anew; the next test does too."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class BasePlugin:
    """The part of axolotl.integrations.base.BasePlugin that flexpatch uses."""

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


def axolotl(settings: dict[str, Any], build: Callable[[], Any]) -> Any:
    """Build a trainer as axolotl does: with the plugins that its YAML file names, whose arguments are checked first."""
    plugins = []
    for path in settings["plugins"]:
        module, _, name = path.rpartition(".")
        plugins.append(getattr(importlib.import_module(module), name)())
    checked = dict(settings)
    for plugin in plugins:
        module, _, name = (plugin.get_input_args() or ".").rpartition(".")
        if name:
            checked |= getattr(importlib.import_module(module), name)(**settings).model_dump(exclude_none=True)
    trainer = build()
    for plugin in plugins:
        plugin.post_trainer_create(checked, trainer)
    return trainer


def import_external_file(file: str) -> ModuleType:
    """Import a plugin as swift.utils.import_external_file does, its folder first on ``sys.path``."""
    sys.path.insert(0, str(Path(file).parent))
    name = f"_swift_external_{hashlib.sha256(file.encode()).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def same_path() -> Iterator[None]:
    """Undo what a block does to ``sys.path``."""
    before = list(sys.path)
    yield
    sys.path[:] = before


class FSDPEngine:
    """The part of verl's engine that loads a model and runs it, with and without padding, on one process."""

    def __init__(self, folder: str, use_remove_padding: bool) -> None:
        self.folder, self.use_remove_padding = folder, use_remove_padding
        self.module = self._build_module()

    def _build_module(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of the tokens of a batch, without padding."""
        if not self.use_remove_padding:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
            return self.module(**given, use_cache=False).logits[mask.bool()]
        rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        given = dict(input_ids=torch.cat(rows)[None], attention_mask=None, position_ids=positions)
        return self.module(**given, use_cache=False).logits[0]
