"""The rules that this folder keeps: nobody imports a test."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name != "__init__.py")


def imported(source: str) -> Iterator[str]:
    """Names of all modules that a program imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def among_tests(names: Iterator[str]) -> list[str]:
    files = {path.stem for path in FILES if path.stem.startswith("test_") or path.stem == "conftest"}
    return [name for name in names if files & set(name.split("."))]


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nobody_imports_a_test(file: Path) -> None:
    """What several files need is in tests/helpers, what runs as a process in tests/programs."""
    assert among_tests(imported(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source", ["import test_rules", "def f():\n    from tests.test_rules import FILES", "import conftest"]
)
def test_imports_of_tests_are_found(source: str) -> None:
    assert among_tests(imported(source))


def test_helpers_and_programs_have_folders() -> None:
    """Pytest collects ``test_*.py`` alone: a file of another name beside them would be none."""
    assert {path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")} == {"conftest.py"}
    assert not list(TESTS.glob("*/test_*.py")) or {path.parent.name for path in TESTS.glob("*/test_*.py")} == {"gpu"}
