"""Measures the time that flexpatch adds to a training step, at 4k to 128k shared tokens, and its share of a 7B step.

    python benchmarks/overheads.py          # on a GPU; --profile: folding the largest batch, by function
    python benchmarks/overheads.py --device cpu --tokens 512 1024 --dtype float32 --hidden 256

Pairs are drawn from each of --sets equally often, with replacement, until they hold the tokens asked for; ids are
random. Median milliseconds of each part:

- "folding a batch": the pre-hook on the pairs as a padded batch (copies, merging, row, mask);
- "the same batch again": the pre-hook of the reference pass over the batch;
- "giving up": the pre-hook on a batch with nothing to share;
- "unfolding" and "answer sums": forward and backward;
- "packing an epoch": epoch_bins of 10,000 pairs, divided by its rows.

A step is 32 times one decoder layer as wide as Mistral-7B's (random weights, all trained, gradient checkpointing),
forward and backward over such a row. The step has no output layer, optimizer or reference pass, with which shares would
be smaller. Two sums: a trainer's step after flexpatch.apply (policy and reference; unfolding as if both had a
backward), and a step on rows of one's own (policy and reference share trees and mask).

Exit code 1 on a GPU if either sum is 1% of a step or more at 16k tokens, or a part grows faster than tokens^1.2 from
there on. Writes overheads.json, table.md and overheads.png to --output.
"""

import argparse
import cProfile
import json
import pstats
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lengths import add_lengths
from masks import measure
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

import flexpatch
from flexpatch.fold import fold_batch, unfold
from flexpatch.logprobs import sum_answers
from flexpatch.masks import block_mask
from flexpatch.packing import epoch_bins

