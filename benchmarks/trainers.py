"""Stock TRL trainers against the same trainers after one line of flexpatch, and against packed batches.

    python benchmarks/trainers.py LENGTHS.json                     # on a GPU; all parts
    python benchmarks/trainers.py LENGTHS.json --sets hh tldr --parts dpo
    python benchmarks/trainers.py LENGTHS.json --device cpu --shape tiny --pairs 16 --budget 512 --dtype float32

LENGTHS.json maps names of datasets to [prompt, chosen, rejected] token lengths; ids are random. Parts:

dpo       LoRA DPOTrainer, gradient checkpointing, reference = adapter off: batches of 8 pairs as they are, after
          flexpatch.apply(model), and PackedDPOTrainer. Two epochs over the same batches in the same order; the second
          one counts, so that compilation (printed apart) and allocation are over.
nothing   The same trainer on pairs that share nothing and need no padding: what flexpatch costs where it cannot gain.
grpo      Log-probs, forward and backward, of a prompt of 4,096 tokens with 16 answers of 256.
overhead  Milliseconds of folding a batch of 16,384 shared tokens (merging, copying, masks), and of giving up on one.
profile   Kernels of one step of the first set, stock and packed, by time.

Prints one table a part, writes them with trainers.json and trainers.png to --output.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import flexpatch
from flexpatch import patch
from flexpatch.trl import PackedDPOTrainer

SHAPES = {
    # 1.9 billion parameters, in layers as wide as those people tune.
    "8 layers of Mistral-7B": dict(
        hidden_size=4096, num_hidden_layers=8, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=32000, tie_word_embeddings=False,
    ),
    "Llama-3.2-1B": dict(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
MODES = ("stock", "one line", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lengths", type=Path)
    add("--sets", nargs="+", help="default: all")
    add("--parts", nargs="+", default=["dpo", "nothing", "grpo", "overhead"])
    add("--shape", choices=SHAPES, default="8 layers of Mistral-7B")
    add("--pairs", type=int, default=80, help="pairs of an epoch of stock and one-line training (%(default)s)")
    add("--batch-size", type=int, default=8)
    add("--bins", type=int, default=6, help="about so many packed batches an epoch (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a packed batch (%(default)s)")
    add("--full", action="store_true", help="all weights instead of LoRA, with a second model as the reference")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/trainers"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    names = options.sets or list(lengths)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    conditions = (
        f"{options.shape} shape, random weights, {options.dtype}, {device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, TRL {trl.__version__}, peft {peft.__version__}"
    )
    results: dict[str, Any] = {"conditions": conditions}
    tables = [conditions]
    for part in options.parts:
        if part == "dpo":
            results[part] = {name: {} for name in names}
            for name in names:
                for mode in MODES:
                    results[part][name][mode] = measure(options, mode, lengths[name])
                    print(name, mode, results[part][name][mode], flush=True)
            tables.append(dpo_table(results[part], options))
            plot(results[part], options.output / "trainers.png", conditions)
        elif part == "nothing":
            results[part] = nothing_to_gain(options)
            tables.append(
                "Nothing to gain, ms a step: stock {stock:.1f}, with flexpatch {one line:.1f} ({cost:+.1%}).".format(
                    **results[part]
                )
            )
        elif part == "grpo":
            results[part] = {mode: grpo(options, mode) for mode in MODES[:2]}
            tables.append(grpo_table(results[part], options))
        elif part == "profile":
            for mode in ("stock", "packed"):
                profiler = Profiler()
                measure(options, mode, lengths[names[0]], callbacks=[profiler])
                (options.output / f"profile_{mode}.txt").write_text(profiler.table)
                print(names[0], mode, profiler.table, flush=True)
            continue
        else:
            results[part] = {name: overhead(options, lengths[name]) for name in names}
            alone = [[1, 449, 449]]
            results[part]["nothing to share (not folded)"] = overhead(options, alone, 2 * 450 * options.batch_size)
            tables.append("Folding a batch, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in results[part].items()))
        (options.output / "trainers.json").write_text(json.dumps(results, indent=1))
        (options.output / "table.md").write_text("\n\n".join(tables))
        print(tables[-1], flush=True)


def make_model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES[options.shape], max_position_embeddings=32768)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.config.use_cache = False
    return model


def pairs_of(lengths: list[list[int]], count: int, vocabulary: int) -> datasets.Dataset:
    """``count`` tokenised pairs whose lengths are drawn, with replacement, from ``lengths``."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(5, vocabulary) for _ in range(length)]

    drawn = rng.choices(lengths, k=count)
    columns = {
        name: [ids(triple[i]) for triple in drawn]
        for i, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))
    }
    # Named, because naming it by its contents takes seconds.
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint=f"random-{count}")


