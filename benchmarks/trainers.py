"""Times stock TRL trainers, these trainers after one line of flexpatch, and packed batches.

    python benchmarks/trainers.py                     # on a GPU; all parts
    python benchmarks/trainers.py --sets hh tldr --parts dpo
    python benchmarks/trainers.py --parts --merge a/trainers.json b/trainers.json    # one table of both
    python benchmarks/trainers.py --device cpu --shape tiny --pairs 8 --budget 2048 --dtype float32 --sets hh

Pairs have lengths at even steps through a set, in random order, so that few pairs are like many; ids are random. Parts:

dpo       LoRA DPOTrainer, reference = adapter off. Stock runs --batch-sizes upwards without gradient checkpointing,
          until memory ends or a size is a tenth slower than the fastest; then with checkpointing, from the last size
          that ran without (smaller sizes would not be faster); then the fastest setting on --flash. The fastest
          counts. One line, flexpatch.apply(model), runs the largest of --one-line-sizes that fits without
          checkpointing. Both count the second of two epochs over equal batches; with --quick, stock counts one epoch,
          after a step with its longest batch, and each set begins with an epoch that nobody counts. Packed,
          PackedDPOTrainer, runs --bins rows of --budget tokens (of several budgets the fastest counts) with compiled
          layers and as much checkpointing as memory demands: the median step (rows are full, so equally long). --modes
          adds both with reference log-probs computed before training: stock again at its two fastest settings, and
          packed. "one line, compiled" is flexpatch.apply(model, compile=True).
nothing   DPOTrainer on pairs that share nothing and need no padding: the cost of flexpatch where it cannot gain.
grpo      Log-probs, forward and backward, of a prompt of 4,096 tokens with 16 answers of 256.
grpo-trainer
          A step of GRPOTrainer on such a group, whose completions are given instead of generated: stock and one line,
          each at the fastest of --groups (completions a micro-batch, gradient checkpointing).
padding-free
          The same sequences behind each other in one row, on --flash: stock by its varlen kernels, against one line.
profile   Kernels of one step of every set, by class: stock at the first batch size, without checkpointing, and packed.

Every call of a mode gets modules of its own around one set of weights. Prints a table after each part, and writes
trainers.json (after each mode of each set), table.md and trainers.png to --output. --merge reads such JSON files of
earlier calls first.
"""

import argparse
import copy
import gc
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from hybrids import SHAPES as HYBRIDS
from lengths import add_lengths
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from train import by_class
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import flexpatch
from flexpatch.packing import epoch_bins
from flexpatch.trl import PackedDPOTrainer

