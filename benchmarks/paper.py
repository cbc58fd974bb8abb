"""Reproduces the tables and figures of arXiv 2410.20305, Accelerating DPO with Prefix Sharing, on one GPU.

    python benchmarks/paper.py                       # all pieces, on a GPU
    python benchmarks/paper.py --pieces medians      # one piece, within ten minutes
    python benchmarks/paper.py --pieces --resume a/paper.json b/paper.json     # one table of several calls
    python benchmarks/paper.py --device cpu --shape tiny --whole tiny --dtype float32 --shared-tokens 2048 \\
        --points TLDR hh 512:4

Pieces, the most telling first:

medians   Tables 1 and 2: training steps at the median pair of each of the paper's six datasets, in layers as wide as
          a 7B model's. No packing: micro-batches of --micro-pairs pairs. Packing: as many pairs as fit --shared-tokens.
figures   Figures 3 to 5: the MLP, attention alone and the attention layer, over lengths and ratios.
sets      Tables 1 and 2 again, on pairs with lengths of real sets.
whole     Table 2 at the six medians in a whole 7B model.

Steps are those of benchmarks/train.py --modes full, layers those of benchmarks/layers.py. Table 3 asks whether training
ends elsewhere: benchmarks/drift.py answers that, and its present result is read. No point of a piece begins after
--seconds, and a call with --resume leaves out what its files have. Prints the tables, and writes them with paper.json
to --output after every point. Exit code 1 if log-probs of a layout are off beyond rounding.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import layers
import torch
import train
import transformers
from lengths import add_lengths
from pages import RESULTS
from pages import table as read_table
from transformers.models.mistral import modeling_mistral as mistral


class Dataset(NamedTuple):
    """Line of the paper's tables 1 and 2.

    Samples a second are of FA3, FlexAttention and FlexAttention with prefix sharing; then come the last one's speed-ups
    over the first two, as published.
    """

    length: int  # median
    ratio: float  # median of prompt to completion
    unpacked: tuple[float, float, float, float, float]
    packed: tuple[float, float, float, float, float]

    @property
    def pair(self) -> list[int]:
        """Tokens of a prompt and of two answers. The length is taken as that of a prompt with one answer."""
        answer = round(self.length / (1 + self.ratio))
        return [self.length - answer, answer, answer]


# As in the README of the authors' repository, github.com/frankxwang/dpo-prefix-sharing.
PAPER = {
    "Capybara": Dataset(1160, 1.59, (8.38, 7.75, 11.90, 1.42, 1.54), (17.89, 17.63, 23.89, 1.34, 1.36)),
    "HH-RLHF": Dataset(186, 2.15, (33.71, 30.25, 36.11, 1.07, 1.19), (109.77, 104.99, 155.04, 1.41, 1.48)),
    "MetaMath-DPO": Dataset(872, 3.91, (13.86, 13.02, 19.13, 1.38, 1.47), (24.21, 23.83, 38.07, 1.57, 1.60)),
    "TLDR": Dataset(416, 11.14, (31.43, 29.53, 35.36, 1.12, 1.20), (44.11, 43.22, 59.76, 1.35, 1.38)),
    "Tulu-Helpsteer": Dataset(775, 6.34, (14.83, 13.93, 21.75, 1.47, 1.56), (29.85, 28.98, 44.10, 1.48, 1.52)),
    "UltraFeedback": Dataset(409, 0.42, (18.40, 17.31, 20.46, 1.11, 1.18), (45.46, 44.13, 53.21, 1.17, 1.21)),
}
UNPACKED = ("padded pairs", "padded pairs, flex", "shared padded")
PACKED = ("packed pairs", "packed pairs, flex", "shared packed")
PROMPTS, RATIOS = (512, 2048, 8192), (1.0, 4.0, 16.0, 0.5)
KERNELS = (
    "paired, SDPA flash", "paired, SDPA cuDNN", "paired, FA4", "paired, flex", "shared, flex", "shared, flex FLASH"
)  # fmt: skip
EXPECTED = {"medians": 5, "figures": 4, "sets": 6, "whole": 6}  # minutes on an H200
Points = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--pieces", nargs="*", choices=EXPECTED, default=list(EXPECTED), help="(%(default)s)")
    add("--points", nargs="+", help="only these datasets, sets, or points such as 512:4 (default: all)")
    add("--shape", choices=train.SHAPES, default="8 layers of Mistral-7B", help="of medians and sets (%(default)s)")
    add("--whole", choices=train.SHAPES, default="Mistral-7B", help="of whole (%(default)s)")
    add("--micro-pairs", type=int, default=4, help="pairs of a micro-batch without packing (%(default)s)")
    add("--shared-tokens", type=int, default=16384, help="tokens of a packed shared row, at most (%(default)s)")
    add("--repeats", type=int, default=3, help="timed steps of each layout, after one more (%(default)s)")
    add("--seconds", type=float, default=540, help="begin no point of a piece after so many seconds (%(default)s)")
    add("--resume", type=Path, nargs="+", default=[], metavar="JSON", help="paper.json of earlier calls")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/paper"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for path in options.resume:
        for piece, found in json.loads(path.read_text()).items():
            add_points(results, piece, found["conditions"], found["points"])
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
    for piece in options.pieces:
        measure_piece(piece, options, results)
        train.free_memory()
    write(results, options.output)
    print("\n" + report(results), flush=True)
    return int(any(point.get("wrong") for found in results.values() for point in found["points"].values()))


def measure_piece(piece: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure the points of a piece that ``results`` does not have, until time is up."""
    start = time.perf_counter()
    print(f"{piece}: about {EXPECTED[piece]} minutes on an H200, at most {options.seconds / 60:.0f}", flush=True)
    conditions, points = MEASURE[piece](options)
    done = add_points(results, piece, conditions, {})
    for name, measure in points:
        if name in done or (options.points and name not in options.points):
            continue
        began = time.perf_counter()
        if began - start > options.seconds:
            print(f"{piece}: time is up before {name}; --resume goes on", flush=True)
            break
        done[name] = measure()
        print(f"{piece}, {name}: {time.perf_counter() - began:.0f} s, {done[name]}", flush=True)
        write(results, options.output)


