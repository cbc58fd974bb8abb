"""Draw the pictures of README and docs: a row with its mask, the speed table as bars, the paper's figures as curves.

    python benchmarks/pictures.py      # writes docs/images/row.svg, speed.svg and paper.svg
    python benchmarks/pictures.py runs/pictures

The row comes from ``build_rows`` and the mask from ``dense_mask``: the code that training runs. The bars come from
benchmarks/results/trainers.md, the curves from benchmarks/results/paper.json. Text stays text in the files, so that a
test can read what they show.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from pages import RESULTS, ROOT, table

from flexpatch import Rows, Tree, build_rows
from flexpatch.masks import dense_mask

IMAGES = ROOT / "docs" / "images"
# One question with two answers that begin alike, and a second pair behind it in the same row.
WORDS = ["Name", "a", "prime", ".", "It", "is", "7", "8", "!", "1", "+", "1", "?", "2", ".", "11", "!"]
NODES = [0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 6, 6]
LABELS = ["prompt", "both answers", "chosen", "rejected", "second prompt", "chosen", "rejected"]
COLORS = ["#4878a8", "#7fa8c9", "#6a9f58", "#d1605e", "#6b6b9e", "#6a9f58", "#d1605e"]
STOCK, ONE_LINE, PACKED = "#b0b0b0", "#7fa8c9", "#4878a8"
PANELS = {"mlp": "3: MLP", "attention": "4: attention", "layer": "5: attention layer"}  # of the paper's figures
RATIOS = {0.5: "#d1605e", 1.0: "#c98a3d", 4.0: "#6a9f58", 16.0: "#4878a8"}


def example() -> Rows:
    """Build the row of the picture: two trees, whose token ids are their places in ``WORDS``."""
    ids = {node: [i for i, n in enumerate(NODES) if n == node] for node in set(NODES)}
    first = Tree.of(ids[0], ids[1] + ids[2], ids[1] + ids[3])
    return build_rows([[first, Tree.of(ids[4], ids[5], ids[6])]])


def draw_row(path: Path) -> None:
    """Draw each token of a row in the color of its node, with position and end, and the mask below."""
    rows = example()
    ids, positions, ends = (tensor[0].tolist() for tensor in (rows.input_ids, rows.position_ids, rows.ends))
    allowed = dense_mask(rows.ends, rows.position_ids, None)[0, 0]
    size = len(ids)
    figure, axes = pyplot.subplots(figsize=(6.4, 7.4), layout="constrained")
    axes.add_patch(Rectangle((0, 0), size, size, color="#f0f0f0"))
    for column, token in enumerate(ids):
        color = COLORS[NODES[token]]
        axes.add_patch(Rectangle((column, -3.6), 1, 1, **box(color)))
        axes.add_patch(Rectangle((-1, column), 1, 1, **box(color)))
        axes.text(column + 0.5, -3.13, WORDS[token], color="white", ha="center", va="center", fontsize=7)
        axes.text(column + 0.5, -2.1, str(positions[column]), ha="center", va="center", fontsize=8)
        axes.text(column + 0.5, -1.2, str(ends[column]), ha="center", va="center", fontsize=8)
        axes.text(-0.5, column + 0.5, WORDS[token], color="white", ha="center", va="center", fontsize=7)
        for key in range(size):
            if allowed[column, key]:
                axes.add_patch(Rectangle((key, column), 1, 1, **box(COLORS[NODES[ids[key]]])))
    for text, height in (("row", -3.13), ("position", -2.1), ("end", -1.2)):
        axes.text(-0.2, height, text, ha="right", va="center", fontsize=9)
    for node, label in enumerate(LABELS):
        at = [column for column, token in enumerate(ids) if NODES[token] == node]
        axes.text(at[0], -3.8, label, ha="left", va="bottom", fontsize=8, rotation=25)
    axes.text(
        size / 2, size + 0.3, "a query (line) sees the keys (columns) in color", ha="center", va="top", fontsize=9
    )
    axes.set(xlim=(-2.4, size + 0.2), ylim=(size + 1, -5.6), aspect="equal")
    axes.axis("off")
    save(figure, path)


def box(color: str) -> dict[str, Any]:
    """Style a square: a thin white edge parts it from its neighbours."""
    return dict(facecolor=color, edgecolor="white", linewidth=0.8)


def draw_speed(path: Path) -> None:
    """Draw the speed-ups of benchmarks/results/trainers.md as bars."""
    found = table((RESULTS / "trainers.md").read_text(encoding="utf-8"))
    pairs = [row for row in found if row["packed"]]
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    for shift, (kind, color) in enumerate((("stock", STOCK), ("one line", ONE_LINE), ("packed", PACKED))):
        texts = ["1×" if kind == "stock" else row[kind].strip("*") for row in pairs]
        bars = axes.bar(
            [i + 0.28 * (shift - 1) for i in range(len(pairs))],
            [float(text.rstrip("×")) for text in texts], 0.25, color=color,
            label={"stock": "stock, at its fastest", "packed": "packed batches"}.get(kind, kind),
        )  # fmt: skip
        axes.bar_label(bars, texts, fontsize=8)
    axes.set_xticks(range(len(pairs)), [row["lengths like"] for row in pairs])
    axes.set(ylabel="pairs a second, stock = 1")
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper left")
    save(figure, path)


def draw_paper(path: Path) -> None:
    """Draw figures 3 to 5 of the paper: what sharing gains over the fastest separate kernel, and the ideal, dashed."""
    points = json.loads((RESULTS / "paper.json").read_text(encoding="utf-8"))["figures"]["points"].values()
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axes, (part, title) in zip(panels, PANELS.items(), strict=True):
        for ratio, color in RATIOS.items():
            chosen = sorted((of for of in points if of["ratio"] == ratio), key=lambda of: int(of["prompt"]))
            prompts = [of["prompt"] for of in chosen]
            axes.plot(prompts, [of["ideal"][part] for of in chosen], "--", color=color, linewidth=1)
            gains = [of["mlp"] if part == "mlp" else of[f"{part}_best"] for of in chosen]
            axes.plot(prompts, gains, "o-", color=color, markersize=4, label=f"{ratio:g}")
        axes.axhline(1, color=STOCK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(prompts, [f"{prompt:,}" for prompt in prompts])
        axes.set(title=title, xlabel="tokens of the prompt")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="speed-up")
    figure.legend(*panels[0].get_legend_handles_labels(), title="prompt : answer", loc="outside right", frameon=False)
    save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the picture alone: no date, no random ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main(folder: Path) -> None:
    """Write all pictures to a folder."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flexpatch"})
    draw_row(folder / "row.svg")
    draw_speed(folder / "speed.svg")
    draw_paper(folder / "paper.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES, help="where to write them")
    main(parser.parse_args().folder)