WIDE = dict(
    hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    # 1.9 billion parameters, in layers as wide as in 7B models.
    "8 layers of Mistral-7B": WIDE | dict(num_hidden_layers=8, vocab_size=32000),
    "Mistral-7B": WIDE | dict(model_type="mistral", vocab_size=32000, sliding_window=None),
    "Llama-3-8B": WIDE | dict(vocab_size=128256),
    "Qwen3-8B": WIDE | dict(model_type="qwen3", num_hidden_layers=36, intermediate_size=12288, vocab_size=151936),
    "Llama-3.2-1B": dict(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    ),
    # A mixture of experts: 128 experts in each layer, 8 for each token. 5.6 billion parameters.
    "8 layers of Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=8, intermediate_size=6144, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, vocab_size=151936, tie_word_embeddings=False, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, router_aux_loss_coef=0.001,
    ),
    "tiny mixture": dict(
        model_type="qwen3_moe", hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=512, tie_word_embeddings=True, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.001,
    ),
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512, tie_word_embeddings=True,
    ),
    **{name: shape for name, shape in HYBRIDS.items() if name != "tiny"},
}  # fmt: skip
MODES = ("stock", "one line", "packed")
PRECOMPUTED = ("stock, precomputed", "packed, precomputed")
COMPILED = "one line, compiled"
OPTIONS: dict[str, dict[str, Any]] = {
    "one line": {}, COMPILED: dict(compile=True), "packed": dict(compile=True, recompute_layers="auto"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--sets", nargs="+", help="default: all")
    add("--parts", nargs="*", choices=PARTS, default=["dpo", "nothing", "grpo"])
    add(
        "--modes", nargs="+", choices=(*MODES, COMPILED, *PRECOMPUTED), default=list(MODES), help="of dpo (%(default)s)"
    )
    add("--shape", choices=SHAPES, default="8 layers of Mistral-7B")
    add("--pairs", type=int, default=32, help="pairs that are timed, at least one batch (%(default)s)")
    add("--batch-sizes", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    add("--one-line-sizes", nargs="+", type=int, help="default: --batch-sizes")
    add("--groups", nargs="+", default=["16:on", "4:on", "2:off"], metavar="SIZE:on|off", help="(%(default)s)")
    add("--flash", help="an installed FlashAttention, by transformers' name, such as flash_attention_4")
    add("--precompute", action="store_true", help="compute reference log-probs before training, in all modes")
    add("--quick", action="store_true", help="warm each of stock's settings up by one step instead of an epoch")
    add("--seconds", type=float, default=math.inf, help="begin no mode of a set after so many seconds")
    add("--bins", type=int, default=6, help="packed batches an epoch (%(default)s)")
    add(
        "--budget", dest="budgets", nargs="+", type=int, default=[16384], metavar="TOKENS",
        help="tokens of a packed batch; of several the fastest counts (%(default)s)",
    )  # fmt: skip
    add("--gb", type=float, help="memory of a smaller card, which must suffice for all modes")
    add("--lora", choices=("all-linear", "attention"), default="all-linear", help="layers that get adapters")
    add("--eager", action="store_true", help="packed: without compiled layers, as hybrids need it")
    add("--full", action="store_true", help="train all weights instead of LoRA, with a second model as the reference")
    add("--merge", nargs="+", type=Path, default=[], metavar="JSON", help="trainers.json of earlier calls")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/trainers"))
    options = parser.parse_args()
    options.budget = options.budgets[0]
    if options.eager:
        OPTIONS["packed"]["compile"] = False
    if options.gb is not None:  # a gigabyte is the driver's, not torch's
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (options.gb - 1) * 2**30 / total))
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    lengths = {name: lengths[name] for name in options.sets or lengths}
    results: dict[str, Any] = {}
    for path in options.merge:
        merge(results, json.loads(path.read_text()))
    if options.parts:
        of = results.setdefault(label_of(options), {})
        now = conditions_of(options)
        if (then := of.setdefault("conditions", now)) != now:
            parser.error(f"--merge: measured under other conditions: {then}")
    for part in options.parts:
        if part == "dpo":
            measure_sets(options, lengths, of.setdefault("dpo", {}), lambda: write(results, options.output))
        elif part == "nothing":
            of[part] = nothing_to_gain(options)
        elif part == "profile":
            of[part] = profiles(options, lengths)
        else:
            function = {"grpo": grpo, "grpo-trainer": grpo_trainer, "padding-free": padding_free}[part]
            of[part] = {mode: function(options, mode) for mode in MODES[:2]}
        write(results, options.output)
        print(RENDER[part](of[part]), flush=True)
    write(results, options.output)


def label_of(options: argparse.Namespace) -> str:
    """Name the part of the results that equal options belong to."""
    kind = "full fine-tuning" if options.full else "LoRA" if options.lora == "all-linear" else "LoRA on attention"
    tokens = " or ".join(f"{budget:,}" for budget in options.budgets)
    extra = f", rows of {tokens} tokens" + (", layers not compiled" if options.eager else "")
    return f"{options.shape}, {kind}{extra}{', reference precomputed' if options.precompute else ''}"


def conditions_of(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    layers = SHAPES[options.shape].get("num_hidden_layers")
    counted = "" if "layers" in options.shape or layers is None else f", {layers} layers"
    card = "" if options.gb is None else f" with {options.gb:g} GB of its memory"
    return (
        f"{options.shape} shape{counted}, random weights, {options.dtype}, {device}{card}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, TRL {trl.__version__}, peft {peft.__version__}"
    )


def merge(results: dict[str, Any], more: dict[str, Any]) -> None:
    """Add results of another call, part by part and set by set; later records replace earlier ones.

    Raises:
        SystemExit: If two calls of one label ran under different conditions.
    """
    for label, parts in more.items():
        of = results.setdefault(label, {})
        if of.setdefault("conditions", parts["conditions"]) != parts["conditions"]:
            raise SystemExit(f"{label}: not of one machine and versions: {of['conditions']}; {parts['conditions']}")
        for part, found in parts.items():
            if part == "dpo":
                for name, modes in found.items():
                    of.setdefault(part, {}).setdefault(name, {}).update(modes)
            elif part in ("grpo", "grpo-trainer", "padding-free"):
                of.setdefault(part, {}).update(found)
            else:
                of[part] = found


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the records, the tables of every label, and the bars of the first that has sets."""
    (folder / "trainers.json").write_text(json.dumps(results, indent=1))
    (folder / "table.md").write_text(report(results))
    for of in results.values():
        if complete := {name: modes for name, modes in of.get("dpo", {}).items() if not set(MODES) - set(modes)}:
            plot(complete, folder / "trainers.png", of["conditions"])
            break


def report(results: dict[str, Any]) -> str:
    """Write the tables of all labels. A step of GRPOTrainer is the last line of its label's table of DPO."""
    texts = []
    for label, of in results.items():
        parts = [] if len(results) == 1 else [f"**{label}**"]
        if "dpo" in of:
            parts.append(dpo_table(of["dpo"], label, of.get("grpo-trainer")))
        parts += [render(of[part]) for part, render in RENDER.items() if part in of and part != "dpo"]
        parts.append(f"Conditions: {of['conditions']}; lengths of real datasets. `python benchmarks/trainers.py`")
        texts.append("\n\n".join(parts))
    return "\n\n".join(texts) + "\n"


def measure_sets(
    options: argparse.Namespace, lengths: dict[str, Any], results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure the modes of every set that ``results`` does not have yet."""
    start = time.perf_counter()
    warmed = ""
    for name, mode in itertools.product(lengths, options.modes):
        modes = results.setdefault(name, {})
        if mode in modes:
            continue
        if time.perf_counter() - start > options.seconds:
            print(
                f"{time.perf_counter() - start:.0f} s are over: {name}, {mode} and all after it are left out",
                flush=True,
            )
            break
        if warmed != name and (options.quick or not warmed):  # TRL's kernels compile again for a few lengths of a set
            pairs = options.pairs if options.quick else 1
            once = argparse.Namespace(**vars(options) | dict(pairs=pairs, quick=True))
            measure(once, "stock", lengths[name], min(options.batch_sizes), True)
            warmed = name
        began = time.perf_counter()
        modes[mode] = best(options, mode, name, lengths[name], modes)
        print(f"{name}, {mode}: {time.perf_counter() - began:.0f} s, at {began - start:.0f} s", flush=True)
        save()
    for name in [name for name, modes in results.items() if not modes]:
        del results[name]


def profiles(options: argparse.Namespace, lengths: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, mode in itertools.product(lengths, ("stock", "packed")):
        profiler = Profiler()
        size = options.batch_sizes[0]
        record = measure(options, mode, lengths[name], size, mode == "packed", callbacks=[profiler])
        found[f"{name}, {mode}"] = profiler.classes
        (options.output / f"profile_{name}_{mode}.txt").write_text(profiler.table)
        print(name, mode, record, profiler.table, flush=True)
    return found


def make_model(options: argparse.Namespace, attention: str = "sdpa", which: str = "policy") -> Any:
    """Make new modules around weights that are made once: what trainers and patches leave on modules is gone."""
    template = weights(options.shape, options.device, options.dtype, which)
    memo: dict[int, Any] = {}
    for tensor in (*template.parameters(), *template.buffers()):
        memo[id(tensor)] = tensor
    for parameter in template.parameters():
        parameter.requires_grad_(True)  # peft froze them
        parameter.grad = None
    model = copy.deepcopy(template, memo)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    return model


@cache
def weights(shape: str, device: str, dtype: str, which: str) -> Any:
    """Make a model of random weights, and keep it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**({"model_type": "llama"} | SHAPES[shape]), max_position_embeddings=131072)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def spread(lengths: list[list[int]], count: int) -> list[list[int]]:
    """Take ``count`` pairs at even steps through a set that is sorted by length, in random order."""
    ordered = sorted(lengths, key=sum)
    taken = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    random.Random(0).shuffle(taken)
    return taken


def pairs_of(lengths: list[list[int]], vocabulary: int) -> datasets.Dataset:
    """Make tokenised pairs of these lengths."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(5, vocabulary) for _ in range(length)]

    columns = {
        name: [ids(triple[i]) for triple in lengths]
        for i, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))
    }
    # A fingerprint of the lengths alone, because hashing the contents takes seconds.
    fingerprint = hashlib.sha256(json.dumps(lengths).encode()).hexdigest()[:16]
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint=fingerprint)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


class Prepared:
    """Mixin for a trainer that takes tokenised rows as they are."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Stock(Prepared, trl.DPOTrainer):
    pass


class Packed(Prepared, PackedDPOTrainer):
    pass


class Clock(TrainerCallback):
    """Time each epoch, data included, and each step of the last epoch, in seconds: on a GPU, when it ends its work.

    The host waits for the GPU at the end of an epoch alone, so that steps may run into each other as in training.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.epochs: list[float] = []
        self.steps: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks = [mark_of(self.cuda)]
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(mark_of(self.cuda))

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.steps = [seconds_between(*pair) for pair in itertools.pairwise(self.marks)]
        self.epochs.append(seconds_between(self.marks[0], self.marks[-1]))


def mark_of(cuda: bool) -> Any:
    """Mark the work that was launched until now: by a CUDA event; without CUDA, by seconds."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Subtract two marks of a clock: CUDA events, or seconds."""
    return float(first.elapsed_time(second) / 1e3 if isinstance(first, torch.cuda.Event) else second - first)


class Profiler(TrainerCallback):
    """Profile the longest of the second epoch's second to fourth steps; the last rows of an epoch are short."""

    def __init__(self) -> None:
        self.profile: Any = None
        self.classes: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if 0 < state.global_step - state.max_steps // 2 < 4:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
            self.profile.start()
            torch.cuda.synchronize()
            self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.profile is None:
            return
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - self.start)
        self.profile.stop()
        events, self.profile = self.profile.key_averages(), None
        classes = by_class(events)
        classes["GPU idle"] = wall - sum(classes.values())
        if wall > sum(self.classes.values()):
            self.classes = classes
            self.table = events.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)


