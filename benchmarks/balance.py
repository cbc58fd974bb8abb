"""Simulates how long ranks wait for one another in packed epochs of ``flexpatch.trl.PackedDPOTrainer``.

    python benchmarks/balance.py

Lengths are drawn with replacement, and each is changed by up to a tenth, so that a few hundred samples make a smooth
distribution.

A bin costs the FLOPs of a step of a model of Mistral-7B's shape: products with the layers' weights (6 x weights x
tokens), attention to visible pairs of tokens, and the output layer on answer tokens. A step takes as long as its
costliest rank; *waiting* is (costliest - mean) / mean over ranks. Compared:

packed      Bins of epoch_bins, which PackedDPOTrainer runs.
at random   Bins of epoch_bins, dealt to the ranks at random.
stock       Random pairs, right-padded to the longest of their rank, as many for every rank as make --budgets tokens on
            average. A padding token costs as much as a token.

Prints a table; writes table.md, balance.json and balance.png to --output. Exit code 1 if ranks wait for a twentieth of
an epoch's mean step or more in any set, budget and number of ranks.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from lengths import add_lengths
from tqdm import tqdm
from train import MISTRAL

import flexpatch
from flexpatch.packing import epoch_bins

TARGET = 0.05
KINDS = ("packed", "at random", "stock")
LINES = {
    ("stock", "mean"): "tab:red",
    ("at random", "mean"): "tab:blue",
    ("packed", "worst"): "tab:olive",
    ("packed", "mean"): "tab:green",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--pairs", type=int, default=60_000, help="pairs of an epoch (%(default)s)")
    add("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    add("--budgets", type=int, nargs="+", default=[8192, 16384, 32768], help="tokens of a row (%(default)s)")
    add("--output", type=Path, default=Path("runs/balance"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sets = json.loads(options.lengths.read_text())
    runs = []
    for name, budget in tqdm([(name, budget) for name in sets for budget in options.budgets], disable=None):
        triples = draw(np.array(sets[name]), options.pairs, np.random.default_rng(0))
        fewest = len(flexpatch.pack(triples.sum(1).tolist(), budget))
        runs += [simulate(name, triples, budget, ranks, fewest) for ranks in options.ranks]
    (options.output / "balance.json").write_text(json.dumps(runs, indent=1))
    report = table(runs, options)
    (options.output / "table.md").write_text(report)
    plot(runs, options.output / "balance.png")
    print(report)
    return int(any(run["packed"]["mean"] >= TARGET for run in runs))


def draw(triples: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    drawn = triples[rng.integers(0, len(triples), pairs)]
    return np.maximum(1, np.rint(drawn * rng.uniform(0.9, 1.1, drawn.shape))).astype(np.int64)


def simulate(name: str, triples: np.ndarray, budget: int, ranks: int, fewest: int) -> dict[str, Any]:
    """Cost one epoch of every kind. ``fewest`` counts the bins that first-fit-decreasing needs without ranks."""
    tokens, costs = triples.sum(1), shared_flops(triples)
    bins = epoch_bins(tokens.tolist(), budget, ranks=ranks)
    counts = np.array([len(some) for some in bins]).reshape(-1, ranks)
    assert (counts == counts[:, :1]).all(), "ranks of a step hold equally many pairs"
    costs_B = np.array([costs[some].sum() for some in bins])
    fill = np.array([tokens[some].sum() for some in bins]) / budget
    assert fill.max() <= 1
    return dict(
        set=name, budget=budget, ranks=ranks, steps=len(counts), fewest_steps=-(-fewest // ranks), fill=fill.mean(),
        packed=waiting(costs_B.reshape(-1, ranks)),
        **{"at random": waiting(np.random.default_rng(0).permutation(costs_B).reshape(-1, ranks))},
        stock=waiting(stock_flops(triples, budget, ranks, np.random.default_rng(0))),
    )  # fmt: skip


def waiting(costs_SR: np.ndarray) -> dict[str, float]:
    """Average over an epoch's steps how far the costliest rank exceeds the mean of the ranks."""
    waits = costs_SR.max(1) / costs_SR.mean(1) - 1
    return dict(mean=waits.mean(), p95=np.percentile(waits, 95), worst=waits.max())


def shared_flops(triples: np.ndarray) -> np.ndarray:
    """FLOPs of each pair in a shared row, forward and backward."""
    prompt, chosen, rejected = triples.astype(float).T
    visible = triangle(prompt) + prompt * (chosen + rejected) + triangle(chosen) + triangle(rejected)
    return flops(prompt + chosen + rejected, visible, chosen + rejected)


