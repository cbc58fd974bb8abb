"""Compares LoRA DPO on real pairs, shared against paired, step by step: does sharing change where training ends?

    python benchmarks/drift.py prepare HH.jsonl.gz runs/drift/tokens.jsonl.gz    # trains a tokenizer, no download
    python benchmarks/drift.py run runs/drift/tokens.jsonl.gz --shape tiny --layouts shared paired broken
    python benchmarks/drift.py run runs/drift/tokens.jsonl.gz --shape 1b --jobs 3                          # on a GPU
    python benchmarks/drift.py plot runs/drift/drift.jsonl                       # also of runs that were cut short

The base model is trained from random weights, as a language model on prompts and chosen answers of the training pairs,
once for all runs. --model takes real weights instead; give prepare the same --model then. Layouts, each with its own
reference log-probs and its own evaluation:

shared  flexpatch: packed rows, every prompt once
paired  the unpatched model: every answer with its own prompt, padded
eager   paired with eager attention and half as many pairs a pass: shows how far rounding alone drifts
broken  packed rows whose answers see each other, as in ordinary packing: the negative control

A seed sets the LoRA weights and the order of the pairs. Exit code 1 unless

- held-out reward accuracy and held-out loss agree after the last step: the means of shared and paired over the seeds
  differ by at most twice the standard error of that difference;
- step losses agree, if eager was run: on average shared is not much farther from paired of one seed than eager is (in
  bfloat16 at most twice as far; in float32 ten times, because distances grow from last bits, and layouts change
  different numbers of last bits), and broken, if it was run, is farther. If eager was cut short, its steps count.

A call that is cut short keeps its records. Calls may be split by layouts or seeds: the first makes --base, the others
reuse it.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import flexpatch
from flexpatch.models import load_model, load_tokenizer
from flexpatch.tree import Layout, lay_out

# Sizes of the architecture, and training of the base: blocks of tokens a step, all weights, AdamW.
SHAPES: dict[str, dict[str, Any]] = {
    "nano": dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, head_dim=16),
    "tiny": dict(hidden_size=64, num_hidden_layers=4, intermediate_size=192, num_attention_heads=4, head_dim=16),
    "hybrid": dict(  # three layers of the gated delta rule, one of attention
        model_type="qwen3_5_text",
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=192,
        num_attention_heads=4,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    ),
    "1b": dict(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, head_dim=64),
}
BASE = {
    "nano": dict(steps=20, blocks=4, block=64, lr=3e-3),
    "tiny": dict(steps=400, blocks=8, block=192, lr=4e-3),
    "hybrid": dict(steps=200, blocks=8, block=192, lr=4e-3),
    "1b": dict(steps=160, blocks=32, block=256, lr=3e-4),
}
LAYOUTS = ("shared", "paired", "eager", "broken")
STOCK = ("paired", "eager")
NEAR = {"float32": 10, "bfloat16": 2}  # how many times as far as eager
METRICS = ("loss", "margin", "accuracy")


class Pairs(NamedTuple):
    """Tokenised pairs of a file."""

    training: list[Layout]
    held_out: list[Layout]
    vocabulary: int


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = (prepare := commands.add_parser("prepare", help="tokenise pairs")).add_argument
    add("data", help="JSON Lines file, plain or gzipped, in any form that flexpatch.Collator reads")
    add("tokens", type=Path, help="file to write, .jsonl.gz")
    add("--held-out", type=int, default=512, metavar="N", help="hold the last N pairs out of training (%(default)s)")
    add("--model", help="hub name, directory or GGUF file whose tokenizer is used")
    add(
        "--vocabulary",
        type=int,
        default=4096,
        help="tokens of the tokenizer that is trained without --model (%(default)s)",
    )
    prepare.set_defaults(function=prepare_tokens)

    add = (run := commands.add_parser("run", help="train, and plot")).add_argument
    add("tokens", type=Path, help="file made by prepare")
    add("--shape", choices=SHAPES, default="tiny", help="shape of a base model that is trained first (%(default)s)")
    add("--model", help="instead of --shape: hub name, directory or GGUF file")
    add("--layouts", nargs="+", choices=LAYOUTS, default=["shared", "paired", "eager"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=500, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="pairs a step (%(default)s)")
    add("--max-length", type=int, default=256, help="skip pairs with a longer sequence (%(default)s)")
    add("--row-tokens", type=int, help="tokens of a packed row (2048, with every row filled; on the CPU 512)")
    add("--lr", type=float, default=5e-4, help="learning rate of LoRA, after ten steps of warm-up (%(default)s)")
    add("--beta", type=float, default=0.1, help="(%(default)s)")
    add("--lora-rank", type=int, default=16, help="(%(default)s)")
    add("--eval-every", type=int, default=100, help="steps (%(default)s)")
    add("--base-steps", type=int, help="steps of the base model's training (by its shape)")
    add("--dtype", choices=["float32", "bfloat16"], help="dtype of frozen weights (bfloat16; on the CPU float32)")
    add("--device", help="(cuda if available, else cpu)")
    add("--jobs", type=int, default=1, help="runs at a time, each in its own process (%(default)s)")
    add("--base", type=Path, help="folder of the base model, trained if it does not exist (OUTPUT/base)")
    add(
        "--output",
        type=Path,
        default=Path("runs/drift"),
        help="folder for drift.jsonl, drift.md, drift.png (%(default)s)",
    )
    run.set_defaults(function=run_all)

    add = (plot := commands.add_parser("plot", help="table and plot of records")).add_argument
    add("records", type=Path, nargs="+", help="files drift.jsonl of one or more calls of run, with equal settings")
    add("--output", type=Path, help="folder for drift.md and drift.png (the first file's folder)")
    plot.set_defaults(function=plot_files)
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------------


def prepare_tokens(args: argparse.Namespace) -> int:
    """Write pairs as token ids, one JSON object a line, without their text."""
    rows = flexpatch.read_jsonl(args.data)
    if not 0 < args.held_out < len(rows):
        raise flexpatch.FlexpatchError(f"--held-out {args.held_out} leaves nothing of {len(rows)} rows")
    split = len(rows) - args.held_out
    tokenizer = load_tokenizer(args.model) if args.model else train_tokenizer(rows[:split], args.vocabulary)
    collator, skipped, lines = flexpatch.Collator(tokenizer), [], []
    for number, row in enumerate(rows):
        try:
            tree = collator.tree(row, number)
            lay_out(tree, number)
            chosen, rejected = (list(child.ids) for child in tree.children)
        except (flexpatch.FlexpatchError, ValueError) as error:
            skipped.append(str(error))
            continue
        if chosen != rejected:
            ids = dict(prompt_ids=list(tree.ids), chosen_ids=chosen, rejected_ids=rejected)
            lines.append(json.dumps(ids | dict(held_out=number >= split)))
    if not lines:
        raise flexpatch.FlexpatchError(f"{args.data} holds no pair that can be used: {'; '.join(skipped[:1])}")
    args.tokens.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.tokens, "wt") as file:
        file.write("\n".join(lines) + "\n")
    print(f"{len(lines)} pairs ({len(skipped)} skipped), {len(tokenizer)} kinds of tokens: wrote {args.tokens}")
    return 0


def train_tokenizer(rows: Sequence[dict[str, Any]], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training pairs' texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|pad|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = (value for row in rows for value in row.values() if isinstance(value, str))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")


def read_pairs(path: Path, max_length: int) -> Pairs:
    """Read the training and the held-out pairs whose sequences fit ``max_length``."""
    collator, parts = flexpatch.Collator(), ([], [])
    largest = 0
    for number, row in enumerate(flexpatch.read_jsonl(path)):
        layout = collator.layout(row, number)
        largest = max(largest, int(layout.ids.max()))
        if max(map(len, layout.answers)) <= max_length:
            parts[bool(row["held_out"])].append(layout)
    if not all(parts):
        raise flexpatch.FlexpatchError(f"--max-length {max_length} leaves no pairs to train on, or none held out")
    return Pairs(*parts, vocabulary=-(-(largest + 1) // 64) * 64)


# --- the base model ---------------------------------------------------------------------------------------------------


def make_base(pairs: Pairs, args: argparse.Namespace) -> dict[str, Any]:
    """Train a language model from random weights and save it, or find it. Returns a description of it."""
    story = args.base / "base.json"
    if story.exists():
        return json.loads(story.read_text())
    torch.manual_seed(0)
    shape = {"model_type": "llama"} | SHAPES[args.shape]
    config = AutoConfig.for_model(
        **shape, num_key_value_heads=max(1, shape["num_attention_heads"] // 4), vocab_size=pairs.vocabulary,
        tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    settings = BASE[args.shape] | ({"steps": args.base_steps} if args.base_steps else {})
    start, losses = time.perf_counter(), train_base(model, pairs.training, args, **settings)
    nats = evaluate_base(model, pairs.held_out, args)
    model.to(getattr(torch, args.dtype)).save_pretrained(args.base)
    told = dict(
        parameters=model.num_parameters(), seconds=round(time.perf_counter() - start, 1), first_loss=losses[0],
        last_loss=losses[-1], held_out_loss=nats, **settings,
    )  # fmt: skip
    story.write_text(json.dumps(told))
    print("base:", story.read_text(), flush=True)
    return told


def train_base(
    model: nn.Module, layouts: list[Layout], args: argparse.Namespace, steps: int, blocks: int, block: int, lr: float
) -> list[float]:
    """Train a language model on prompts and chosen answers, one after another, cut into blocks."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, 1.1 - s / steps))
    stream, losses = token_stream(layouts, generator), []
    for step in range(1, steps + 1):
        ids = torch.tensor([next(stream) for _ in range(blocks * block)]).view(blocks, block).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"base: step {step}, loss {loss.item():.3f}", flush=True)
    return losses


