"""Each example can be copied alone: it imports no other, uses public names alone, and is short."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from parameterized import parameterized

import flexpatch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))
# Modules that the documentation names, beside the top level. Only their own public names count.
MODULES = {"flexpatch.callbacks", "flexpatch.models", "flexpatch.registry", "flexpatch.trl"}
# What pyproject.toml installs for examples, the extras "examples" and "trl" with what they depend on.
PACKAGES = {"datasets", "flexpatch", "matplotlib", "peft", "PIL", "tokenizers", "torch", "tqdm", "transformers", "trl"}
MOST_LINES = {"lora_dpo.py": 199, "vlm_dpo.py": 140}


def imported(source: str) -> Iterator[tuple[str, str | None]]:
    """The modules that a program imports, with each name that it takes from them (``None``: the module itself)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def faults(source: str) -> list[str]:
    """Imports and names that a copied file would lack, or that are not public."""
    found = []
    for module, name in imported(source):
        package = module.split(".")[0]
        if package not in PACKAGES | sys.stdlib_module_names:
            found.append(module)
        elif module == "flexpatch":
            found += [f"flexpatch.{name}"] * (name not in {*flexpatch.__all__, None})
        elif package == "flexpatch" and module not in MODULES:
            found.append(module)
        elif module in MODULES and not (name and hasattr(import_module(module), name) and name[0] != "_"):
            found.append(f"{module}.{name}")
    used = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    used = {node.attr for node in used if ast.unparse(node.value) == "flexpatch"}
    return found + [f"flexpatch.{name}" for name in sorted(used - {*flexpatch.__all__, "__version__"})]


def test_all_examples_are_looked_at() -> None:
    assert {"lora_dpo.py", "preference_tree.py", "trl_dpo.py", "trl_grpo.py", "vlm_dpo.py"} <= set(FILES)
    assert set(MOST_LINES) <= set(FILES)


@parameterized.expand(FILES)
def test_an_example_stands_alone(name: str) -> None:
    assert faults((EXAMPLES / name).read_text(encoding="utf-8")) == []


@parameterized.expand(FILES)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES.get(name, 119)


@parameterized.expand(
    [
        ("from lora_dpo import load", ["lora_dpo"]),
        ("from .lora_dpo import load", [".lora_dpo"]),
        ("from flexpatch.errors import first_line", ["flexpatch.errors"]),
        ("from flexpatch.trl import _Sampler", ["flexpatch.trl._Sampler"]),
        ("from flexpatch.trl import missing", ["flexpatch.trl.missing"]),
        ("import flexpatch\nflexpatch.patch.weights(model)", ["flexpatch.patch"]),
        ("from flexpatch import patch", ["flexpatch.patch"]),
        ("import flexpatch, json\nflexpatch.apply(model)\nflexpatch.__version__", []),
        ("from flexpatch.trl import PackedDPOTrainer", []),
    ]
)
def test_faults_are_noticed(source: str, found: list[str]) -> None:
    assert faults(source) == found
