"""Times stock TRL trainers, these trainers after one line of flexpatch, and packed batches.

    python benchmarks/trainers.py LENGTHS.json                     # on a GPU; all parts
    python benchmarks/trainers.py LENGTHS.json --sets hh tldr --parts dpo
    python benchmarks/trainers.py LENGTHS.json --device cpu --shape tiny --pairs 16 --budget 4096 --dtype float32

LENGTHS.json maps names of datasets to [prompt, chosen, rejected] token lengths; ids are random. Parts:

dpo       LoRA DPOTrainer, reference = adapter off. Stock runs --batch-sizes upwards without gradient checkpointing,
          until memory ends or a size is a tenth slower than the fastest; then with checkpointing, from the last size
          that ran without (smaller sizes would not be faster); then the fastest setting on --flash. The fastest
          counts. One line, flexpatch.apply(model), runs the largest size that fits without checkpointing. Both count
          the second of two epochs over equal batches. Packed, PackedDPOTrainer, runs rows of --budget tokens with
          compiled layers and as much checkpointing as memory demands: the median step (rows are full, so equally
          long) times the number of rows.
nothing   DPOTrainer on pairs that share nothing and need no padding: the cost of flexpatch where it cannot gain.
grpo      Log-probs, forward and backward, of a prompt of 4,096 tokens with 16 answers of 256.
padding-free
          The same sequences behind each other in one row, on --flash: stock by its varlen kernels, against one line.
profile   Kernels of one step of every set, by class: stock at the first batch size, without checkpointing, and packed.

Prints one table a part, writes them with trainers.json and trainers.png to --output.
"""

import argparse
import gc
import itertools
import json
import math
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
from hybrids import SHAPES as HYBRIDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from train import by_class
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import flexpatch
from flexpatch.trl import PackedDPOTrainer