def stock_flops(triples: np.ndarray, budget: int, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """FLOPs of random padded batches, (steps, ranks), with equally many pairs each. Attention skips later tokens."""
    prompt, chosen, rejected = triples.T
    longest = prompt + np.maximum(chosen, rejected)
    order = rng.permutation(len(triples))

    def mean_tokens(size: int) -> float:
        whole = longest[order[: len(order) // size * size]].reshape(-1, size)
        return float(2 * size * whole.max(1).mean())

    size = 1
    while mean_tokens(size + 1) <= budget:
        size += 1
    steps = len(order) // (size * ranks)
    batches = order[: steps * size * ranks].reshape(steps, ranks, size)
    padded = longest[batches].max(2).astype(float)
    answers = (chosen + rejected)[batches].sum(2)
    return flops(2 * size * padded, 2 * size * triangle(padded), answers)


def triangle(length: Any) -> Any:
    return length * (length + 1) / 2


def flops(tokens: Any, visible: Any, answers: Any) -> Any:
    """FLOPs, forward and backward: 6 for every weight and token, 12 for every visible pair and unit of the heads."""
    shape: Any = MISTRAL
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    weights = 2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"]
    return layers * (6.0 * weights * tokens + 12.0 * width * visible) + 6.0 * shape["vocab_size"] * width * answers


# --- report -----------------------------------------------------------------------------------------------------------


def table(runs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    few, many = min(options.ranks), max(options.ranks)
    heads = ["lengths like", *(f"waiting: {ranks} ranks" for ranks in (few, many))]
    heads += [f"worst step, {few} to {many} ranks", f"at random: {many} ranks"]
    heads += [*(f"stock: {ranks} ranks" for ranks in (few, many)), f"rows full: {few} ranks"]
    heads += [f"steps (fewest): {ranks} ranks" for ranks in (few, many)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(run["set"] for run in runs):
        here = [run for run in runs if run["set"] == name]
        worst = [max(run["packed"]["worst"] for run in here if run["budget"] == budget) for budget in options.budgets]
        first, last = ([run for run in here if run["ranks"] == ranks] for ranks in (few, many))
        cells = [name, *(percents([run["packed"]["mean"] for run in some], 2) for some in (first, last))]
        cells += [percents(worst, 1), percents([run["at random"]["mean"] for run in last], 0)]
        cells += [percents([run["stock"]["mean"] for run in some], 0) for some in (first, last)]
        cells.append(percents([run["fill"] for run in first], 1))
        cells += [", ".join(f"{run['steps']:,} ({run['fewest_steps']:,})" for run in some) for some in (first, last)]
        lines.append(f"| {' | '.join(cells)} |")
    budgets = ", ".join(f"{budget:,}" for budget in options.budgets)
    caption = (
        f"Simulated epochs of {options.pairs:,} pairs (drawn with replacement, lengths changed by up to a tenth) in "
        f"rows of {budgets} tokens; FLOPs of a Mistral-7B step. *Waiting*: by how much the costliest rank of a step "
        "exceeds the mean, over the epoch's mean step; *at random*: the same rows, dealt at random; *stock*: random "
        "pairs, padded; *fewest*: first-fit-decreasing without ranks. `python benchmarks/balance.py`"
    )
    return "\n".join([*lines, "", caption])


def percents(values: list[float], digits: int) -> str:
    return ", ".join(f"{100 * value:.{digits}f}" for value in values) + " %"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(run["set"] for run in runs))
    budgets = list(dict.fromkeys(run["budget"] for run in runs))
    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.5), layout="constrained", sharex=True, sharey=True)
    for axes, name in zip(panels.flat, names, strict=False):
        for budget, style in zip(budgets, ("-", "--", ":"), strict=False):
            here = [run for run in runs if (run["set"], run["budget"]) == (name, budget)]
            ranks = [run["ranks"] for run in here]
            for (kind, of), color in LINES.items():
                label = f"{kind}, {of} step" if budget == budgets[0] else None
                axes.plot(ranks, [100 * run[kind][of] for run in here], style, color=color, label=label)
        axes.axhline(100 * TARGET, color="black", linewidth=0.8, label=f"{TARGET:.0%}")
        axes.set(title=name, xscale="log", yscale="log")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel(
        "ranks; solid, dashed, dotted: rows of " + ", ".join(f"{budget:,}" for budget in budgets) + " tokens"
    )
    figure.supylabel("% by which the costliest rank exceeds the mean")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