def best(
    options: argparse.Namespace, mode: str, name: str, lengths: list[list[int]], before: dict[str, Any]
) -> dict[str, Any]:
    """Find the fastest of a mode's settings, and list all that were tried. ``before``: modes that were measured."""
    tried: list[dict[str, Any]] = []

    def rate(size: int, recompute: bool, attention: str = "sdpa", budget: int = options.budget) -> float:
        setting = dict(batch_size=size, recompute=recompute, attention=attention, budget=budget)
        given = argparse.Namespace(**vars(options) | dict(budget=budget))
        tried.append(attempt(lambda: measure(given, mode, lengths, size, recompute, attention), setting))
        print(name, mode, tried[-1], flush=True)
        return float(tried[-1]["pairs_per_s"])

    def fastest() -> dict[str, Any]:
        return max(tried, key=lambda record: record["pairs_per_s"])

    if mode.startswith("packed"):
        for budget in options.budgets:
            rate(1, True, budget=budget)
    elif mode.startswith("one line"):  # larger batches gain more
        sizes = sorted(options.one_line_sizes or options.batch_sizes, reverse=True)
        any(rate(size, again) for again in (False, True) for size in sizes)
    elif mode != "stock" and "stock" in before:
        records = sorted(before["stock"]["tried"], key=lambda record: -record["pairs_per_s"])[:2]
        for record in records:
            rate(record["batch_size"], record["recompute"], record["attention"])
    else:
        largest = 0  # largest size that ran without checkpointing
        for recompute in (False, True):
            for size in sorted(options.batch_sizes):
                if size < largest:
                    continue
                found = rate(size, recompute)
                if found and not recompute:
                    largest = size
                if found < 0.9 * fastest()["pairs_per_s"] or not found:
                    break
        if options.flash:
            rate(fastest()["batch_size"], fastest()["recompute"], options.flash)
    return fastest() | dict(tried=tried)


