"""The public surface, the table of architectures, and rules of the source that no linter knows."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from parameterized import parameterized

import flexpatch

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in REPOSITORY.glob("flexpatch/*.py")}
ADAPTERS = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in REPOSITORY.glob("adapters/*.py")}
FLEX = "torch.nn.attention.flex_attention"


def imports(source: ast.AST) -> set[str]:
    """Dotted names of all modules a file imports, at any depth. ``from a import b`` counts as ``a``."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"flexpatch.{name.name}" for name in node.names if node.module == "flexpatch"}
    return found


def importers(module: str) -> set[str]:
    """The files of flexpatch/ that import ``module`` or anything in it."""
    return {
        name
        for name, source in SOURCES.items()
        if any(f"{imported}.".startswith(f"{module}.") for imported in imports(source))
    }


def test_all_is_sorted_and_complete() -> None:
    assert flexpatch.__all__ == sorted(flexpatch.__all__)
    assert set(flexpatch.__all__) == set(flexpatch._HOMES)
    typed = next(node for node in SOURCES["__init__"].body if isinstance(node, ast.If))
    static = {(statement.module, name.name) for statement in typed.body for name in statement.names}
    assert static == {(f"flexpatch.{module}", name) for name, module in flexpatch._HOMES.items()}


def test_importing_the_package_imports_no_framework() -> None:
    """And using it imports none that transformers does not import by itself; all its modules, no integration."""
    code = """
        import importlib, pkgutil, sys
        import flexpatch
        heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "trl", "datasets"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert flexpatch.apply.__module__ == "flexpatch.patch" and "torch" in sys.modules
        assert not {"peft", "bitsandbytes", "deepspeed", "trl", "datasets"} & set(sys.modules)
        for module in pkgutil.iter_modules(flexpatch.__path__):
            if module.name not in ("trl", "integrations"):
                importlib.import_module(f"flexpatch.{module.name}")
        others = ("flexpatch.integrations", "axolotl", "swift", "verl")
        assert not [name for name in sys.modules if name.startswith(others)]
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], check=True, timeout=300)


@parameterized.expand(flexpatch._MOVED.items())
def test_former_names_still_work(name: str, module: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"flexpatch.{name} is now flexpatch.{module}.{name}"):
        value = getattr(flexpatch, name)
    assert value is getattr(importlib.import_module(f"flexpatch.{module}"), name)


def test_a_name_that_never_was() -> None:
    with pytest.raises(AttributeError, match="module 'flexpatch' has no attribute 'fold_everything'"):
        flexpatch.fold_everything  # noqa: B018


@parameterized.expand([(name,) for name in flexpatch.__all__])
def test_public_names_are_documented(name: str) -> None:
    assert undocumented(getattr(flexpatch, name)) == []


def undocumented(value: Any) -> list[str]:
    """What a public function or class leaves unsaid: a first sentence, and each argument, field and method by name."""
    written = inspect.cleandoc(value.__doc__ or "")
    first = written.split("\n\n")[0].replace("\n", " ")
    # Dataclasses write a docstring by themselves: their name and arguments.
    missing = [] if re.match(r"[A-Z`].*\w+ \w+.*[.:;]", first) and "(self" not in first else ["a first sentence"]
    if inspect.isroutine(value):
        names = list(inspect.signature(value).parameters)
    elif dataclasses.is_dataclass(value):
        # How rows keep their masks is nobody else's business.
        names = [field.name for field in dataclasses.fields(value) if field.repr]
    else:
        names = list(getattr(value, "_fields", ()))
    missing += [name for name in names if not re.search(rf"\b{name}\b", written)]
    if inspect.isclass(value):
        methods = {key: member for key, member in vars(value).items() if not key.startswith("_")}
        kinds = classmethod, staticmethod, property
        methods = {key: m for key, m in methods.items() if inspect.isroutine(m) or isinstance(m, kinds)}
        missing += [key for key, method in methods.items() if not inspect.getdoc(method) and key not in names]
    return missing


@dataclasses.dataclass
class Bare:
    size: int

    @property
    def twice(self) -> int:
        return 2 * self.size

    @classmethod
    def of(cls) -> "Bare":
        return cls(1)


def short(number: int) -> None:
    """Returns nothing, and takes one argument of which it says nothing."""


def test_what_is_undocumented_is_noticed() -> None:
    assert undocumented(Bare) == ["a first sentence", "twice", "of"]
    Bare.__doc__ = "A thing with two words.\n\nNo more."
    assert undocumented(Bare) == ["size", "twice", "of"]
    assert undocumented(short) == ["number"]
    short.__doc__ = "number"
    assert undocumented(short) == ["a first sentence"]


def test_the_documentation_shows_the_support_table() -> None:
    start, end = "<!-- results/support -->", "<!-- end results/support -->"
    page = (REPOSITORY / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page.count(start) == page.count(end) == 1
    shown = page.split(start)[1].split(end)[0].strip()
    assert shown == flexpatch.support_table(), "docs/architectures.md is out of date: python benchmarks/pages.py"


def test_adapters_are_data() -> None:
    for name, source in ADAPTERS.items():
        others = {module for module in imports(source) if module.split(".")[0] not in sys.stdlib_module_names}
        allowed = {f"flexpatch.{module}" for module in ("registry", "layouts", "blocks", "pictures", "tiny")}
        assert others and others <= allowed, name


TESTS = sorted((REPOSITORY / "tests").rglob("test_*.py"))
# Errors of ours, and of Python's that many mistakes raise: any of them would do where no words are asked for.
BROAD = {"FlexpatchError", "UnsupportedModelError", "Exception", "ValueError", "TypeError", "RuntimeError", "KeyError"}


def loose(source: ast.AST) -> Iterator[str]:
    """Uses of ``pytest.raises`` and ``pytest.warns`` that nearly any message passes."""
    for node in ast.walk(source):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("pytest.raises", "pytest.warns"):
            continue
        match = next((keyword.value for keyword in node.keywords if keyword.arg == "match"), None)
        if match is None and node.args and ast.unparse(node.args[0]).removeprefix("flexpatch.") in BROAD:
            yield f"line {node.lineno}: no match="
        if isinstance(match, ast.Constant):
            short = [part for part in str(match.value).split("|") if len(re.findall(r"\w", part)) < 6]
            if short:
                yield f"line {node.lineno}: match={match.value!r}"


@parameterized.expand(
    [
        ("pytest.raises(FlexpatchError)", 1),
        ("pytest.raises(flexpatch.FlexpatchError)", 1),
        ("pytest.raises(ValueError, match='peft|adapter is odd')", 1),
        ("pytest.warns(FlexpatchWarning, match='CUDA')", 1),
        ("pytest.raises(ZeroDivisionError)", 0),
        ("pytest.raises(FlexpatchError, match='sample 3: no column')", 0),
        ("pytest.raises(FlexpatchError, match=words)", 0),
    ]
)
def test_loose_expectations_are_noticed(code: str, count: int) -> None:
    assert len(list(loose(ast.parse(code)))) == count


@parameterized.expand([(str(path.relative_to(REPOSITORY)),) for path in TESTS])
def test_tests_ask_for_the_words_of_an_error(path: str) -> None:
    assert list(loose(ast.parse((REPOSITORY / path).read_text(encoding="utf-8")))) == []


def test_only_some_files_know_transformers_and_flex() -> None:
    # Stages take its models; env, verify and parity report versions and settings; models loads models; callbacks
    # and run_ahead serve its Trainer.
    # branching asks for its version.
    stages = {"branching", "calls", "checkpointing", "compiled", "folding", "forward", "row_calls", "row_images"}
    assert (
        importers("transformers")
        <= {"internals", "dispatch", "models", "env", "parity", "verify", "callbacks", "trl", "image_costs", "towers"}
        | {"run_ahead"}
        | stages
    )
    assert {"internals", "dispatch"} <= importers("transformers")
    assert importers(FLEX) == {"arrival", "attention", "compiled", "dispatch", "masks", "row_calls", "unshare"}
    for leaf in ("env", "verify", "estimate", "trl", "callbacks", "autopatch", "integrations"):
        assert importers(f"flexpatch.{leaf}") == set()
    assert importers("trl") == {"trl"}


def test_imports_point_one_way() -> None:
    graph = {
        name: {other for other in SOURCES if f"flexpatch.{other}" in imports(source)}
        for name, source in SOURCES.items()
        if name != "__init__"
    }
    TopologicalSorter(graph).prepare()
    assert graph["tree"] == {"errors", "illustrated"}
    assert graph["illustrated"] == graph["losses"] == graph["packing"] == graph["layouts"] == {"errors"}
    assert graph["registry"] == {"errors", "layouts", "settings"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"errors": {"patch"}}).prepare()


def special_cases(source: ast.AST) -> Iterator[str]:
    """Comparisons of a ``model_type`` with something written in the code."""
    for node in ast.walk(source):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_type = ["model_type" in (getattr(side, "attr", ""), getattr(side, "id", "")) for side in sides]
            written = [
                isinstance(side, ast.Constant | ast.Tuple | ast.List | ast.Set) and ast.unparse(side) != "None"
                for side in sides
            ]
            if any(is_type) and any(written):
                yield ast.unparse(node)


@parameterized.expand(
    [
        ("config.model_type == 'llama'", 1),
        ("if 'llama' != model_type: pass", 1),
        ("x = config.model_type in ('llama', 'mistral')", 1),
        ("'gemma' in config.model_type", 1),
        ("model_type in adapter.tiny", 0),
        ("model_type is None", 0),
    ]
)
def test_special_cases_are_noticed(code: str, count: int) -> None:
    assert len(list(special_cases(ast.parse(code)))) == count


@parameterized.expand(sorted(SOURCES.items()))
def test_no_architecture_is_special(_name: str, source: ast.AST) -> None:
    assert list(special_cases(source)) == []