SHAPES = {
    # 1.9 billion parameters, in layers as wide as in 7B models.
    "8 layers of Mistral-7B": dict(
        hidden_size=4096, num_hidden_layers=8, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=32000, tie_word_embeddings=False,
    ),
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
OPTIONS: dict[str, dict[str, Any]] = {"one line": {}, "packed": dict(compile=True, recompute_layers="auto")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lengths", type=Path)
    add("--sets", nargs="+", help="default: all")
    add("--parts", nargs="+", default=["dpo", "nothing", "grpo"])
    add("--shape", choices=SHAPES, default="8 layers of Mistral-7B")
    add("--pairs", type=int, default=32, help="pairs that are timed, at least one batch (%(default)s)")
    add("--batch-sizes", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    add("--flash", help="an installed FlashAttention, by transformers' name, such as flash_attention_4")
    add("--precompute", action="store_true", help="compute reference log-probs before training, in all modes")
    add("--seconds", type=float, default=math.inf, help="begin no set after so many seconds")
    add("--bins", type=int, default=6, help="packed batches an epoch, approximately (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a packed batch (%(default)s)")
    add("--lora", choices=("all-linear", "attention"), default="all-linear", help="layers that get adapters")
    add("--eager", action="store_true", help="packed: without compiled layers, as hybrids need it")
    add("--full", action="store_true", help="train all weights instead of LoRA, with a second model as the reference")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/trainers"))
    options = parser.parse_args()
    if options.eager:
        OPTIONS["packed"]["compile"] = False
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
            results[part] = {}
            measure(options, "stock", lengths[names[0]], options.batch_sizes[0])  # compiles kernels of TRL
            start = time.perf_counter()
            for name in names:
                if time.perf_counter() - start > options.seconds:
                    break
                results[part][name] = {mode: best(options, mode, name, lengths[name]) for mode in MODES}
                (options.output / "trainers.json").write_text(json.dumps(results, indent=1))
                (options.output / "table.md").write_text(conditions + "\n\n" + dpo_table(results[part], options))
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
        elif part == "padding-free":
            results[part] = {mode: padding_free(options, mode) for mode in MODES[:2]}
            stock, ours = (results[part][mode] for mode in MODES[:2])
            tables.append(
                "A padding-free row of {tokens:,} tokens, {shape[1]} answers of {shape[2]} to a prompt of {shape[0]}: "
                "log-probs with gradients, ms: {attention} {stock:.0f}, with flexpatch {ms:.0f} ({factor:.2f}×), mean "
                "log-prob {mean:.4f} (unpatched {stock_mean:.4f}).".format(
                    **ours, stock=stock["ms"], factor=stock["ms"] / ours["ms"], stock_mean=stock["mean"]
                )
            )
        else:
            profiles: dict[str, dict[str, float]] = {}
            for name, mode in itertools.product(names, ("stock", "packed")):
                profiler = Profiler()
                size = options.batch_sizes[0]
                record = measure(options, mode, lengths[name], size, mode == "packed", callbacks=[profiler])
                profiles[f"{name}, {mode}"] = profiler.classes
                (options.output / f"profile_{name}_{mode}.txt").write_text(profiler.table)
                print(name, mode, record, profiler.table, flush=True)
            results[part] = profiles
            lines = [f"| ms a step | {' | '.join(next(iter(profiles.values())))} |", "|---" * 8 + "|"]
            lines += [f"| {name} | {' | '.join(f'{ms:.0f}' for ms in of.values())} |" for name, of in profiles.items()]
            tables.append("\n".join(lines))
        (options.output / "trainers.json").write_text(json.dumps(results, indent=1))
        (options.output / "table.md").write_text("\n\n".join(tables))
        print(tables[-1], flush=True)


def make_model(options: argparse.Namespace, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    shape = {"model_type": "llama"} | SHAPES[options.shape]
    config = AutoConfig.for_model(**shape, max_position_embeddings=131072)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation=attention
        )
    model.config.use_cache = False
    return model


def pairs_of(lengths: list[list[int]], count: int, vocabulary: int) -> datasets.Dataset:
    """Draw ``count`` tokenised pairs with lengths from ``lengths``, with replacement."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(5, vocabulary) for _ in range(length)]

    drawn = rng.choices(lengths, k=count)
    columns = {
        name: [ids(triple[i]) for triple in drawn]
        for i, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))
    }
    # A fixed fingerprint, because hashing the contents takes seconds.
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint=f"random-{count}")


class Prepared:
    """Mixin for a trainer that takes tokenised rows as they are."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Stock(Prepared, trl.DPOTrainer):
    pass


class Packed(Prepared, PackedDPOTrainer):
    pass


class Clock(TrainerCallback):
    """Time each epoch, data included, and each step of the last epoch, in seconds."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.epochs: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps: list[float] = []
        self.epoch = self.last = self.now()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

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


def best(options: argparse.Namespace, mode: str, name: str, lengths: list[list[int]]) -> Any:
    """Find the fastest of a mode's settings, and list all that were tried."""
    tried: list[dict[str, Any]] = []

    def rate(size: int, recompute: bool, attention: str = "sdpa") -> float:
        try:
            record = measure(options, mode, lengths, size, recompute, attention)
        except torch.OutOfMemoryError:
            record = dict(pairs_per_s=0.0, batch_size=size, recompute=recompute, failed="out of memory")
        tried.append(record)
        print(name, mode, record, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return float(record["pairs_per_s"])

    def fastest() -> dict[str, Any]:
        return max(tried, key=lambda record: record["pairs_per_s"])

    if mode == "packed":
        rate(1, True)
    elif mode == "one line":  # larger batches gain more
        any(rate(size, again) for again in (False, True) for size in reversed(options.batch_sizes))
    else:
        largest = 0  # largest size that ran without checkpointing
        for recompute in (False, True):
            for size in options.batch_sizes:
                if size < largest:
                    continue
                found = rate(size, recompute)
                if found and not recompute:
                    largest = size
                if found < 0.9 * fastest()["pairs_per_s"]:
                    break
        if options.flash:
            rate(fastest()["batch_size"], fastest()["recompute"], options.flash)
    return fastest() | dict(tried=tried)


def measure(
    options: argparse.Namespace,
    mode: str,
    lengths: list[list[int]],
    batch_size: int,
    recompute: bool = True,
    attention: str = "sdpa",
    callbacks: list[TrainerCallback] | None = None,
) -> Any:
    model = make_model(options, attention)
    count, kind = max(options.pairs, batch_size), Stock
    arguments: dict[str, Any] = {}
    if mode != "stock":
        flexpatch.apply(model, **(OPTIONS[mode] if options.device == "cuda" else {}))
    if options.full:
        arguments["ref_model"] = make_model(options, attention)
        if mode != "stock":
            flexpatch.apply(arguments["ref_model"], compile=OPTIONS[mode].get("compile", False))
    else:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if options.lora == "attention" else options.lora
        arguments["peft_config"] = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets)
    if mode == "packed":
        count = max(count, round(options.bins * options.budget / statistics.mean(map(sum, lengths))))
        arguments["token_budget"], kind = options.budget, Packed
    clock = Clock(options.device == "cuda")
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    config = trl.DPOConfig(
        output_dir=str(options.output), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        max_length=None, num_train_epochs=2, per_device_train_batch_size=batch_size,
        gradient_checkpointing=recompute, train_sampling_strategy="sequential", bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        precompute_ref_log_probs=options.precompute,
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
    average = statistics.median if mode == "packed" else statistics.mean
    seconds, pairs_per_step = average(clock.steps), count / len(clock.steps)
    return dict(
        pairs_per_s=pairs_per_step / seconds,
        ms_per_step=1e3 * seconds,
        pairs_per_step=pairs_per_step,
        batch_size=batch_size,
        recompute=recompute,
        attention=attention,
        steps_ms=[round(1e3 * step) for step in clock.steps],
        first_epoch_extra_s=clock.epochs[0] - clock.epochs[-1],
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else None,
        token_factor=flexpatch.savings(model).factor if mode != "stock" else 1.0,
    )


def nothing_to_gain(options: argparse.Namespace) -> dict[str, float]:
    """Time the median step of batches without padding or shared tokens, the better of two runs each."""
    lengths = [[1, 449, 449]] if options.shape != "tiny" else [[1, 40, 40]]
    times = {mode: min(measure(options, mode, lengths, 8)["ms_per_step"] for _ in range(2)) for mode in MODES[:2]}
    return times | {"cost": times["one line"] / times["stock"] - 1}


def answers_to_a_prompt(
    options: argparse.Namespace, mode: str, attention: str, prompt: int = 4096, answers: int = 16, length: int = 256
) -> tuple[Any, torch.Tensor, list[int]]:
    """Make a checkpointed model, ids (answers, prompt + length) that share their prompt, and these three sizes."""
    if options.shape.startswith("tiny"):
        prompt, answers, length = 64, 4, 16
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


def dpo_table(results: dict[str, Any], options: argparse.Namespace) -> str:
    kind, reference = ("full fine-tuning", "a second model") if options.full else ("LoRA", "adapter off")
    reference = "computed before" if options.precompute else f"pass by {reference}"
    sizes = ", ".join(map(str, options.batch_sizes))
    flash = f", on sdpa or {options.flash}" if options.flash else ""
    lines = [
        "| lengths like | stock, pairs/s (batch, checkpointing) | one line, pairs/s | packed, pairs/s | one line "
        "| packed | tokens | peak GB: stock, one line, packed | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in results.items():
        speed = {mode: modes[mode]["pairs_per_s"] for mode in MODES}
        peak = ", ".join(f"{modes[m].get('peak_gb') or math.nan:.0f}" for m in MODES)
        cells = [name]
        for m in MODES[:2]:
            cells.append(f"{speed[m]:.1f} ({modes[m]['batch_size']}, {'on' if modes[m]['recompute'] else 'off'})")
        cells += [f"{speed['packed']:.1f}", *(f"**{speed[m] / speed['stock']:.2f}×**" for m in MODES[1:])]
        cells += [f"÷ {modes['one line'].get('token_factor', math.nan):.2f}", peak]
        cells.append(f"{modes['packed'].get('first_epoch_extra_s', math.nan):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\nDPOTrainer, {kind}, reference {reference}. Stock: the fastest of batches of {sizes} pairs, with and "
        f"without gradient checkpointing{flash}; one line: the largest that fits without; packed: {options.budget:,} "
        f'tokens a batch, compiled layers, recompute_layers="auto"; *tokens*: how many times fewer the folded batches '
        "of the one line hold."
    )
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
