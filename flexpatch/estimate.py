"""``python -m flexpatch.estimate DATA --tokenizer T``: estimate the savings of shared prompts on a preference file."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flexpatch.collator import Collator
from flexpatch.costs import PRESETS, Cost, Model, Sample, folded, images_of, model_of, padded
from flexpatch.errors import FlexpatchError, first_line
from flexpatch.files import read_rows
from flexpatch.image_costs import Gallery
from flexpatch.image_files import Picture, column_of, tried
from flexpatch.models import load_tokenizer
from flexpatch.packing import pack

BUDGETS = tuple(2**n for n in range(11, 17))
WASTE = 0.02
BUSY = 8192  # tokens; a GPU runs the kernels of shorter rows faster than its host launches them
RULE = (
    f"the smallest of at least {BUSY:,} (shorter rows leave a GPU waiting) whose rows are less than {WASTE:.0%} "
    "empty; if there is none, the budget whose rows are least empty"
)
ASSUMPTIONS = """\
Token counts are exact. Speed-ups are an estimate by FLOPs, not a measurement:
- Time is assumed proportional to FLOPs, forward and backward, policy and reference alike. Overheads are not modelled
  (kernel launches, memory traffic, partly filled attention blocks, masks, optimizer, communication): expect less.
- A token costs 2 FLOPs for each parameter of the linear layers (of the experts it is routed to). A token that sees
  another costs 4 * heads * head size FLOPs a layer. Sliding windows are ignored.
- In padded batches every column sees all columns before it. In folded and packed rows a token is computed once and sees
  the tokens before it in its sequence. FlexAttention (GPU) computes just these pairs; the dense backend computes all.
- Folded batches also share between rows of a dataset (a system prompt, the same prompt again). So do batches of packed
  trainers, whose tokens are counted here without.
