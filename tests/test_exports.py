"""The public surface, the README's table, and rules of the source that no linter knows."""

import ast
import inspect
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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
    public = {
        name for name, value in vars(flexpatch).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(flexpatch.__all__) == public


@parameterized.expand([(name,) for name in flexpatch.__all__])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(flexpatch, name)
    written = inspect.cleandoc(value.__doc__ or "")
    assert len(written) > 20
    assert not written.startswith(f"{name}("), "the docstring a dataclass writes by itself"
    if inspect.isclass(value):
        methods = [member for key, member in vars(value).items() if not key.startswith("_")]
        assert all(inspect.getdoc(method) for method in methods if inspect.isroutine(method))


def test_readme_shows_the_support_table() -> None:
    start, end = "<!-- support table -->", "<!-- end support table -->"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme.count(start) == readme.count(end) == 1
    shown = readme.split(start)[1].split(end)[0].strip()
    how = 'python -c "import flexpatch; print(flexpatch.support_table())"'
    assert shown == flexpatch.support_table(), f"README.md is out of date; between its markers belongs: {how}"


def test_adapters_are_data() -> None:
    for name, source in ADAPTERS.items():
        others = {module for module in imports(source) if module.split(".")[0] not in sys.stdlib_module_names}
        assert others == {"flexpatch.registry"}, name


def test_only_some_files_know_transformers_and_flex() -> None:
    # verify and parity are leaves that report versions and settings; models loads models; callbacks serves its Trainer.
    assert importers("transformers") <= {"patch", "models", "parity", "verify", "callbacks"}
    assert "patch" in importers("transformers")
    assert importers(FLEX) == {"attention", "compiled", "masks", "patch"}
    for leaf in ("verify", "estimate", "trl", "callbacks"):
        assert importers(f"flexpatch.{leaf}") == set()
    assert importers("trl") == {"trl"}


def test_imports_point_one_way() -> None:
    graph = {
        name: {other for other in SOURCES if f"flexpatch.{other}" in imports(source)}
        for name, source in SOURCES.items()
        if name != "__init__"
    }
    TopologicalSorter(graph).prepare()
    assert graph["tree"] == graph["losses"] == graph["packing"] == graph["registry"] == {"errors"}
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