def token_stream(layouts: list[Layout], generator: torch.Generator) -> Iterator[int]:
    """Yield prompts with their chosen answers, endlessly, in a new order every epoch."""
    while True:
        for i in torch.randperm(len(layouts), generator=generator).tolist():
            yield from layouts[i].ids[layouts[i].answers[0]].tolist()


@torch.no_grad()
def evaluate_base(model: nn.Module, layouts: list[Layout], args: argparse.Namespace) -> float:
    """Measure the loss on the held-out chosen answers, in nats a token."""
    total = count = 0.0
    for layout in layouts[:64]:
        ids = torch.from_numpy(layout.ids[layout.answers[0]]).to(args.device)
        length = layout.answer_lengths[0]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total += F.cross_entropy(logits[-length - 1 : -1].float(), ids[-length:], reduction="sum").item()
        count += length
    return total / count


# --- one run ----------------------------------------------------------------------------------------------------------


def train_one(layout: str, seed: int, args: argparse.Namespace) -> None:
    """Make one run, and append its records to drift.jsonl as they come."""
    torch.set_num_threads(1)
    quiet()
    pairs = read_pairs(args.tokens, args.max_length)
    model = load_model(args.model or str(args.base), getattr(torch, args.dtype)).to(args.device)
    if layout == "eager":
        model.set_attn_implementation("eager")
    if layout not in STOCK:
        flexpatch.apply(model)
    if layout == "broken":
        pairs = Pairs(*(list(map(break_layout, part)) for part in pairs[:2]), pairs.vocabulary)
    torch.manual_seed(seed)
    settings = dict(r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    # Each line is appended in one write, because several processes share the file.
    with open(args.output / "drift.jsonl", "a", buffering=1) as file:
        for record in train(Run(model, layout, pairs, args), seed):
            file.write(json.dumps(dict(layout=layout, seed=seed) | record) + "\n")
            if "held_out" in record:
                told = ", ".join(f"{name} {record[name]:.4f}" for name in METRICS)
                print(f"{layout}, seed {seed}, step {record['step']}: held out {told}", flush=True)


def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks newer transformers for a property by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def break_layout(layout: Layout) -> Layout:
    """Break a layout: every token sees all tokens before it in its tree, also tokens of siblings."""
    return replace(layout, ends=np.full_like(layout.ends, len(layout)))


class Run:
    """Model with its pairs, and the log-probs of one layout."""

    def __init__(self, model: nn.Module, layout: str, pairs: Pairs, args: argparse.Namespace) -> None:
        self.model, self.layout, self.args = model, layout, args
        self.layouts = pairs.training + pairs.held_out
        self.training = range(len(pairs.training))
        self.held_out = range(len(pairs.training), len(self.layouts))
        self.reference = self._reference()

    def passes(self, samples: Sequence[int]) -> list[list[int]]:
        """Cut samples into groups that pass the model together."""
        if self.layout in STOCK:
            size = self.args.batch_size if self.layout == "paired" else -(-self.args.batch_size // 2)
            return [list(samples[at : at + size]) for at in range(0, len(samples), size)]
        rows = flexpatch.pack([len(self.layouts[i]) for i in samples], self.args.row_tokens)
        return [[samples[i] for i in row] for row in rows]

    def logprobs(self, samples: Sequence[int]) -> tuple[Tensor, int]:
        """Compute log-probs of the answers, chosen and rejected in turn, and count the tokens computed."""
        some = [self.layouts[i] for i in samples]
        if self.layout in STOCK:
            longest = max(len(sequence) for layout in some for sequence in layout.answers)
            return flexpatch.separate_logprobs(self.model, some).answers, 2 * len(some) * longest
        # Kernels are compiled for every length, so on a GPU a tree without scored tokens fills all rows to one length.
        if self.args.device != "cpu" and (missing := self.args.row_tokens - sum(map(len, some))):
            some = [*some, lay_out(flexpatch.Tree([0] * missing))]
        rows = flexpatch.build_rows([some]).to(self.args.device)
        return flexpatch.answer_logprobs(self.model, rows).answers, rows.tokens

    def _reference(self) -> list[Tensor]:
        """Compute the log-probs of every pair without the adapter."""
        if self.layout not in STOCK:
            return flexpatch.reference_logprobs(self.model, self.layouts, capacity=self.args.row_tokens)
        values: list[Tensor] = []
        with torch.no_grad(), self.model.disable_adapter():
            for some in self.passes(range(len(self.layouts))):
                values += self.logprobs(some)[0].split(2)
        return values

    def dpo(self, samples: Sequence[int]) -> dict[str, float]:
        """Return mean loss, margin and accuracy of samples, and tokens. Without no_grad, accumulates gradients too."""
        means = dict.fromkeys((*METRICS, "tokens"), 0.0)
        for some in self.passes(samples):
            policy, tokens = self.logprobs(some)
            reference = torch.cat([self.reference[i] for i in some]).to(policy.device)
            result = flexpatch.dpo_loss(policy, reference, beta=self.args.beta)
            share = len(some) / len(samples)  # passes hold different numbers of pairs, and all pairs have one weight
            if torch.is_grad_enabled():
                (share * result.loss).backward()
            margins = result.chosen_rewards - result.rejected_rewards
            # Before training, margins are 0 but for rounding. Such a tie counts half.
            right = ((margins > 1e-3).float() + (margins >= -1e-3).float()) / 2
            values = torch.stack([result.loss.detach(), margins.mean(), right.mean()]).tolist()
            for name, value in zip(METRICS, values, strict=True):
                means[name] += share * value
            means["tokens"] += tokens
        return means

    def evaluate(self) -> dict[str, Any]:
        with torch.no_grad():
            return dict(held_out=True) | self.dpo(self.held_out)


def train(run: Run, seed: int) -> Iterator[dict[str, Any]]:
    """Yield records of every step, and of the held-out pairs before, after and during training."""
    args, model = run.args, run.model
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    batches = shuffled(len(run.training), args.batch_size, seed)
    model.train()
    yield dict(step=0) | run.evaluate()
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        means = run.dpo(next(batches))
        nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield dict(step=step) | means | dict(seconds=round(time.perf_counter() - start, 4))
        if step == args.steps or step % args.eval_every == 0:
            yield dict(step=step) | run.evaluate()


def shuffled(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of sample numbers, endlessly, in a new order every epoch. A last partial batch is dropped."""
    if count < size:
        raise flexpatch.FlexpatchError(f"{count} pairs to train on are fewer than --batch-size {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def run_all(args: argparse.Namespace) -> int:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.row_tokens = args.row_tokens or (512 if args.device == "cpu" else 2048)
    args.base = args.base or args.output / "base"
    if 2 * args.max_length > args.row_tokens:
        raise flexpatch.FlexpatchError(f"--row-tokens {args.row_tokens} must be at least twice --max-length")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    quiet()
    pairs = read_pairs(args.tokens, args.max_length)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, 1 thread a run"
    settings = dict(
        settings={key: value for key, value in vars(args).items() if isinstance(value, str | int | float | list)},
        versions={m.__name__: str(m.__version__) for m in (torch, transformers, peft, flexpatch)},
        device=gpu, training=len(pairs.training), held_out=len(pairs.held_out),
        base=None if args.model else make_base(pairs, args),
    )  # fmt: skip
    records = args.output / "drift.jsonl"
    records.write_text(json.dumps(settings) + "\n")
    if args.device == "cuda":
        torch.cuda.empty_cache()
    # The main comparison comes first, seed by seed, so that a call that is cut short leaves whole comparisons.
    first = [layout for layout in ("shared", "paired") if layout in args.layouts]
    rest = [layout for layout in args.layouts if layout not in first]
    order = [(layout, seed) for some in (first, rest) for seed in args.seeds for layout in some]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for run in [pool.submit(train_one, layout, seed, args) for layout, seed in order]:
            run.result()
    return report([records], args.output)


# --- results ----------------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """Records of one run: metrics of steps and of evaluations, by step."""

    steps: dict[int, dict[str, float]]
    held_out: dict[int, dict[str, float]]


def plot_files(args: argparse.Namespace) -> int:
    return report(args.records, args.output or args.records[0].parent)


def report(files: Sequence[Path], output: Path) -> int:
    settings, runs = read_records(files)
    output.mkdir(parents=True, exist_ok=True)
    held, text = judge(settings, runs)
    (output / "drift.md").write_text(text + "\n")
    print("\n" + text)
    draw(settings, runs, output / "drift.png")
    print(f"wrote drift.md and drift.png to {output}")
    return 0 if held else 1


def read_records(files: Sequence[Path]) -> tuple[dict[str, Any], dict[tuple[str, int], Curves]]:
    """Read the first file's settings, with the runs that were asked for as ``asked``, and the runs of all files.

    A last line that was cut off is skipped.
    """
    asked: list[tuple[str, int]] = []
    settings: dict[str, Any] = {}
    runs: dict[tuple[str, int], Curves] = {}
    for path in files:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    break
                raise flexpatch.FlexpatchError(f"{path}, line {number}: {error}") from error
            if "settings" in record:
                settings = settings or record
                asked += [(one, seed) for one in record["settings"]["layouts"] for seed in record["settings"]["seeds"]]
                continue
            curves = runs.setdefault((record["layout"], record["seed"]), Curves({}, {}))
            (curves.held_out if record.get("held_out") else curves.steps)[record["step"]] = record
    if not settings or not runs:
        raise flexpatch.FlexpatchError(f"{', '.join(map(str, files))}: no records of a run")
    return settings | dict(asked=asked), runs


class Check(NamedTuple):
    """One comparison in words, and its verdict; ``None`` for a comparison that is shown and not judged."""

    text: str
    passed: bool | None

    def __str__(self) -> str:
        return f"- {self.text}" + {None: "", True: " (passed)", False: " (**failed**)"}[self.passed]


def judge(settings: dict[str, Any], runs: dict[tuple[str, int], Curves]) -> tuple[bool, str]:
    """Judge all comparisons. Returns the verdict, and the table of comparisons as Markdown."""
    steps = settings["settings"]["steps"]
    seeds = {
        one: sorted(s for layout, s in runs if layout == one and steps in runs[one, s].held_out) for one in LAYOUTS
    }
    finals = {
        (one, name): [runs[one, s].held_out[steps][name] for s in seeds[one]] for one in LAYOUTS for name in METRICS
    }
    lines = [
        "| layout | held-out reward accuracy | held-out loss | step loss: largest difference from paired | mean |"
        " tokens computed |",
        "|---|---|---|---|---|---|",
        *[table_row(one, seeds[one], finals, runs) for one in LAYOUTS if seeds[one]],
        "",
    ]
    checks = [*ends(finals), *curves(runs, NEAR[settings["settings"]["dtype"]])]
    missing = [f"{one}, seed {s}" for one, s in settings["asked"] if s not in seeds[one]]
    if missing:
        # Eager may be cut short: its own steps are compared.
        needed = any(not one.startswith("eager") for one in missing)
        checks.append(Check(f"not complete: {'; '.join(missing)}", False if needed else None))
    if not any(check.passed for check in checks):
        checks.append(Check("nothing to judge: that needs two seeds of shared and paired", False))
    held = all(check.passed is not False for check in checks)
    return held, "\n".join([*lines, *map(str, checks), "", conditions(settings)])


def ends(finals: dict[tuple[str, str], list[float]]) -> Iterator[Check]:
    """Compare the ends of training: differences of means over seeds, and twice their standard errors."""
    for name in ("accuracy", "loss"):
        theirs = finals["paired", name]
        for layout in ("shared", "eager", "broken"):
            ours = finals[layout, name]
            if min(len(ours), len(theirs)) < 2:
                continue
            difference = statistics.mean(ours) - statistics.mean(theirs)
            noise = 2 * math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, theirs)))
            within = abs(difference) <= noise
            text = f"{layout} less paired, final held-out {name}: {difference:+.2g}, noise {noise:.2g}"
            yield (
                Check(text, within) if layout == "shared" else Check(f"{text}: {'' if within else 'not '}within", None)
            )


def curves(runs: dict[tuple[str, int], Curves], factor: float) -> Iterator[Check]:
    """Compare the course of training: mean differences of step losses, against differences by rounding alone.

    Steps that eager lacks are left out.
    """
    eager = {seed: differences(runs, "eager", seed) for layout, seed in runs if layout == "eager"}
    steps = sum(map(len, eager.values()))
    for layout in ("shared", "broken"):
        own = {seed: differences(runs, layout, seed) for seed in eager}
        common = [(gaps[step], eager[seed][step]) for seed, gaps in own.items() for step in eager[seed] if step in gaps]
        if not common:
            continue
        ratio = statistics.mean(gap for gap, _ in common) / statistics.mean(gap for _, gap in common)
        text = f"{layout} from paired, mean difference of {steps:,} step losses: {ratio:.2g} times that of eager"
        if layout == "shared":
            yield Check(f"{text}, at most {factor:g}", ratio <= factor)
        else:
            yield Check(f"{text}, must be over {factor:g}", ratio > factor)


def table_row(
    layout: str, seeds: list[int], finals: dict[tuple[str, str], list[float]], runs: dict[tuple[str, int], Curves]
) -> str:
    def spread(name: str) -> str:
        values = finals[layout, name]
        return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    gaps = [gap for seed in seeds for gap in differences(runs, layout, seed).values()]
    records = [record for seed in seeds for record in runs[layout, seed].steps.values()]
    tokens = sum(record["tokens"] for record in records) / len(seeds)
    compared = f"{max(gaps):.1e} | {statistics.mean(gaps):.1e}" if gaps and layout != "paired" else " | "
    return f"| {layout} | {spread('accuracy')} | {spread('loss')} | {compared} | {tokens:,.0f} |"


def differences(runs: dict[tuple[str, int], Curves], layout: str, seed: int) -> dict[int, float]:
    """Mean difference of step losses from the paired run of one seed."""
    if ("paired", seed) not in runs or (layout, seed) not in runs:
        return {}
    ours, theirs = runs[layout, seed].steps, runs["paired", seed].steps
    return {step: abs(ours[step]["loss"] - theirs[step]["loss"]) for step in ours if step in theirs}


def conditions(settings: dict[str, Any]) -> str:
    chosen, base = settings["settings"], settings["base"]
    model = Path(chosen.get("model", "")).name
    if base:
        kind = SHAPES[chosen["shape"]].get("model_type", "llama")
        model = (
            f"a {kind} of {base['parameters'] / 1e6:,.1f}M weights, trained here from random ones ({base['steps']} "
            f"steps of {base['blocks'] * base['block']:,} tokens of the training pairs' prompts and chosen answers; "
            f"held-out chosen answers: {base['held_out_loss']:.2f} nats a token), not a public model"
        )
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items() if name != "flexpatch")
    return (
        f"LoRA DPO, {chosen['steps']} steps of {chosen['batch_size']} pairs; "
        f"{settings['training']:,} pairs of up to {chosen['max_length']} tokens to train on, "
        f"{settings['held_out']} held out; {model}; rank {chosen['lora_rank']}, learning rate {chosen['lr']:g}, beta "
        f"{chosen['beta']:g}; frozen weights {chosen['dtype']}; {settings['device']}, {versions}. ±: standard "
        f"deviation over seeds; noise: twice the standard error of the difference of two means; eager: the unpatched "
        f"model with eager attention, half as many pairs a pass. `python benchmarks/drift.py`"
    )


def draw(settings: dict[str, Any], runs: dict[tuple[str, int], Curves], path: Path) -> None:
    """Plot the loss curves over each other, their differences, and the held-out accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, gaps, accuracy) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colors = {"paired": "tab:orange", "shared": "tab:blue", "eager": "tab:gray", "broken": "tab:red"}
    # Draws paired broad and first, so that a shared curve on top of it leaves both visible.
    widths, seen = {"paired": 3.5}, set()
    for layout in ("broken", "eager", "paired", "shared"):
        for (_, seed), curves in sorted((key, value) for key, value in runs.items() if key[0] == layout):
            label = None if layout in seen else layout
            seen.add(layout)
            style: dict[str, Any] = dict(color=colors[layout], label=label)
            xs, ys = list(curves.steps), [record["loss"] for record in curves.steps.values()]
            if layout in ("paired", "shared"):
                losses.plot(xs, ys, color=colors[layout], linewidth=0.3, alpha=0.25)
            losses.plot(
                xs, smooth(ys), **style, linewidth=widths.get(layout, 1.2), alpha=0.6 if layout == "paired" else 1
            )
            if layout != "paired" and (gap := differences(runs, layout, seed)):
                gaps.plot(list(gap), [max(value, 1e-9) for value in gap.values()], **style, linewidth=0.6)
            points = [record["accuracy"] for record in curves.held_out.values()]
            accuracy.plot(
                list(curves.held_out), points, "o-", **style, linewidth=widths.get(layout, 1.2), markersize=3, alpha=0.7
            )
    losses.set(title="DPO loss, mean of 25 steps (thin: each)", xlabel="step", ylabel="nats")
    gaps.set(title="step loss: distance from paired, same seed", xlabel="step", ylabel="nats", yscale="log")
    accuracy.set(title="held-out reward accuracy", xlabel="step")
    for panel in (losses, gaps, accuracy):
        panel.grid(alpha=0.3)
        panel.legend() if panel.get_legend_handles_labels()[0] else None
    seeds = len({seed for _, seed in runs})
    figure.suptitle(f"{settings['device']}, {settings['settings']['dtype']}, {seeds} seeds", fontsize=10)
    figure.savefig(path, dpi=80)


def smooth(values: Sequence[float], width: int = 25) -> list[float]:
    """Running mean of up to ``width`` values, each value with those before it."""
    return [statistics.mean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]


def main() -> int:
    args = parse_args()
    function: Callable[[argparse.Namespace], int] = args.function
    del args.function
    try:
        return function(args)
    except (flexpatch.FlexpatchError, OSError) as error:
        print(f"drift.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