- A batch that folding would shrink by less than a tenth runs as it was given, as after flexpatch.apply on a GPU.
- A token's logits cost 2 * hidden size * vocabulary FLOPs: for every column of padded and folded batches, since
  trainers ask for all logits; in packed rows for the tokens that predict an answer's tokens."""


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return mean, extremes and percentiles of some values. Percentiles are values that occur."""
    inner = {f"p{q}": np.percentile(values, q, method="inverted_cdf").item() for q in (10, 50, 90, 99)}
    return dict(mean=float(np.mean(values)), min=min(values), **inner, max=max(values))


def estimate(samples: Sequence[Sample], model: Model, *, batch_size: int, seed: int) -> dict[str, Any]:
    """Count the tokens of one epoch in four layouts, and predict speed-ups.

    Args:
        samples: Dataset rows, at least one.
        model: Sizes of the model whose FLOPs are counted.
        batch_size: Dataset rows of a padded batch.
        seed: Seed of the order of padded batches.

    Returns:
        Lengths, tokens, FLOPs, speed-ups and budgets, as JSON types.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    batches = [[samples[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    costs = dict(padded=Cost.total(map(padded, batches)), folded=Cost.total(map(folded, batches)))
    costs |= {f"packed_{name}": Cost.total(getattr(s, name) for s in samples) for name in ("unshared", "shared")}
    layouts: dict[str, dict[str, float]] = {}
    for name, cost in costs.items():
        layouts[name] = dict(**cost._asdict(), flops=model.flops(cost))
        layouts[name]["speedup"] = layouts["padded"]["flops"] / layouts[name]["flops"]
    lengths = dict(prompt=[s.prompt for s in samples], answer=[length for s in samples for length in s.answers])
    lengths |= dict(sequence=[len(x) for s in samples for x in s.sequences], tree=[s.shared.tokens for s in samples])
    budgets = []
    longest = max(lengths["tree"])
    for budget in [b for b in BUDGETS if b >= longest] or [1 << (longest - 1).bit_length()]:
        rows, unshared_rows = (len(pack(lengths[kind], budget)) for kind in ("tree", "sequence"))
        empty = 1 - costs["packed_shared"].tokens / (rows * budget)
        budgets.append(dict(budget=budget, rows=rows, empty=empty, unshared_rows=unshared_rows))
    good = [b for b in budgets if b["budget"] >= BUSY and b["empty"] < WASTE]
    best = good[0] if good else min(budgets, key=lambda b: b["empty"])
    about_images = images_of(samples, layouts, lengths, ASSUMPTIONS)
    return dict(
        rows=len(samples), answers=len(lengths["answer"]), batch_size=batch_size, seed=seed, layouts=layouts,
        lengths={name: percentiles(values) for name, values in lengths.items()},
        saved=percentiles([sample.saved() for sample in samples]),
        budgets=budgets, best_budget=best["budget"], rule=RULE,
        **dict(assumptions=ASSUMPTIONS) | about_images,
    )  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """Write the result of :func:`estimate` as text for a terminal."""
    heads = list(result["saved"])
    names = dict(prompt="a prompt", answer="an answer", sequence="a prompt with one answer")
    names |= dict(tree="a prompt with all its answers", image="an image")
    lengths = [["tokens of", *heads]]
    for name, values in result["lengths"].items():
        lengths.append([names[name], *(f"{values[head]:,.0f}" for head in heads)])
    lengths.append(["share that sharing saves", *(f"{result['saved'][head]:.0%}" for head in heads)])
    titles = [f"padded batches of {result['batch_size']} rows", "  folded by flexpatch.apply", "packed, unshared"]
    layouts = [["one epoch", "tokens", "of padded", "forward FLOPs", "expected speed-up"]]
    whole = result["layouts"]["padded"]["tokens"]
    for title, cost in zip([*titles, "packed, shared"], result["layouts"].values(), strict=True):
        share = f"{cost['tokens'] / whole:.1%}"
        layouts.append([title, f"{cost['tokens']:,}", share, f"{cost['flops']:.3g}", f"{cost['speedup']:.2f} x"])
    layouts_named = [name.removeprefix("packed_") for name in result["layouts"]]
    budgets = [["token budget of a row", "shared rows", "empty", "unshared rows"]]
    for b in result["budgets"]:
        budgets.append([f"{b['budget']:,}", f"{b['rows']:,}", f"{b['empty']:.1%}", f"{b['unshared_rows']:,}"])
    tables = ["\n".join(_line(row) for row in table) for table in (lengths, layouts, budgets)]
    first = f"{result['rows']:,} rows, {result['answers']:,} answers; FLOPs of {result['model']['name']}"
    if result["skipped"]:
        first += f"\nskipped {len(result['skipped']):,} rows; the first: {result['skipped'][0]}"
    if images := result.get("images"):
        table = [["images", "in prompts", *layouts_named], ["run in an epoch", f"{images['count']:,}"]]
        table[1] += [f"{layout['images']:,}" for layout in result["layouts"].values()]
        table.append(["the tower's share of FLOPs", "", *(f"{share:.0%}" for share in images["tower_share"].values())])
        tables.append("\n".join(_line(row) for row in table))
    best = f"best token budget: {result['best_budget']:,}: {RULE}"
    return "\n\n".join([first, *tables, best, result["assumptions"]])


def _line(cells: Sequence[str]) -> str:
    width = 80 // (len(cells) - 1)
    return f"{cells[0]:<30}" + "".join(f"{cell:>{width}}" for cell in cells[1:])


def plot(samples: Sequence[Sample], path: str) -> None:
    """Draw histograms of prompt and answer lengths, and of the tokens that sharing saves.

    Args:
        samples: Dataset rows, at least one.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = dict(prompts=[s.prompt for s in samples], answers=[length for s in samples for length in s.answers])
    every = [length for values in lengths.values() for length in values]
    edges = np.unique(np.geomspace(min(every), max(every) + 1, 31).round())
    for name, values in lengths.items():
        left.hist(values, edges, alpha=0.6, label=f"{name}, median {np.median(values):,.0f}")
    left.set(title="lengths", xlabel="tokens", ylabel="count", xscale="log")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.margins(y=0.3)  # room for the legend
    left.legend()
    saved = [100 * s.saved() for s in samples]
    right.hist(saved, np.linspace(0, 100, 41), color="tab:green", label=f"median {np.median(saved):.0f}%")
    right.set(title="share of its tokens that sharing saves", xlabel="% of a row's tokens", ylabel="dataset rows")
    right.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def read_samples(options: argparse.Namespace) -> tuple[list[Sample], list[str]]:
    """Read and tokenise the rows of the data file.

    Args:
        options: Parsed command line.

    Returns:
        The usable rows, and an error message for each row that was skipped.

    Raises:
        FlexpatchError: For the first unusable row without ``--skip-bad-rows``, and for a file without a usable row.
    """
    path = Path(options.data)
    folder = path if path.is_dir() else path.parent
    rows = read_rows(path, images=lambda value: tried(value, folder))[: options.limit]
    trusted = options.trust_remote_code
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=trusted) if options.tokenizer else None
    collator = Collator(tokenizer, max_length=options.max_length, on_long="truncate")
    samples, skipped, gallery = [], [], None
    for number, row in enumerate(tqdm(rows, desc="tokenising", unit="row", disable=None)):
        if tokenizer is None and "prompt_ids" not in row:
            raise FlexpatchError(f"sample {number}: a row without 'prompt_ids' needs --tokenizer")
        column = column_of(row)
        if column is not None and gallery is None:
            if tokenizer is None:
                raise FlexpatchError(f"sample {number}: a row with images needs --tokenizer, a model with a processor")
            model = None if options.model in PRESETS else options.model
            limits = dict(max_length=options.max_length, trust_remote_code=trusted)
            gallery = Gallery(options.tokenizer, model, tokenizer, **limits)
        try:
            if column is None or gallery is None:
                samples.append(Sample.of(collator.layout(row, number)))
                continue
            samples.append(Sample.of(*gallery.layout(row, _seen(row[column], folder, number), number)))
        except FlexpatchError as error:
            if not options.skip_bad_rows:
                raise FlexpatchError(f"{error} (--skip-bad-rows skips such rows)") from error
            skipped.append(str(error))
    if not samples:
        raise FlexpatchError(f"{options.data} holds no usable row; the first: {skipped[0]}")
    return samples, skipped


def _seen(value: Any, folder: Path, sample: int) -> list[Picture]:
    """Return the images of a row, which were looked at while tables were read."""
    looked = isinstance(value, FlexpatchError) or (isinstance(value, list) and isinstance(value[0], Picture))
    found = value if looked else tried(value, folder)
    if isinstance(found, FlexpatchError):
        raise FlexpatchError(f"sample {sample}: {found}")
    return found


def _positive(text: str) -> int:
    return _natural(text, 1)


def _natural(text: str, least: int = 0) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
    return value


def _check_matplotlib() -> None:
    """Refuse to draw without matplotlib, before minutes of tokenising."""
    if find_spec("matplotlib") is None:
        raise FlexpatchError("histograms need matplotlib: pip install matplotlib, or pass --no-plot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexpatch.estimate",
        description="Count the tokens and FLOPs of an epoch over a preference file in four layouts, and predict\n"
        "speed-ups: padded batches of stock trainers, padded batches folded by flexpatch.apply, and packed rows\n"
        "without and with shared prompts.",
        epilog=f"The best token budget of a row is {RULE}.\n\n{ASSUMPTIONS}\n\n"
        "exit code: 0 done, 2 wrong usage or unusable data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "data",
        help="file of rows that flexpatch.Collator reads: JSON Lines, a JSON array or CSV, plain or gzipped; with the "
        "datasets library installed also Parquet, Arrow, and folders of save_to_disk",
    )
    add(
        "--tokenizer",
        metavar="T",
        help="hub name, directory or GGUF file; not needed for token ids. For rows with images one with a processor",
    )
    add(
        "--model",
        default="8b",
        metavar="M",
        help=f"model whose FLOPs are counted: {', '.join(PRESETS)}, hub name, directory or GGUF file (%(default)s)",
    )
    add("--batch-size", type=_positive, default=8, metavar="N", help="dataset rows of a padded batch (%(default)s)")
    add(
        "--max-length", type=_positive, metavar="N", help="tokens of prompt + answer; longer answers are cut (no limit)"
    )
    add("--limit", type=_positive, metavar="N", help="use the first N rows only")
    add("--skip-bad-rows", action="store_true", help="skip rows that cannot be used, instead of stopping")
    add("--trust-remote-code", action="store_true", help="run code that comes with a tokenizer or configuration")
    add("--seed", type=_natural, default=0, metavar="N", help="seed of the order of padded batches (%(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", default="estimate.png", metavar="PNG", help="file for the histograms (%(default)s)")
    add("--no-plot", dest="plot", action="store_const", const=None, help="draw no histograms")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 unusable options or data."""
    options = _parser().parse_args(argv)
    try:
        if options.plot:
            _check_matplotlib()
        model = model_of(options.model, trust_remote_code=options.trust_remote_code)
        samples, skipped = read_samples(options)
        result = estimate(samples, model, batch_size=options.batch_size, seed=options.seed)
        result |= dict(data=options.data, skipped=skipped, model=dict(name=options.model, **model._asdict()))
        if options.plot:
            plot(samples, options.plot)
    except KeyboardInterrupt:
        print("flexpatch.estimate: interrupted", file=sys.stderr)
        return 2
    except (FlexpatchError, OSError) as error:
        print(f"flexpatch.estimate: error: {first_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(dict(**result, plot=options.plot), indent=1) if options.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
