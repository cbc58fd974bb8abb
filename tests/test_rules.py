"""The rules that this folder keeps: nobody imports a test, and one way to run a test over many cases."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.quick import QUICK
from parameterized import parameterized

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


@parameterized.expand(["import test_rules", "def f():\n    from tests.test_rules import FILES", "import conftest"])
def test_imports_of_tests_are_found(source: str) -> None:
    assert among_tests(imported(source))


def test_helpers_and_programs_have_folders() -> None:
    """Pytest collects ``test_*.py`` alone: a file of another name beside them would be none."""
    assert {path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")} == {"conftest.py"}
    assert not list(TESTS.glob("*/test_*.py")) or {path.parent.name for path in TESTS.glob("*/test_*.py")} == {"gpu"}


def functions_of(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Tests of a file, and whether each is a method: of a ``unittest.TestCase``, as all classes of tests here are."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                yield function, isinstance(node, ast.ClassDef)


def wrong_cases(source: str) -> list[str]:
    """Tests over many cases that do it in the wrong way; the rule is in conftest.py."""
    wrong = []
    for function, method in functions_of(ast.parse(source)):
        calls = [(ast.unparse(d.func), d) for d in function.decorator_list if isinstance(d, ast.Call)]
        lists = [call for name, call in calls if name == "pytest.mark.parametrize"]
        expanded = [place for place, (name, _) in enumerate(calls) if name == "parameterized.expand"]
        given = {name for call in lists for name in re.findall(r"\w+", ast.unparse(call.args[0]))}
        fixtures = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} - given
        fixtures |= {name for name, _ in calls if name == "pytest.mark.usefixtures"}
        more = fixtures or len(lists) > 1 or any("pytest.param(" in ast.unparse(call) for call in lists)
        more = more or any(keyword.arg == "ids" for call in lists for keyword in call.keywords)
        if (lists and (method or not more)) or (expanded and function.decorator_list[0] is not calls[expanded[0]][1]):
            wrong.append(function.name)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_cases_are_given_in_one_way(file: Path) -> None:
    assert wrong_cases(file.read_text(encoding="utf-8")) == []


@parameterized.expand(
    [
        '@pytest.mark.parametrize("x", [1, 2])\ndef test(x): ...',
        "class Test:\n    @pytest.mark.parametrize('x', [1])\n    def test(self, x): ...",
        "@pytest.mark.slow\n@parameterized.expand([1, 2])\ndef test(x): ...",
    ]
)
def test_wrong_cases_are_found(source: str) -> None:
    assert wrong_cases(source) == ["test"]


@parameterized.expand(
    [
        '@pytest.mark.parametrize("x", [1, 2])\ndef test(x, tmp_path): ...',
        '@pytest.mark.parametrize("x", [1, 2], ids=str)\ndef test(x): ...',
        '@pytest.mark.parametrize("x", [1, 2])\n@pytest.mark.parametrize("y", [1, 2])\ndef test(x, y): ...',
        '@pytest.mark.parametrize("x", [1, pytest.param(2, marks=slow)])\ndef test(x): ...',
        "@parameterized.expand([1, 2])\n@pytest.mark.slow\ndef test(x): ...",
    ]
)
def test_right_cases_are_left_alone(source: str) -> None:
    assert wrong_cases(source) == []


@parameterized.expand(sorted(QUICK))
def test_quick_tests_exist(place: str) -> None:
    """Cases of a test are named by its name and theirs."""
    file, *names = re.split(r"::|\[", place.strip("[]"))
    source = (TESTS / file).read_text(encoding="utf-8")
    for name in names:
        words = name.split("_")
        beginnings = {name, *("def " + "_".join(words[:count]) + "(" for count in range(1, len(words) + 1))}
        assert any(beginning in source for beginning in beginnings), f"{place}: there is no {name}"
