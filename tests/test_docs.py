"""Pages say what is true: links lead somewhere, tables and pictures are those of the results, README stays short."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from parameterized import parameterized

from benchmarks import pages

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
REPOSITORY = "https://github.com/flexpatch/flexpatch"
# A file of the repository, as a page or as it is.
FILE = re.compile(
    rf"(?:{re.escape(REPOSITORY)}/(?:blob|tree)|https://raw\.githubusercontent\.com/flexpatch/flexpatch)/main/([^#)\s]+)"
)


def prose(text: str) -> str:
    """Drop code: what looks like a link there is none."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    """Find the targets of links and images, written inline or as references."""
    text = prose(text)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Make the anchors of a page's headings, as GitHub and mkdocs do."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text: str, folder: Path) -> list[str]:
    """Find links to files and headings that do not exist."""
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if match := FILE.match(link):
            target = ROOT / match[1]
        elif link.startswith("https://"):
            continue
        else:
            target = folder / path
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def test_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    commands = re.findall(r"command -->\n```bash\n(.+)\n```", README)
    assert len(commands) == 2
    assert [line for line in lines if len(line) > 120 and not line.startswith("|") and line not in commands] == []


def test_links_are_into_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'Homepage = "{REPOSITORY}"' in project
    ours = [link for link in links(README) if "flexpatch/flexpatch" in link]
    assert len(ours) > 8 and all(FILE.fullmatch(link) for link in ours)


def test_readme_stands_alone() -> None:
    """A package index shows README without the repository: relative links and images would lead nowhere."""
    assert [link for link in links(README) if not link.startswith("https://")] == []
    assert len(FILE.findall(README)) > 8
    named = set(re.findall(r"\]\[(\w+)\]", prose(README)))
    assert named == set(re.findall(r"^\[(\w+)\]: ", README, re.MULTILINE))


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path.read_text(encoding="utf-8"), path.parent) == []


@parameterized.expand(
    [
        ("[a](nowhere.md)",),
        ("![a](images/nowhere.svg)",),
        ("[a](limits.md#nowhere)",),
        (f"[a]({REPOSITORY}/blob/main/docs/nowhere.md)",),
        (f"[a][b]\n\n[b]: {REPOSITORY}/blob/main/nowhere.md",),
    ]
)
def test_broken_links_are_found(text: str) -> None:
    assert len(broken(text, ROOT / "docs")) == 1
    assert broken("[a](limits.md#speed) `[b](nowhere.md)` [c](https://example.org)", ROOT / "docs") == []


def test_tables_are_those_of_the_results() -> None:
    assert [str(path) for path in pages.outdated()] == [], "python benchmarks/pages.py"


def test_an_outdated_table_is_noticed() -> None:
    page = next(path for path in DOCS if path.name == "performance.md").read_text(encoding="utf-8")
    assert pages.filled(page) == page
    assert pages.filled(page.replace("| hh |", "| hhh |", 1)) == page


def test_the_short_table_names_model_and_card() -> None:
    columns = (
        "lengths like",
        "stock, pairs/s (batch, checkpointing)",
        "one line, pairs/s",
        "packed, pairs/s",
        "one line",
    )
    head, rule = f"| {' | '.join(columns)} | packed |\n", "|---" * 6 + "|\n"
    first = "| hh | 2.0 (4, off) | 5.0 (8, off) | 6.0 | **2.50×** | **3.00×** |\n"
    text = head + rule + first + "\nDPOTrainer, Big, LoRA\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    made = pages.speed(text + "Conditions: Big shape, 32 layers, random weights, bfloat16, NVIDIA H9, torch 2\n")
    assert made.splitlines()[2:] == [
        "| hh | 2.0 | 5.0 (**2.50×**) | 6.0 (**3.00×**) |",
        "",
        "`DPOTrainer`, LoRA, Big, 32 layers, random weights, bfloat16, one H9.",
    ]
    with pytest.raises(SystemExit, match="no conditions"):
        pages.speed(text)


def test_every_result_is_shown() -> None:
    """Once and only once. Raw measurements of cards are shown by docs/cards.md in another form."""
    shown = [name for path in pages.PAGES for _, name, _ in pages.PART.findall(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(path.stem for path in pages.RESULTS.glob("*.md") if path.stem != "cards")


def test_samples_are_those_of_the_results() -> None:
    """Samples in README leave lines of a command's output out, and change none."""
    samples = re.findall(r"```text\n\$ python -m flexpatch\.(\w+) .*?```", README, re.DOTALL)
    assert samples == ["verify", "estimate"]
    for name in samples:
        sample = re.search(rf"```text\n(\$ python -m flexpatch\.{name} .*?)```", README, re.DOTALL)
        lines = (pages.RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
        assert sample and set(sample[1].splitlines()) <= set(lines)


def test_each_page_says_who_needs_it() -> None:
    for path in DOCS:
        first = path.read_text(encoding="utf-8").split("\n\n")[1]
        assert path.stem == "index" or first.startswith("For whoever "), path.name


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(links(index)) >= {path.name for path in DOCS if path.stem != "index"}
    contents = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(contents) == [path.name for path in DOCS]


def test_the_tree_names_every_file() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = design.split("<!-- files -->")[1].split("<!-- end files -->")[0]
    named = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "flexpatch").glob("[!_]*.py"))


# Pictures -----------------------------------------------------------------------------------------------------------


def drawn(path: Path) -> tuple[list[str], Counter[str]]:
    """Read a picture: its texts, and how many shapes have each color."""
    tree = ElementTree.parse(path)
    texts = ["".join(node.itertext()).strip() for node in tree.iter() if node.tag.endswith("}text")]
    return texts, Counter(re.findall(r"fill: (#\w+)", path.read_text(encoding="utf-8")))


def test_pictures_are_those_of_the_results(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "pictures.py"), str(tmp_path)]
    run = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for name in ("row.svg", "speed.svg", "paper.svg"):
        assert drawn(tmp_path / name) == drawn(ROOT / "docs" / "images" / name), "python benchmarks/pictures.py"


def environment() -> dict[str, str]:
    """Let a program of the repository find the library."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_bars_show_the_table() -> None:
    texts, _ = drawn(ROOT / "docs" / "images" / "speed.svg")
    rows = [row for row in pages.table((pages.RESULTS / "trainers.md").read_text(encoding="utf-8")) if row["packed"]]
    assert len(rows) == 6
    for row in rows:
        assert {row["lengths like"], row["one line"].strip("*"), row["packed"].strip("*")} <= set(texts)
        assert f"{row['one line']}" in README and f"{row['packed']}" in README
