"""Fill the tables of README and docs/ from benchmarks/results: ``python benchmarks/pages.py [RESULT FILE ...]``.

    python benchmarks/pages.py                                 # after a change of a results file, or of an adapter
    python benchmarks/pages.py levers runs/levers/table.md     # takes a new results file too
    python benchmarks/pages.py --check                         # changes nothing; exit code 1 if a page is out of date

A page shows benchmarks/results/levers.md between ``<!-- results/levers -->`` and ``<!-- end results/levers -->``. Two
results are made here: ``support`` from the adapters, and ``speed`` (README's short table) from ``trainers``.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import flexpatch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONDITIONS = re.compile(r"Conditions: (.+?), random weights, (\w+), NVIDIA (\w+(?: with \d+ GB of its memory)?)")
PART = re.compile(r"(<!-- results/(\w+) -->\n).*?(<!-- end results/\2 -->)", re.DOTALL)


def table(text: str) -> list[dict[str, str]]:
    """Read the first Markdown table of a text: a dict for each row, by the names of its columns."""
    after = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), after))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def speed(text: str) -> str:
    """Shorten the table of benchmarks/trainers.py to four columns, and name its model and GPU below."""
    lines = ["| lengths like | stock, pairs/s | one line | packed batches |", "|---|---|---|---|"]
    for row in table(text):
        cells = [row["lengths like"], row["stock, pairs/s (batch, checkpointing)"].split(" (")[0]]
        for rate, factor in (("one line, pairs/s", "one line"), ("packed, pairs/s", "packed")):
            cells.append(f"{row[rate].split(' (')[0]} ({row[factor]})" if row[rate] else "–")
        lines.append(f"| {' | '.join(cells)} |")
    found, kind = CONDITIONS.search(text), re.search("LoRA|full fine-tuning", text)
    if found is None or kind is None:
        raise SystemExit("the table of benchmarks/trainers.py tells no conditions: no 'Conditions: MODEL shape, ...'")
    model, dtype, card = found.groups()
    conditions = f"`DPOTrainer`, {kind[0]}, {model.replace(' shape', '')}, random weights, {dtype}, one {card}."
    return "\n".join([*lines, "", conditions]) + "\n"


def derived() -> dict[str, str]:
    """Make the results that nobody measures, by name."""
    trainers = (RESULTS / "trainers.md").read_text(encoding="utf-8")
    return dict(support=flexpatch.support_table() + "\n", speed=speed(trainers))


def result(name: str) -> str:
    """Read a results file, or make it if it is derived."""
    made = derived()
    return made[name] if name in made else (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def filled(page: str) -> str:
    """Put the present results between the markers of a page's text."""
    return PART.sub(lambda part: f"{part[1]}{result(part[2]).strip()}\n{part[3]}", page)


def outdated() -> dict[Path, str]:
    """Find results files and pages that differ from their sources: path -> the text that belongs there."""
    belongs = {RESULTS / f"{name}.md": text for name, text in derived().items()}
    belongs |= {path: filled(path.read_text(encoding="utf-8")) for path in PAGES}
    return {
        path: text for path, text in belongs.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fill or check; the exit code is 1 if a check finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", metavar="RESULT FILE", help="names of results, each with its new file")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    if len(options.results) % 2 or (options.check and options.results):
        parser.error("results come in pairs of a name and a file, and not with --check")
    for name, file in zip(options.results[::2], options.results[1::2], strict=True):
        (RESULTS / f"{name}.md").write_text(Path(file).read_text(encoding="utf-8"), encoding="utf-8")
    pages = outdated()
    for path, text in pages.items():
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'is filled anew'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