LAYERS, VOCABULARY, EPOCH = 32, 32000, 10_000
AT = 16384  # tokens at which the share counts, and from which growth is fitted
SHARE, STRAIGHT, STEEP = 0.01, 1.1, 1.2
SUMS = {
    "one line: folding, the same again, 2 × unfolding":
        ["folding a batch", "the same batch again", "unfolding", "unfolding"],
    "own rows: trees, device, mask, packing, 2 × sums":
        ["tree building", "rows to device", "block mask", "packing an epoch", "answer sums", "answer sums"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--sets", nargs="+", default=["hh", "ultrafeedback"])
    add("--tokens", type=int, nargs="+", default=[1 << k for k in range(12, 18)])
    add("--hidden", type=int, default=4096, help="a multiple of 128 (%(default)s, as in a 7B model)")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--profile", action="store_true")
    add("--output", type=Path, default=Path("runs/overheads"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device, cuda = torch.device(options.device), options.device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, flexpatch {flexpatch.__version__}"
    conditions = f"{name}, {versions}; {'+'.join(options.sets)} lengths, hidden {options.hidden}, {options.dtype}"
    lengths, sizes = json.loads(options.lengths.read_text()), sorted(options.tokens)
    drawn = {T: draw([lengths[name] for name in options.sets], T) for T in sizes}
    model = make_model(options, device)
    measured = [overheads(model, drawn[T], T, device) for T in tqdm(sizes, disable=None)]
    times = {part: np.array([m[part] for m in measured]) for part in measured[0]}
    times |= {name: np.sum([times[part] for part in parts], 0) for name, parts in SUMS.items()}
    # The dense backend of the CPU computes all pairs of tokens, so only short rows are timed there.
    timed = [T for T in sizes if (32768 if cuda else 2048) >= T]
    tokens, steps = np.array(sizes), np.full(len(sizes), np.nan)
    for i, T in enumerate(timed):
        steps[i:] = (
            LAYERS * layer_ms(model, drawn[T], device) * tokens[i:] / T
        )  # longer rows are added until they are timed
    fitted = tokens >= (AT if (enough := sizes[-2:][0] >= AT) else 0)
    growth = {}
    for part, ms in times.items():
        known = fitted & np.isfinite(ms)
        growth[part] = float(np.polyfit(np.log(tokens[known]), np.log(ms[known]), 1)[0]) if known.sum() > 1 else np.nan
    missed = [f"{part}: its share" for part in SUMS if (times[part] >= SHARE * steps)[tokens == AT].any()]
    missed += [f"{part}: its growth" for part, k in growth.items() if enough and k > STEEP]
    over = [f"{part} ({k:.2f})" for part, k in growth.items() if enough and STRAIGHT < k <= STEEP]
    verdict = f"Failed: {'; '.join(missed)}." if missed else "No limit is exceeded."
    verdict += f" Over the target of growth: {', '.join(over)}." if over else ""
    unit = f"ms (share of a step); steps of more than {max(timed, default=0):,} tokens: extrapolated linearly."
    table = "\n\n".join([conditions, table_of(sizes, times, steps, growth), f"{unit} {verdict}"])
    print(f"\n{table}")
    (options.output / "table.md").write_text(table + "\n")
    result = dict(conditions=conditions, tokens=sizes, timed=timed, growth=growth, missed=missed)
    result["ms"] = {part: ms.tolist() for part, ms in times.items()} | {"step": steps.tolist()}
    (options.output / "overheads.json").write_text(json.dumps(result, indent=1))
    plot(sizes, times, steps, options.output / "overheads.png", conditions)
    if options.profile:
        fold, _ = folding(model, drawn[sizes[-1]], device)
        profile = cProfile.Profile()
        profile.runcall(lambda: [fold() for _ in range(6)])
        print("\nFolding the largest batch 6 times:")
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(15)
    return 1 if cuda and missed else 0


def make_model(options: argparse.Namespace, device: torch.device) -> Any:
    """Make embeddings, one trained decoder layer and the last norm. Gradients reach the layer's input, as if deep."""
    torch.manual_seed(0)
    heads = max(options.hidden // 128, 1)
    config = AutoConfig.for_model(
        "mistral", hidden_size=options.hidden, intermediate_size=options.hidden * 7 // 2, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), head_dim=128, vocab_size=VOCABULARY,
        max_position_embeddings=32768, sliding_window=None, use_cache=False,
    )  # fmt: skip
    with device:
        model = AutoModel.from_config(config, dtype=getattr(torch, options.dtype)).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def draw(sets: list[list[list[int]]], tokens: int) -> list[flexpatch.Tree]:
    """Draw pairs with ``tokens`` shared tokens in all. The last pair is cut to fit."""
    generator, rng = random.Random(0), np.random.default_rng(0)
    trees = []
    while tokens > 0:
        pair = generator.choice(generator.choice(sets))
        if sum(pair) > tokens - 4:
            pair = [tokens - 2 * (tokens // 3), tokens // 3, tokens // 3]
        trees.append(flexpatch.Tree.of(*(rng.integers(5, VOCABULARY, length).tolist() for length in pair)))
        tokens -= sum(pair)
    return trees


def folding(model: Any, pairs: list[flexpatch.Tree], device: torch.device) -> tuple[Callable[..., Any], np.ndarray]:
    """Make the fold of a trainer's batch (chosen, then rejected, padded with 0) without the forward, and its ids.

    The batch counts as a new batch at every call, except with ``again=True``.
    """
    flexpatch.apply(model, backend="flex")  # builds block masks on a CPU too, where no kernel uses them
    sequences = [torch.tensor([*tree.ids, *tree.children[i].ids]) for i in range(2) for tree in pairs]
    ids = pad_sequence(sequences, batch_first=True)
    call = dict(input_ids=ids.to(device), attention_mask=(ids > 0).long().to(device), use_cache=False)
    [hook] = model.base_model._forward_pre_hooks.values()

    def fold(again: bool = False) -> Any:
        if not again:
            hook.last = None
        return hook(model.base_model, (), dict(call))[1]["input_ids"]

    return fold, ids.numpy()


def overheads(model: Any, trees: list[flexpatch.Tree], tokens: int, device: torch.device) -> dict[str, float]:
    """Time every part at one size, in milliseconds; NaN if memory might not suffice."""

    def ms(work: Callable[[], Any], repeats: int = 30 if tokens <= AT else 15) -> float:
        return measure(work, device, repeats)[0]

    rows = (on_host := flexpatch.build_rows([trees])).to(device)
    fold, ids = folding(model, trees, device)
    give_up, _ = folding(model, draw([[[1, 255, 255]]], tokens // 512 * 511 + 4)[:-1], device)
    assert len(fold()) == 1 < len(give_up())
    times = {
        "tree building": ms(lambda: flexpatch.build_rows([[flexpatch.lay_out(tree) for tree in trees]])),
        "rows to device": ms(lambda: on_host.to(device)),
        "block mask": ms(lambda: block_mask(rows.ends, rows.position_ids, None)),
        "block mask, window": ms(lambda: block_mask(rows.ends, rows.position_ids, 512)),
        "folding a batch": ms(fold),
        "the same batch again": ms(partial(fold, again=True)),
        "giving up": ms(give_up),
        "unfolding": np.nan,
    }
    folded = fold_batch(ids, ids > 0)
    assert folded is not None
    index, like = folded.index.to(device), dict(dtype=model.dtype, device=device)
    row, width = folded.rows.input_ids.shape[1], model.config.hidden_size
    if 2 * (index.numel() + row) * width * model.dtype.itemsize < 20e9:  # both layouts and their gradients
        hidden = torch.ones(1, row, width, requires_grad=True, **like)
        gradient = torch.ones(*index.shape, width, **like)
        unfolded = partial(unfold, hidden, index, folded.padding)
        times["unfolding"] = ms(lambda: torch.autograd.grad(unfolded(), hidden, gradient))
    logps = torch.ones(len(rows.targets), device=device, requires_grad=True)
    times["answer sums"] = ms(lambda: torch.autograd.grad(sum_answers(logps, rows).sum(), logps))
    lengths = random.Random(0).choices([len(flexpatch.lay_out(tree)) for tree in trees], k=EPOCH)
    times["packing an epoch"] = ms(lambda: epoch_bins(lengths, tokens), 3) / len(epoch_bins(lengths, tokens))
    return times


def layer_ms(model: Any, trees: list[flexpatch.Tree], device: torch.device) -> float:
    """Run one decoder layer forward and backward over one packed row."""
    flexpatch.apply(model)
    rows = flexpatch.build_rows([trees]).to(device)

    def step() -> None:
        model.zero_grad()
        model(**flexpatch.model_inputs(model, rows)).last_hidden_state.sum().backward()

    return measure(step, device, repeats=7)[0]


def table_of(sizes: list[int], times: dict[str, np.ndarray], steps: np.ndarray, growth: dict[str, float]) -> str:
    heads = ["shared tokens", *(f"{T / 1024:g}k" for T in sizes), f"tokens^ (target: ≤ {STRAIGHT}; fails over {STEEP})"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for part, ms in times.items():
        cells = [f"{t:{'.3g' if t < 100 else '.0f'}} ({s:.2%})" for t, s in zip(ms, ms / steps, strict=True)]
        name = f"**{part}** (target: < {SHARE:.0%} at {AT // 1024}k)" if part in SUMS else part
        lines.append(f"| {name} | {' | '.join(cells)} | {growth[part]:.2f} |")
    lines.append(f"| a step: {LAYERS} × one layer | {' | '.join(f'{ms:.0f}' for ms in steps)} | |")
    return "\n".join(lines).replace(" (nan%)", "").replace("nan", "–")


def plot(sizes: list[int], times: dict[str, np.ndarray], steps: np.ndarray, path: Path, conditions: str) -> None:
    axes = (figure := Figure(figsize=(9, 5), layout="constrained")).subplots()
    for part, ms in (times | {f"{SHARE:.0%} of a step": SHARE * steps}).items():
        axes.plot(sizes, ms, "o-" if part in times else "k--", label=part, markersize=4, lw=2 if part in SUMS else 1)
    axes.set(xscale="log", yscale="log", ylabel="ms", title="What flexpatch adds to a step, by shared tokens")
    axes.set_xticks(sizes, [f"{T / 1024:g}k" for T in sizes])
    axes.minorticks_off()
    axes.set_xlabel(conditions, fontsize=6)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