class Prepared:
    """Rows are tokenised ahead, since their ids are random; nothing else differs from the trainer mixed in."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Stock(Prepared, trl.DPOTrainer):
    pass


class Packed(Prepared, PackedDPOTrainer):
    pass


class Clock(TrainerCallback):
    """Seconds of each epoch, data included, and of each step; peak memory of the last epoch."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.epochs: list[float] = []
        self.steps: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps = []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.epoch = self.last = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.now() - self.last)
        self.last += self.steps[-1]

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(self.now() - self.epoch)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Profiler(TrainerCallback):
    """Kernels of the second epoch's second step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.profile = None
        if state.global_step == state.max_steps // 2 + 1:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profile = torch.profiler.profile(activities=activities, acc_events=True)
            self.profile.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.profile is not None:
            torch.cuda.synchronize()
            self.profile.stop()
            self.table = self.profile.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90
            )


def measure(
    options: argparse.Namespace, mode: str, lengths: list[list[int]], callbacks: list[TrainerCallback] | None = None
) -> Any:
    model = make_model(options)
    count, kind = options.pairs, Stock
    arguments: dict[str, Any] = {}
    if mode != "stock":
        flexpatch.apply(model)
    if options.full:
        arguments["ref_model"] = make_model(options)
        if mode != "stock":
            flexpatch.apply(arguments["ref_model"])
    else:
        arguments["peft_config"] = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    if mode == "packed":
        mean = statistics.mean(map(sum, lengths))
        count = max(options.pairs, round(options.bins * options.budget / mean))
        arguments["token_budget"], kind = options.budget, Packed
    clock = Clock(options.device == "cuda")
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    config = trl.DPOConfig(
        output_dir=str(options.output), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        max_length=None, num_train_epochs=2, per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="sequential", bf16=options.dtype == "bfloat16", use_cpu=options.device == "cpu",
    )  # fmt: skip
    trainer = kind(
        model,
        args=config,
        train_dataset=pairs_of(lengths, count, model.config.vocab_size),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        callbacks=[clock, *(callbacks or [])],
        **arguments,
    )
    trainer.train()
    first, second = clock.epochs
    return dict(
        pairs_per_s=count / second,
        ms_per_step=1e3 * statistics.median(clock.steps),
        pairs_per_step=count / len(clock.steps),
        first_epoch_extra_s=first - second,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else None,
        token_factor=flexpatch.savings(model).factor if mode != "stock" else 1.0,
    )


def nothing_to_gain(options: argparse.Namespace) -> dict[str, float]:
    """Median step of batches without padding or shared tokens, the better of two runs each."""
    lengths = [[1, 449, 449]] if options.shape != "tiny" else [[1, 40, 40]]
    times = {mode: min(measure(options, mode, lengths)["ms_per_step"] for _ in range(2)) for mode in MODES[:2]}
    return times | {"cost": times["one line"] / times["stock"] - 1}


def grpo(options: argparse.Namespace, mode: str, prompt: int = 4096, answers: int = 16, length: int = 256) -> Any:
    """Median time and peak memory of answers' log-probs and their gradients in all weights, with checkpointing."""
    if options.shape == "tiny":
        prompt, answers, length = 64, 4, 16
    model = make_model(options).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode != "stock":
        flexpatch.apply(model)
    generator = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(
        5, model.config.vocab_size, (answers, prompt + length), generator=generator, device=options.device
    )
    ids[:, :prompt] = ids[:1, :prompt]
    mask = torch.ones_like(ids)

    def step() -> None:
        model.zero_grad()
        logits = model(ids, mask, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten()).backward()

    seconds = timed(step, options.device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else None
    return dict(ms=1e3 * seconds, peak_gb=peak, shape=[prompt, answers, length])


def timed(step: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Median seconds, after two warm-ups."""
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


def overhead(options: argparse.Namespace, lengths: list[list[int]], tokens: int | None = None) -> float:
    """Milliseconds of folding one batch of about ``tokens`` (``options.budget``) shared tokens, or of finding that this
    would gain nothing."""
    model = flexpatch.apply(make_model(options))
    count = max(2, round((tokens or options.budget) / statistics.mean(map(sum, lengths))))
    rows = pairs_of(lengths, count, model.config.vocab_size)
    sequences = [torch.tensor(row["prompt_ids"] + row[key]) for key in ("chosen_ids", "rejected_ids") for row in rows]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(options.device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True).to(options.device)
    hook = patch._RowHook()
    call = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    return 1e3 * timed(lambda: hook(model.base_model, (), dict(call)), options.device, 20)


def dpo_table(results: dict[str, Any], options: argparse.Namespace) -> str:
    kind, reference = ("full fine-tuning", "a second model") if options.full else ("LoRA", "adapter off")
    lines = [
        f"DPOTrainer, {kind}, gradient checkpointing, reference pass by {reference}; stock and one line: "
        f"{options.batch_size} pairs a batch; packed: {options.budget:,} tokens a batch.\n",
        "| lengths like | stock, pairs/s | one line, pairs/s | packed, pairs/s | one line | packed | "
        "tokens | peak GB: stock, one line, packed | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in results.items():
        speed = {mode: modes[mode]["pairs_per_s"] for mode in MODES}
        peak = ", ".join("–" if modes[m]["peak_gb"] is None else f"{modes[m]['peak_gb']:.1f}" for m in MODES)
        cells = [
            name,
            *(f"{speed[m]:.1f}" for m in MODES),
            *(f"**{speed[m] / speed['stock']:.2f}×**" for m in MODES[1:]),
        ]
        ours = modes["one line"]
        cells += [f"÷ {ours['token_factor']:.2f}", peak, f"{ours['first_epoch_extra_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grpo_table(results: dict[str, Any], options: argparse.Namespace) -> str:
    stock, ours = (results[mode] for mode in MODES[:2])
    prompt, answers, length = stock["shape"]
    peaks = "–" if stock["peak_gb"] is None else f"{stock['peak_gb']:.1f}, {ours['peak_gb']:.1f}"
    return (
        f"Prompt of {prompt:,} tokens, {answers} answers of {length}: log-probs, forward and backward, all weights.\n\n"
        "| unpatched, ms | flexpatch, ms | speed-up | peak GB: unpatched, flexpatch |\n|---|---|---|---|\n"
        f"| {stock['ms']:.0f} | {ours['ms']:.0f} | **{stock['ms'] / ours['ms']:.2f}×** | {peaks} |"
    )


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


if __name__ == "__main__":
    main()