def attempt(call: Callable[[], dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """Measure a setting, or record that memory was short; the memory is free afterwards."""
    try:
        record = call()
    except torch.OutOfMemoryError:
        record = setting | dict(pairs_per_s=0.0, failed="out of memory")
    gc.collect()
    torch.cuda.empty_cache()
    return record


def measure(
    options: argparse.Namespace,
    mode: str,
    lengths: list[list[int]],
    batch_size: int,
    recompute: bool = True,
    attention: str = "sdpa",
    callbacks: list[TrainerCallback] | None = None,
) -> dict[str, Any]:
    """Time a trainer's steps: pairs a second of the whole timed epoch; packed, of the median step of full rows."""
    model = make_model(options, attention)
    base, kind, skipped = mode.split(",")[0], Stock, 0
    arguments = adapters_or_reference(options, mode if mode in OPTIONS else base, attention)
    if base != "stock":
        flexpatch.apply(model, **(OPTIONS.get(mode, OPTIONS[base]) if options.device == "cuda" else {}))
    if base == "packed":
        drawn = full_rows(lengths, options)
        arguments["token_budget"], kind = options.budget, Packed
    else:
        count = max(options.pairs, batch_size)
        drawn = spread(lengths, count - count % batch_size)
    count = len(drawn)
    if base == "stock" and options.quick:
        batches = [drawn[at : at + batch_size] for at in range(0, count, batch_size)]
        drawn = max(batches, key=lambda batch: max(p + max(c, r) for p, c, r in batch)) + drawn
        skipped = 1
    clock = Clock(options.device == "cuda")
    config = trl.DPOConfig(
        output_dir=str(options.output), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        max_length=None, num_train_epochs=1 if skipped else 2, per_device_train_batch_size=batch_size,
        gradient_checkpointing=recompute, train_sampling_strategy="sequential", bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu" and "ACCELERATE_TORCH_DEVICE" not in os.environ,  # of ranks that pretend
        precompute_ref_log_probs=options.precompute or mode in PRECOMPUTED,
    )  # fmt: skip
    trainer = kind(
        model,
        args=config,
        train_dataset=pairs_of(drawn, model.config.vocab_size),
        processing_class=tokenizer(),
        callbacks=[clock, *(callbacks or [])],
        **arguments,
    )
    trainer.train()
    steps = clock.steps[skipped:]
    average = statistics.median if base == "packed" else statistics.mean
    seconds, pairs_per_step = average(steps), count / len(steps)
    return dict(
        pairs_per_s=pairs_per_step / seconds,
        ms_per_step=1e3 * seconds,
        pairs_per_step=pairs_per_step,
        batch_size=batch_size,
        recompute=recompute,
        attention=attention,
        budget=options.budget,
        steps_ms=[round(1e3 * step) for step in steps],
        first_epoch_extra_s=clock.epochs[0] - clock.epochs[-1],
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else None,
        told=str(flexpatch.savings(model)) if base != "stock" else "",
        token_factor=flexpatch.savings(model).factor if base != "stock" else 1.0,
    )


def settings_of(options: argparse.Namespace, pairs: int = 1) -> argparse.Namespace:
    """Add to another script's options what :func:`measure` asks for: LoRA on all linear layers, all of the memory."""
    fixed = dict(full=False, lora="all-linear", quick=False, precompute=False, gb=None)
    return argparse.Namespace(**vars(options) | fixed, pairs=pairs)


def adapters_or_reference(options: argparse.Namespace, mode: str, attention: str) -> dict[str, Any]:
    """Make the arguments of a trainer for LoRA, or for all weights and a second model as the reference."""
    if not options.full:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if options.lora == "attention" else options.lora
        return dict(peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    reference = make_model(options, attention, "reference")
    if mode != "stock":
        flexpatch.apply(reference, compile=OPTIONS[mode].get("compile", False) and options.device == "cuda")
    return dict(ref_model=reference)


def full_rows(lengths: list[list[int]], options: argparse.Namespace) -> list[list[int]]:
    """Take as many pairs as fill --bins rows, of all ranks that a launcher started."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    count = round(options.bins * options.budget / statistics.mean(map(sum, lengths)))
    while len(epoch_bins(list(map(sum, drawn := spread(lengths, count))), options.budget, ranks=ranks)) > options.bins:
        count -= 1
    return drawn


def grpo_trainer(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Find the fastest of GRPOTrainer's settings for one group a step, and list all that were tried."""
    tried = []
    for group in options.groups:
        size, _, recompute = group.partition(":")
        setting = dict(batch_size=int(size), recompute=recompute == "on", attention="sdpa")
        tried.append(attempt(lambda given=setting: grpo_steps(options, mode, given), setting))  # type: ignore[misc]
        print("GRPOTrainer", mode, tried[-1], flush=True)
    if mode == "stock" and options.flash:
        setting = {k: max(tried, key=lambda of: of["pairs_per_s"])[k] for k in setting} | dict(attention=options.flash)
        tried.append(attempt(lambda: grpo_steps(options, mode, setting), setting))
        print("GRPOTrainer", mode, tried[-1], flush=True)
    return max(tried, key=lambda record: record["pairs_per_s"]) | dict(tried=tried)


def grpo_steps(options: argparse.Namespace, mode: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Time GRPOTrainer's steps on groups whose completions are given: median after one step (one line: two)."""
    prompt, answers, length = sizes_of_group(options)
    size, cold, timed_steps = min(setting["batch_size"], answers), 1 if mode == "stock" else 2, 3
    model = make_model(options, setting["attention"])
    arguments: dict[str, Any] = {}
    if not options.full:
        arguments = adapters_or_reference(options, mode, setting["attention"])
    if mode != "stock":
        flexpatch.apply(model)
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(5, model.config.vocab_size) for _ in range(count)]

    def rollout(prompts: list[str], _: Any) -> dict[str, Any]:
        shared = ids(prompt)
        return dict(prompt_ids=[shared] * len(prompts), completion_ids=[ids(length) for _ in prompts], logprobs=None)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    clock = Clock(options.device == "cuda")
    config = trl.GRPOConfig(
        output_dir=str(options.output), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        per_device_train_batch_size=size, gradient_accumulation_steps=answers // size, num_generations=answers,
        max_completion_length=length, gradient_checkpointing=setting["recompute"], max_steps=cold + timed_steps,
        bf16=options.dtype == "bfloat16", use_cpu=options.device == "cpu", beta=0.0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a prompt"] * (cold + timed_steps)}),
        processing_class=tokenizer(),
        rollout_func=rollout,
        callbacks=[clock],
        **arguments,
    )
    trainer.train()
    seconds = statistics.median(clock.steps[cold:])
    if mode != "stock":
        assert flexpatch.savings(model).folded, flexpatch.savings(model)
    return setting | dict(
        pairs_per_s=answers / seconds,
        ms=1e3 * seconds,
        steps_ms=[round(1e3 * step) for step in clock.steps],
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else None,
        shape=[prompt, answers, length],
    )


def sizes_of_group(options: argparse.Namespace) -> tuple[int, int, int]:
    """Tokens of the prompt, answers to it, and tokens of each."""
    return (64, 4, 16) if options.shape.startswith("tiny") else (4096, 16, 256)


def nothing_to_gain(options: argparse.Namespace) -> dict[str, float]:
    """Time the median step of batches without padding or shared tokens, the better of two runs each."""
    lengths = [[1, 449, 449]] if options.shape != "tiny" else [[1, 40, 40]]
    times = {mode: min(measure(options, mode, lengths, 8)["ms_per_step"] for _ in range(2)) for mode in MODES[:2]}
    return times | {"cost": times["one line"] / times["stock"] - 1}


def answers_to_a_prompt(options: argparse.Namespace, mode: str, attention: str) -> tuple[Any, torch.Tensor, list[int]]:
    """Make a checkpointed model, ids (answers, prompt + length) that share their prompt, and these three sizes."""
    prompt, answers, length = sizes_of_group(options)
    model = make_model(options, attention).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode != "stock":
        flexpatch.apply(model)
    generator = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(
        5, model.config.vocab_size, (answers, prompt + length), generator=generator, device=options.device
    )
    ids[:, :prompt] = ids[:1, :prompt]
    return model, ids, [prompt, answers, length]


def grpo(options: argparse.Namespace, mode: str) -> Any:
    """Measure log-probs of answers and their gradients in all weights, with checkpointing: median time, peak memory."""
    model, ids, shape = answers_to_a_prompt(options, mode, "sdpa")
    prompt, _, length = shape
    mask = torch.ones_like(ids)

    def step() -> None:
        model.zero_grad()
        logits = model(ids, mask, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten()).backward()

    return timed_step(step, options) | dict(shape=shape)


def padding_free(options: argparse.Namespace, mode: str) -> Any:
    """Measure log-probs of answers in one padding-free row, and their gradients in all weights, with checkpointing."""
    attention = options.flash or "sdpa"
    model, ids, shape = answers_to_a_prompt(options, mode, attention)
    prompt, answers, length = shape
    positions = torch.arange(prompt + length, device=options.device).repeat(answers)[None]
    # As trainers pass them: FlashAttention 4 takes no longest length that transformers finds, a tensor.
    cu = torch.arange(answers + 1, device=options.device, dtype=torch.int32) * (prompt + length)
    boundaries = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=prompt + length, max_length_k=prompt + length)
    predictors = (positions[0] >= prompt - 1) & (positions[0] < prompt + length - 1)
    means = []

    def step() -> None:
        model.zero_grad()
        row = dict(input_ids=ids.view(1, -1), position_ids=positions, use_cache=False, **boundaries)
        hidden = model.base_model(**row).last_hidden_state
        logits = model.lm_head(hidden[0, predictors])
        loss = nn.functional.cross_entropy(logits.float(), ids[:, prompt:].flatten())
        loss.backward()
        means.append(-loss.item())

    record = timed_step(step, options)
    if mode != "stock":
        assert flexpatch.savings(model).folded, flexpatch.savings(model)
    return record | dict(shape=shape, tokens=ids.numel(), mean=means[-1], attention=attention)


def timed_step(step: Callable[[], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time a step in milliseconds, and measure its peak memory in GB."""
    seconds = timed(step, options.device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else None
    return dict(ms=1e3 * seconds, peak_gb=peak)


def timed(step: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Time a call: median seconds, after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def dpo_table(results: dict[str, Any], label: str, group: dict[str, Any] | None = None) -> str:
    """Write the table of the sets, and below it that of precomputed references. ``group``: a step of GRPOTrainer."""
    lines = [
        "| lengths like | stock, pairs/s (batch, checkpointing) | one line, pairs/s | packed, pairs/s | one line "
        "| packed | tokens | peak GB: stock, one line, packed | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in results.items():
        if "stock" not in modes or "packed" not in modes:
            continue
        stock, line, packed = (modes.get(mode) for mode in MODES)
        cells = [name, rate_of(stock), rate_of(line) if line else "", rate_of_packed(packed)]
        cells += [gain(stock, line), gain(stock, packed), f"÷ {(line or packed)['token_factor']:.2f}"]
        cells.append(", ".join(gigabytes(of) for of in (stock, line, packed)))
        cells.append(f"{packed['first_epoch_extra_s']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    if group and not set(MODES[:2]) - set(group):
        stock, line = (group[mode] for mode in MODES[:2])
        prompt, answers, length = stock["shape"]
        cells = [f"*GRPOTrainer's step: {prompt:,}-token prompt, {answers} answers of {length}*"]
        cells += [f"*{of['ms']:.0f} ms* ({of['batch_size']}, {on(of['recompute'])})" for of in (stock, line)]
        cells += ["", gain(stock, line), "", "", f"{gigabytes(stock)}, {gigabytes(line)}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    tried = [record for modes in results.values() for record in modes.get("stock", {}).get("tried", [])]
    sizes = ", ".join(map(str, sorted({record["batch_size"] for record in tried})))
    kernels = sorted({record["attention"] for record in tried}, key=lambda name: name != "sdpa")
    reference = "a second model" if "full" in label else "adapter off"
    when = "computed before" if "precomputed" in label else f"pass by {reference}"
    lines.append(
        f"\nDPOTrainer, {label}; reference {when}. Stock: the fastest of batches of {sizes} pairs, with and "
        f"without gradient checkpointing, on {' or '.join(kernels)}; one line: the largest that fits without; packed: "
        'recompute_layers="auto"; *tokens*: padded tokens of the one line\'s batches over those that it computed.'
    )
    compiled = {name: modes for name, modes in results.items() if not {"stock", COMPILED} - set(modes)}
    if compiled:
        lines += [
            "\n| one line with compile=True, lengths like | pairs/s (batch, checkpointing) | over stock | peak GB "
            "| compiling, s |",
            "|---|---|---|---|---|",
        ]
    for name, modes in compiled.items():
        stock, line = modes["stock"], modes[COMPILED]
        cells = [name, rate_of(line), gain(stock, line), gigabytes(line), f"{line['first_epoch_extra_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    both = {name: modes for name, modes in results.items() if not set(PRECOMPUTED) - set(modes)}
    if both:
        lines += [
            "\n| reference computed before, lengths like | stock, pairs/s (batch, checkpointing) | packed, pairs/s "
            "| packed | peak GB: stock, packed |",
            "|---|---|---|---|---|",
        ]
    for name, modes in both.items():
        stock, packed = (modes[mode] for mode in PRECOMPUTED)
        cells = [name, rate_of(stock), rate_of_packed(packed), gain(stock, packed)]
        lines.append(f"| {' | '.join([*cells, f'{gigabytes(stock)}, {gigabytes(packed)}'])} |")
    return "\n".join(lines)


def rate_of(record: dict[str, Any]) -> str:
    return f"{record['pairs_per_s']:.1f} ({record['batch_size']}, {on(record['recompute'])})"


def rate_of_packed(record: dict[str, Any]) -> str:
    """Tell the rate, and the tokens of a batch where several were tried."""
    return f"{record['pairs_per_s']:.1f}" + (f" ({record['budget']:,})" if len(record["tried"]) > 1 else "")


def on(recompute: bool) -> str:
    return "on" if recompute else "off"


def gain(stock: dict[str, Any], other: dict[str, Any] | None) -> str:
    if not other or not stock["pairs_per_s"]:
        return ""
    return f"**{other['pairs_per_s'] / stock['pairs_per_s']:.2f}×**"


def gigabytes(record: dict[str, Any] | None) -> str:
    return f"{record['peak_gb']:.0f}" if record and record.get("peak_gb") else "–"


def grpo_table(results: dict[str, Any]) -> str:
    stock, ours = (results[mode] for mode in MODES[:2])
    prompt, answers, length = stock["shape"]
    peaks = "–" if stock["peak_gb"] is None else f"{stock['peak_gb']:.1f}, {ours['peak_gb']:.1f}"
    return (
        f"Prompt of {prompt:,} tokens, {answers} answers of {length}: log-probs, forward and backward, all weights.\n\n"
        "| unpatched, ms | flexpatch, ms | speed-up | peak GB: unpatched, flexpatch |\n|---|---|---|---|\n"
        f"| {stock['ms']:.0f} | {ours['ms']:.0f} | **{stock['ms'] / ours['ms']:.2f}×** | {peaks} |"
    )


def grpo_trainer_text(results: dict[str, Any]) -> str:
    text = "A step of GRPOTrainer whose completions are given."
    for mode, found in results.items():
        tried = [
            f"{of['batch_size']} a micro-batch, checkpointing {on(of['recompute'])}, {of['attention']}: "
            + (f"{of['ms']:.0f} ms" if "ms" in of else str(of["failed"]))
            for of in found["tried"]
        ]
        text += f" {mode.capitalize()}: {'; '.join(tried)}."
    return text


def padding_free_text(results: dict[str, Any]) -> str:
    stock, ours = (results[mode] for mode in MODES[:2])
    return (
        "A padding-free row of {tokens:,} tokens, {shape[1]} answers of {shape[2]} to a prompt of {shape[0]}: "
        "log-probs with gradients, ms: {attention} {stock:.0f}, with flexpatch {ms:.0f} ({factor:.2f}×), mean "
        "log-prob {mean:.4f} (unpatched {stock_mean:.4f})."
    ).format(**ours, stock=stock["ms"], factor=stock["ms"] / ours["ms"], stock_mean=stock["mean"])


def nothing_text(results: dict[str, float]) -> str:
    text = "Nothing to gain, ms a step: stock {stock:.1f}, with flexpatch {one line:.1f} ({cost:+.1%})."
    return text.format(**results)


def profile_table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"| ms a step | {' | '.join(next(iter(results.values())))} |", "|---" * 8 + "|"]
    lines += [f"| {name} | {' | '.join(f'{ms:.0f}' for ms in of.values())} |" for name, of in results.items()]
    return "\n".join(lines)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "dpo": lambda results: dpo_table(results, "this run"),
    "nothing": nothing_text,
    "grpo": grpo_table,
    "grpo-trainer": grpo_trainer_text,
    "padding-free": padding_free_text,
    "profile": profile_table,
}
PARTS = tuple(RENDER)


def plot(results: dict[str, Any], path: Path, conditions: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for i, mode in enumerate(MODES):
        heights = [modes[mode]["pairs_per_s"] / modes["stock"]["pairs_per_s"] for modes in results.values()]
        bars = axes.bar([x + 0.27 * (i - 1) for x in range(len(results))], heights, 0.25, label=mode)
        axes.bar_label(bars, fmt="%.1f×", fontsize=8)
    axes.set_xticks(range(len(results)), results)
    axes.set(ylabel="pairs a second, stock = 1", title="TRL's DPOTrainer: stock, after one line of flexpatch, packed")
    axes.set_xlabel(conditions, fontsize=6)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