def add_points(results: dict[str, Any], piece: str, conditions: str, points: dict[str, Any]) -> dict[str, Any]:
    """Add points to a piece's, and return all of these.

    Raises:
        SystemExit: If the piece has points that were measured under other conditions.
    """
    found = results.setdefault(piece, dict(conditions=conditions, points={}))
    if found["conditions"] != conditions:
        raise SystemExit(f"{piece}: measured under other conditions: {found['conditions']}; now {conditions}")
    found["points"].update(points)
    collected: dict[str, Any] = found["points"]
    return collected


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "paper.json").write_text(json.dumps(results, indent=1))
    (folder / "table.md").write_text(report(results))


# Measuring ----------------------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace, shape: str, lengths: dict[str, Any], layouts: tuple[str, ...]) -> Any:
    """Prepare training steps of one model on several sets: the conditions, and a function for each set."""
    given = [str(options.lengths), "--shapes", shape, "--modes", "full", "--device", options.device]
    given += ["--dtype", options.dtype, "--shared-tokens", str(options.shared_tokens)]
    given += ["--micro-pairs", str(options.micro_pairs), "--repeats", str(options.repeats), "--layouts", *layouts]
    chosen = train.make_parser().parse_args(given)
    kernel = train.choose_kernel(chosen)
    chosen.padded_attention = padded_attention(options, kernel)
    padded = f"; padded pairs on {chosen.padded_attention}, {options.micro_pairs} in a micro-batch"
    conditions = (
        f"{shape}, {about(options)}; a step: forward and backward in all weights with gradient checkpointing, "
        f"reference given, no optimizer{padded if UNPACKED[0] in layouts else ''}; packed pairs on {kernel}; "
        f"shared rows of at most {options.shared_tokens:,} tokens"
    )

    def points() -> Points:
        job = train.make_job(shape, "full", kernel, chosen)
        for name, triples in lengths.items():
            yield name, lambda name=name, triples=triples: train.measure_set(job, name, triples, chosen)  # type: ignore[misc]

    return conditions, points()


