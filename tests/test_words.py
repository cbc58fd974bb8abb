"""Docstrings and comments keep the rule of the house, and files stay short.

A docstring begins with a verb or a concrete noun, so that a reader knows at once what the thing is or does. Pronouns
and question words at the beginning make a riddle of it. Public functions name their arguments, results and errors.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from parameterized import parameterized

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "flexpatch").rglob("*.py"))
FILES = [
    *LIBRARY,
    *(path for folder in ("adapters", "examples", "benchmarks") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))),
]
MOST_LINES = 300

# Words that begin neither a docstring nor a comment: a reader has not yet seen the thing they stand for.
POINTERS = r"(what|whatever|those|the same|this|these|it|its|they|there|that|which|whose)\b"
# Words that begin no docstring besides: they are neither verbs nor nouns.
FUNCTION_WORDS = r"(whether|why|how|where|when|if|of|from|by|as|in|with|without|for|to|than|not)\b"
# Words that begin no sentence.
RIDDLES = re.compile(r"(?:^|[.!?][)\"'`]*\s+|\n\n)(What(?!')|Those|The same)\b")
ERRORS = {"FlexpatchError", "UnsupportedModelError"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment. Comments on lines of their own that follow each other are one."""
    block, start, last = "", 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, own = token.start[0], token.line.lstrip().startswith("#")
            text = token.string.lstrip("#! ")
            if block and own and line == last + 1:
                block += f" {text}"
            else:
                if block:
                    yield start, block
                block, start = text, line
            last = line if own else 0
    if block:
        yield start, block


def riddles(source: str) -> list[str]:
    """Line and beginning of whatever breaks the rule."""
    found = []
    for texts, beginnings in ((docstrings, f"{POINTERS}|{FUNCTION_WORDS}"), (comments, POINTERS)):
        for line, text in texts(source):
            if re.match(beginnings, text, re.IGNORECASE) or RIDDLES.search(text):
                found.append(f"{line}: {text[:60]!r}")
    return found


def public_functions(source: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Name and definition of functions and methods that users may call."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    foreign = {
        a.asname or a.name for node in imports if not str(node.module).startswith("flexpatch") for a in node.names
    }
    for node in tree.body:
        # A class of another library documents the methods that subclasses, and theirs, override.
        overrides = isinstance(node, ast.ClassDef) and any(
            base in foreign - {"NamedTuple"} for base in names(node.bases)
        )
        if overrides:
            foreign.add(node.name)
        functions = node.body if isinstance(node, ast.ClassDef) and not overrides else [node]
        for function in functions:
            private = any(each.name.startswith("_") for each in (node, function) if hasattr(each, "name"))
            if isinstance(function, ast.FunctionDef) and not private:
                yield (function.name if function is node else f"{node.name}.{function.name}"), function


def names(expressions: list[ast.expr]) -> set[str]:
    return {node.id for each in expressions for node in ast.walk(each) if isinstance(node, ast.Name)}


def undocumented(source: str) -> list[str]:
    """Functions that lack a docstring, or a section of it.

    Two arguments or more need ``Args``, and ``Returns`` if there is a result. A function of one argument may tell both
    in a sentence. An error of the library that the function raises itself needs ``Raises``.
    """
    found = []
    for name, function in public_functions(source):
        text = ast.get_docstring(function) or ""
        given = function.args
        arguments = [
            a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")
        ]
        result = function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")
        raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
        needed = {
            "a docstring": not text,
            "Args:": len(arguments) > 1,
            "Returns:": len(arguments) > 1 and result,
            "Raises:": bool(ERRORS & names(raised)),
        }
        missing = [section for section, wanted in needed.items() if wanted and section not in text]
        missing += [f"the argument {a}" for a in arguments if "Args:" in text and not re.search(rf"\b{a}\b", text)]
        if missing:
            found.append(f"{function.lineno}: {name} lacks {', '.join(missing)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_begins_with_a_verb_or_a_noun(path: Path) -> None:
    assert riddles(path.read_text(encoding="utf-8")) == []


def test_modules_tell_of_themselves() -> None:
    """Two with one first sentence: one of them tells of the other, whose text an edit of several files gave it."""
    firsts: dict[str, list[str]] = {}
    for path in FILES:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        firsts.setdefault(text.partition("\n")[0], []).append(str(path.relative_to(ROOT)))
    assert {first: paths for first, paths in firsts.items() if first and len(paths) > 1} == {}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_public_functions_tell_what_they_take_and_give(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@parameterized.expand(
    [
        '"""What a row needs."""',
        '"""Those that fold."""',
        '"""whether it folds."""',
        'def f():\n    """Fold a batch. The same of rows."""',
        'class A:\n    """Rows.\n\n    What follows is unclear.\n    """',
        "# What is kept.",
        "# Kept here. Those of others are not.",
        "# Kept here, beside the rest.\n# What is left goes.",
        "x = 1  # which is odd",
    ]
)
def test_notices_riddles(source: str) -> None:
    assert len(riddles(source)) == 1


def test_lets_plain_words_pass() -> None:
    assert riddles('"""Rows of tokens. It is short."""\n# Keeps what is needed.\n#!shebang\nx = "# What"') == []


@parameterized.expand(
    [
        ("def f(a): ...", "a docstring"),
        ('def f(a, b):\n    """Fold."""', "Args:"),
        ('def f(a, b) -> int:\n    """Fold.\n\n    Args:\n        a, b: Rows.\n    """', "Returns:"),
        ('def f(a, b):\n    """Fold.\n\n    Args:\n        a: Rows.\n    """', "the argument b"),
        ('def f():\n    """Fold."""\n    raise FlexpatchError("no")', "Raises:"),
        ('class A:\n    def f(self, a, *, b):\n        """Fold."""', "Args:"),
        ('class A(NamedTuple):\n    def f(self, a, b):\n        """Fold."""', "Args:"),
    ]
)
def test_notices_missing_sections(function: str, missing: str) -> None:
    (found,) = undocumented(f"from typing import NamedTuple\n{function}")
    assert found.endswith(f"lacks {missing}")


def test_asks_private_functions_and_overrides_for_nothing() -> None:
    assert undocumented("def _f(a, b): ...\nclass _A:\n    def f(self, a, b): ...") == []
    assert undocumented("from torch import nn, Module\nclass A(Module):\n    def forward(self, a, b): ...") == []
    assert undocumented("from torch import nn\nclass A(nn.Module):\n    def forward(self, a, b): ...") == []