def padded_attention(options: argparse.Namespace, kernel: str) -> str:
    """Pick FlashAttention-4 for padded pairs if packed pairs run on it and it trains a padded batch here, else sdpa."""
    if kernel != "fa4":
        return "sdpa"
    name = "flash_attention_4"
    small = train.MISTRAL | dict(hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = transformers.MistralConfig(**small | dict(num_key_value_heads=1, vocab_size=64))
    try:
        with torch.device(options.device):
            model = transformers.MistralForCausalLM._from_config(
                config, dtype=getattr(torch, options.dtype), attn_implementation=name
            )
            ids, mask = torch.full((2, 300), 7), torch.ones(2, 300, dtype=torch.long)
        mask[1, 200:] = 0
        model(ids, mask, use_cache=False).logits.sum().backward()
    except Exception as error:
        print(f"padded pairs cannot run on {name}: {type(error).__name__}: {error}", flush=True)
        return "sdpa"
    return name


def about(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"random weights, {options.dtype}, {device}, {versions}"


def medians(options: argparse.Namespace) -> Any:
    return steps(options, options.shape, {name: [of.pair] for name, of in PAPER.items()}, UNPACKED + PACKED)


def sets(options: argparse.Namespace) -> Any:
    return steps(options, options.shape, json.loads(options.lengths.read_text()), UNPACKED + PACKED)


def whole(options: argparse.Namespace) -> Any:
    return steps(options, options.whole, {name: [of.pair] for name, of in PAPER.items()}, PACKED)


def figures(options: argparse.Namespace) -> Any:
    """Prepare benchmarks/layers.py: the conditions, and a function for each point."""
    cuda = options.device == "cuda"
    shape = layers.SHAPE if cuda else layers.SMALL
    tokens = 16384 if cuda else 512
    setup = layers.Setup(torch.device(options.device), getattr(torch, options.dtype), shape, tokens, math.inf)
    setup.unavailable.update((name, "left out") for name in layers.KERNELS if name not in KERNELS)
    kind = "forward and backward" if cuda else "forward, a small shape"
    conditions = f"{kind}, {about(options)}; batches of at least {tokens:,} unshared tokens"

    def points() -> Points:
        config = transformers.MistralConfig(**setup.shape, sliding_window=None)
        config._attn_implementation = "benchmarked"
        with setup.device:
            parts = (
                mistral.MistralMLP(config), mistral.MistralAttention(config, 0), mistral.MistralRotaryEmbedding(config)
            )  # fmt: skip
        modules = [part.to(setup.dtype).eval() for part in parts]
        for prompt in PROMPTS if cuda else (64, 128):
            for ratio in RATIOS:
                point = (setup, prompt, ratio, modules)
                yield f"{prompt}:{ratio:g}", lambda point=point: layers.measure_point(*point)  # type: ignore[misc]

    return conditions, points()


MEASURE: dict[str, Callable[[argparse.Namespace], Any]] = dict(
    medians=medians, figures=figures, sets=sets, whole=whole
)  # in the order of EXPECTED


# Tables -------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """Write all tables, with a dash beside the paper's figure for each that nobody measured yet."""
    found = {piece: results.get(piece, {}).get("points", {}) for piece in EXPECTED}
    parts = [
        "**Table 1: no packing**\n\n" + medians_table(found["medians"], UNPACKED, "unpacked"),
        "**Table 2: packing**\n\n" + medians_table(found["medians"], PACKED, "packed"),
    ]
    if found["whole"]:
        parts.append("**Table 2, in a whole model**\n\n" + medians_table(found["whole"], PACKED, "packed"))
    parts.append("**Both tables on sets of ours**\n\n" + sets_table(found["sets"]))
    parts.append("**Figures 3 to 5**\n\n" + figures_table(found["figures"]))
    parts.append("**Table 3: convergence**\n\n" + convergence_table())
    told = [f"{piece}: {results[piece]['conditions']}." for piece in EXPECTED if found[piece]]
    missing = [piece for piece in EXPECTED if not found[piece]]
    if missing:
        told.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join([*parts, "Conditions. " + " ".join(told) + " `python benchmarks/paper.py`"]) + "\n"


def medians_table(points: dict[str, Any], layouts: tuple[str, ...], kind: str) -> str:
    lines = [
        "| dataset | median pair | ideal | paper: over FA3 | here: over flash | of the ideal | paper: over flex "
        "| here: over flex | samples/s, paper: FA3, flex, shared | here |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in PAPER.items():
        prompt, answer, _ = of.pair
        given: tuple[float, ...] = getattr(of, kind)
        flash, flex, rates = gains(points.get(name), layouts)
        ideal = 2 * (prompt + answer) / (prompt + 2 * answer)
        cells = [name, f"{prompt} + 2 × {answer}", f"{ideal:.2f}×", f"{given[3]:.2f}×", times(flash)]
        cells += [f"{flash / ideal:.0%}" if flash else "–", f"{given[4]:.2f}×", times(flex)]
        cells += [", ".join(f"{rate:.2f}" for rate in given[:3]), rates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(run: dict[str, Any] | None, layouts: tuple[str, ...]) -> tuple[float | None, float | None, str]:
    """Speed-ups of sharing over flash and over flex, and the pairs a second of all three layouts."""
    if run is None:
        return None, None, "–"
    flash, flex = (train.speed_up(run, layouts[2], over) for over in layouts[:2])
    records = [run["layouts"].get(layout, train.OUT_OF_MEMORY) for layout in layouts]
    rates = [of if of == train.OUT_OF_MEMORY else f"{of['pairs_per_s']:.2f}" for of in records]
    return flash, flex, ", ".join(rates)


def times(gain: float | None) -> str:
    return f"**{gain:.2f}×**" if gain else "–"


def sets_table(points: dict[str, Any]) -> str:
    """Write the measured sets, or what benchmarks/results/train.md has of whole models and packing."""
    if not points:
        return earlier_sets()
    lines = [
        "| lengths like | tokens | no packing: over flash | over flex | packing: over flash | over flex | of the ideal "
        "| pairs/s, no packing: flash, flex, shared | packing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in points.items():
        (flash, flex, rates), packed = (gains(run, layouts) for layouts in (UNPACKED, PACKED))
        cells = [name, f"÷ {run['token_ratio']:.2f}", times(flash), times(flex), times(packed[0]), times(packed[1])]
        cells += [f"{packed[0] / run['token_ratio']:.0%}" if packed[0] else "–", rates, packed[2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def earlier_sets() -> str:
    text = (RESULTS / "train.md").read_text(encoding="utf-8")
    first = "**Mistral-7B, full**"
    lines = [
        "| lengths like | tokens | packing: over flash | of the ideal | pairs/s: flash, shared |",
        "|---|---|---|---|---|",
    ]
    rows = read_table(text[text.index(first) :])
    for paired, shared in zip(rows[::2], rows[1::2], strict=True):
        cells = [shared["lengths like"], shared["tokens"], f"**{shared['over packed pairs']}**"]
        cells += [shared["of the ideal"], f"{paired['pairs/s']}, {shared['pairs/s']}"]
        lines.append(f"| {' | '.join(cells)} |")
    where = text.splitlines()[0]
    return "\n".join([*lines, "", f"Of an earlier run, in a whole Mistral-7B: {where}. `python benchmarks/train.py`"])


def figures_table(points: dict[str, Any]) -> str:
    """Write the measured points, or what benchmarks/results/layers.md has of attention and its layer."""
    if not points:
        return earlier_figures()
    lines = [
        "| prompt + 2 × answer | ratio | 3, MLP (ideal) | 4, attention: over flash, over flex (ideal) | FA4's kernels "
        "over flash | 5, attention layer: over flash, over flex (ideal) | FA4's kernels over flash |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(points.values(), key=lambda of: (of["prompt"], of["ratio"]))
    for of in ordered:
        ideal, ms, layer = of["ideal"], of["attention_ms"], of["layer_ms"]
        flash = ms[of["best_paired"]]
        alone = [layers.over(base, ms.get("shared, flex")) for base in (flash, ms.get("paired, flex"))]
        whole = [
            layers.over(layer.get(base), layer.get("shared, flex")) for base in (of["best_paired"], "paired, flex")
        ]
        cells = [f"{of['prompt']:,} + 2 × {of['completion']:,}", f"{of['ratio']:g}"]
        cells.append(f"{plain(of['mlp'])} ({ideal['mlp']:.2f}×)")
        cells.append(f"{', '.join(map(plain, alone))} ({ideal['attention']:.2f}×)")
        cells.append(plain(layers.over(flash, ms.get("shared, flex FLASH"))))
        cells.append(f"{', '.join(map(plain, whole))} ({ideal['layer']:.2f}×)")
        cells.append(plain(layers.over(layer.get(of["best_paired"]), layer.get("shared, flex FLASH"))))
        lines.append(f"| {' | '.join(cells)} |")
    kernels = ", ".join(sorted({of["best_paired"].removeprefix("paired, ") for of in ordered}))
    return "\n".join([*lines, "", f"*Flash*: the fastest kernel on separate sequences at that point ({kernels})."])


def plain(gain: float | None) -> str:
    return f"{gain:.2f}×" if gain else "–"


def earlier_figures() -> str:
    text = (RESULTS / "layers.md").read_text(encoding="utf-8")
    shares, layer = "of the ideal: Triton, FA4", "whole attention layer: Triton, fastest shared (ideal)"
    lines = [
        "| prompt + 2 × answer | 4, attention over flash, of the ideal: flex, FA4's kernels | 5, attention layer over "
        "flash: flex, fastest shared (ideal) |",
        "|---|---|---|",
    ]
    lines += [f"| {row['prompt + 2 × answer']} | {row[shares]} | {row[layer]} |" for row in read_table(text)]
    return "\n".join([*lines, "", f"Of an earlier run. {text.splitlines()[-1]}"])


def convergence_table() -> str:
    text = (RESULTS / "drift_gpu.md").read_text(encoding="utf-8")
    lines = [
        "| | with sharing | without |", "|---|---|---|",
        "| paper: MT-Bench, batches of 32, 64, 96, 128 | 7.3, 7.4, 7.3, 7.0 | 7.0, 7.1, 7.2, 7.1 |",
    ]  # fmt: skip
    shared, paired = read_table(text)
    for column in ("held-out reward accuracy", "held-out loss"):
        lines.append(f"| here: {column} | {shared[column]} | {paired[column]} |")
    verdicts = [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- shared")]
    return "\n".join([*lines, "", f"Of benchmarks/drift.py: {'; '.join(verdicts)}. Its conditions: [Trust](trust.md)."])


if __name__ == "__main__":
    sys.exit(main())
