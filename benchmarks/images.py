"""Times batches with images: stock TRL and its log-prob steps, against the same after one line of flexpatch.

    python benchmarks/images.py                                            # on a GPU; both parts, both shapes
    python benchmarks/images.py --shapes "Gemma 3 4B" --parts grpo
    python benchmarks/images.py --device cpu --shapes tiny "tiny, with blocks" --dtype float32 --pairs 4 \\
        --batch-sizes 1 2 --answers 12 --groups 4 --completions 16

Random weights; prompts of about 1,000 image tokens and a question. Parts:

dpo       LoRA DPOTrainer, reference = adapter off, answers of --answers tokens. Stock runs --batch-sizes upwards
          without gradient checkpointing until memory ends or a size is a tenth slower than the fastest; then with it,
          from the last size that ran without. The fastest counts. One line, flexpatch.apply(model), runs the largest
          size that fits without checkpointing. All count the second of two epochs over equal batches. *packed*
          (--modes) is PackedDPOTrainer with rows of --budget tokens.
grpo      Log-probs, forward and backward, of a prompt with --groups answers of --completions tokens. Stock takes the
          group at once, or in parts as large as memory allows, each with and without checkpointing; the fastest counts.

Towers with windows (Qwen2.5-VL's) call attention once for each window on sdpa; both sides run them on torch's varlen
kernel instead, as with FlashAttention 2 installed, unless --tower-attention sdpa.

Batches wait on the device, where they count as memory: neither loading nor processing of images is timed. *comparing*
is the time in which a batch's images are compared, for the policy and the reference, as a share of the one line's step.
Prints each run, and writes images.json and table.md to --output.
"""

import argparse
import gc
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from trainers import Clock, timed
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

import flexpatch
from flexpatch.images import held_by
from flexpatch.layouts import Drawn, multimodal_types
from flexpatch.media import images_of
from flexpatch.models import tiny_config
from flexpatch.pictures import call_with_images
from flexpatch.trl import PackedDPOTrainer

IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
# Type of the class, settings, and what a prompt shows: grids of patches, or how many square images.
SHAPES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "8 text layers of Qwen2.5-VL-7B, its whole tower": (
        "qwen2_5_vl",
        dict(
            text_config=dict(
                hidden_size=3584, num_hidden_layers=8, intermediate_size=18944, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064, max_position_embeddings=128000,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
            ),
            vision_config=dict(
                depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584,
                fullatt_block_indexes=[7, 15, 23, 31], window_size=112,
            ),
            tie_word_embeddings=False,
            **IDS,
        ),
        [(56, 72)],  # 784 x 1,008 pixels: 1,008 tokens
    ),
    "Gemma 3 4B": (
        "gemma3",
        dict(
            text_config=dict(
                hidden_size=2560, num_hidden_layers=34, intermediate_size=10240, num_attention_heads=8,
                num_key_value_heads=4, head_dim=256, sliding_window=1024, vocab_size=262208,
            ),
            vision_config=dict(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896,
                patch_size=14,
            ),
            mm_tokens_per_image=256,
        ),
        4,  # 1,024 tokens
    ),
    "tiny": ("qwen2_5_vl", {}, [(8, 12)]),
    "tiny, with blocks": ("gemma3", {}, 3),
}  # fmt: skip
MODES = ("stock", "one line")
QUESTION = 40  # tokens
DRAWN: dict[tuple[str, str, int], list[Drawn]] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    add("--parts", nargs="*", choices=("dpo", "grpo"), default=["dpo", "grpo"], help="none: tables of --merge alone")
    add("--merge", nargs="+", type=Path, default=[], help="images.json of earlier runs, whose rows the tables have too")
    add("--modes", nargs="+", choices=(*MODES, "packed"), default=list(MODES), help="of DPO, stock first (%(default)s)")
    add("--pairs", type=int, default=32, help="pairs that are timed, at least one batch (%(default)s)")
    add("--answers", type=int, default=100, help="tokens of an answer of DPO (%(default)s)")
    add("--batch-sizes", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    add("--groups", nargs="+", type=int, default=[8, 16], help="answers to a prompt of GRPO (%(default)s)")
    add("--completions", type=int, default=300, help="tokens of an answer of GRPO (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a packed batch (%(default)s)")
    add("--tower", choices=("lora", "frozen"), default="lora", help="what the vision tower trains (%(default)s)")
    add("--tower-attention", choices=("varlen", "sdpa"), default="varlen", help="on a GPU (%(default)s)")
    add("--repeats", type=int, default=5, help="steps of GRPO whose median counts (%(default)s)")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/images"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    conditions = (
        f"Random weights, {options.dtype}, LoRA on all linear layers, tower {options.tower} (its windows by "
        f"{options.tower_attention}), {device}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, peft {peft.__version__}"
        ". `python benchmarks/images.py`"
    )
    results: dict[str, Any] = dict(conditions=conditions, dpo={}, grpo={})
    for earlier in options.merge:
        found = json.loads(earlier.read_text())
        assert found["conditions"] == conditions or not options.parts, "runs under other conditions"
        results = {"conditions": found["conditions"]} | {part: results[part] | found[part] for part in ("dpo", "grpo")}
    for part, shape in itertools.product(options.parts, options.shapes):
        print(f"{shape}: {part}", flush=True)
        if part == "dpo":
            found = {mode: best_dpo(options, shape, mode) for mode in options.modes}
            keep(options, results, part, shape, found)
        for group in options.groups if part == "grpo" else ():
            found = {mode: best_grpo(options, shape, mode, group) for mode in MODES}
            keep(options, results, part, f"{shape}, {group} × {options.completions}", found)
    keep(options, results)
    print(tables(results, options))


def keep(
    options: argparse.Namespace, results: dict[str, Any], part: str = "", name: str = "", found: Any = None
) -> None:
    """Write all results so far, with those of one more row."""
    if part:
        results[part][name] = found
    (options.output / "images.json").write_text(json.dumps(results, indent=1))
    (options.output / "table.md").write_text(tables(results, options))


def make_model(options: argparse.Namespace, shape: str) -> Any:
    torch.manual_seed(0)
    kind, settings, _ = SHAPES[shape]
    config = AutoConfig.for_model(kind, **settings) if settings else tiny_config(kind)
    with torch.device(options.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, options.dtype))
    model.config.use_cache = False
    tower = model.config.vision_config
    if options.device == "cuda" and options.tower_attention == "varlen" and hasattr(tower, "fullatt_block_indexes"):
        AttentionInterface.register("flash_varlen", varlen)
        tower._attn_implementation = "flash_varlen"
    return model


def varlen(
    module: nn.Module, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, attention_mask: None, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within the windows of images, all in one call of torch's FlashAttention 2."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
    bounds = cu_seq_lens_q.to(torch.int32)
    out = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling)
    assert isinstance(out, Tensor)  # a tuple only if more was asked for
    return out[None], None


def lora_of(options: argparse.Namespace) -> peft.LoraConfig:
    """Put adapters on all linear layers, or on those of the text model alone."""
    tower = r".*(visual|vision|projector).*" if options.tower == "frozen" else None
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=tower)


class Batches:
    """Prompts with images and random answers, put together as TRL's collator does; on the device once made.

    Args:
        config: The configuration of the model.
        options, shape: As the command line has them.
    """

    def __init__(self, config: Any, options: argparse.Namespace, shape: str) -> None:
        self.config, self.options = config, options
        self.kind, _, self.shown = SHAPES[shape]
        self.record = multimodal_types()[self.kind]
        self.made: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def images(self, number: int) -> list[Drawn]:
        """Draw the images of a prompt, or take those of an earlier setting."""
        key = self.kind, str(self.shown), number
        if key not in DRAWN:
            DRAWN[key] = self.draw(number)
        return DRAWN[key]

    def draw(self, number: int) -> list[Drawn]:
        """Draw the images of a prompt."""
        generator = torch.Generator().manual_seed(number)
        if isinstance(self.shown, int):
            return [self.record.draw(self.config, 0, generator) for _ in range(self.shown)]
        drawn = []
        for h, w in self.shown:
            sample = self.record.draw(self.config, 0, generator)  # tells how wide a patch is, and what is around it
            image = self.config.image_token_id
            first, last = sample.tokens.index(image), len(sample.tokens) - sample.tokens[::-1].index(image)
            pixels = torch.randn(h * w, sample.tensors["pixel_values"].shape[1], generator=generator)
            tensors = dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, h, w]]))
            tokens = h * w // self.config.vision_config.spatial_merge_size**2
            drawn.append(Drawn(tensors, [*sample.tokens[:first], *[image] * tokens, *sample.tokens[last:]]))
        return drawn

    def text(self, rng: random.Random, length: int) -> list[int]:
        """Draw ids below those of marks."""
        return [rng.randrange(7, min(140, self.config.get_text_config().vocab_size)) for _ in range(length)]

    def call(self, numbers: list[int], answers: int, length: int, repeat: int = 1) -> dict[str, Tensor]:
        """Make the call of some prompts, each with its answers: all first answers, then all second ones.

        Args:
            numbers: Of the prompts.
            answers: Of each.
            length: Tokens of an answer.
            repeat: Make the answers of the ``repeat``-th draw.

        Returns:
            The arguments of the model, on the device.
        """
        sequences, images = [], []
        drawn = {number: self.images(number) for number in numbers}
        for k in range(answers):
            for number in numbers:
                question = self.text(random.Random(number), QUESTION)
                answer = self.text(random.Random(f"{number} {k} {repeat}"), length)
                sequences.append([*(t for image in drawn[number] for t in image.tokens), *question, *answer])
                images.append(drawn[number])
        lengths = [length] * len(sequences)
        call = call_with_images(self.record, self.config, sequences, images, lengths, dtype=torch.float32)
        del call["use_cache"]
        return {name: tensor.to(self.options.device) for name, tensor in call.items()}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate pairs, as a ``data_collator``."""
        numbers = [int(example["prompt"]) for example in examples]
        if tuple(numbers) not in self.made:
            batch = self.call(numbers, 2, self.options.answers)
            completion = torch.zeros_like(batch["attention_mask"])
            completion[:, -self.options.answers :] = 1  # all sequences are equally long
            self.made[tuple(numbers)] = batch | dict(completion_mask=completion)
        return dict(self.made[tuple(numbers)])


def processor() -> Any:
    """Make a processor, by which TRL knows a vision-language model; nothing is processed by it."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<image>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    return transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer, 14, "full")


def tried_until_memory_ends(run: Callable[..., dict[str, Any]], tried: list[dict[str, Any]], **setting: Any) -> float:
    """Run a setting and note what it gives. Returns pairs a second, or steps; 0 without enough memory."""
    try:
        record = run(**setting)
    except torch.OutOfMemoryError:
        record = dict(rate=0.0, failed="out of memory")
    except ValueError as error:  # FlexpatchError among them: a mode that takes no images
        record = dict(rate=0.0, failed=str(error)[:200])
    tried.append(setting | record)
    print(tried[-1], flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    return float(record["rate"])


def best_dpo(options: argparse.Namespace, shape: str, mode: str) -> dict[str, Any]:
    """Find the fastest of a mode's settings, and list all that were tried."""
    tried: list[dict[str, Any]] = []

    def rate(size: int, recompute: bool) -> float:
        setting = dict(mode=mode, batch_size=size, recompute=recompute)
        return tried_until_memory_ends(lambda **each: dpo(options, shape, **each), tried, **setting)

    if mode == "packed":
        any(rate(1, again) for again in (False, True))
    elif mode == "one line":  # larger batches gain more
        any(rate(size, again) for again in (False, True) for size in reversed(options.batch_sizes))
    else:
        largest = 0
        for recompute in (False, True):
            for size in [size for size in options.batch_sizes if size >= largest]:
                found = rate(size, recompute)
                largest = size if found and not recompute else largest
                if found < 0.9 * max(record["rate"] for record in tried):
                    break
    return max(tried, key=lambda record: record["rate"]) | dict(tried=tried)


def dpo(options: argparse.Namespace, shape: str, mode: str, batch_size: int, recompute: bool) -> dict[str, Any]:
    """Train two epochs, and time the second one."""
    model = make_model(options, shape)
    batches = Batches(model.config, options, shape)
    if mode != "stock":
        flexpatch.apply(model)
    count = -(-max(options.pairs, batch_size) // batch_size) * batch_size
    rows = [dict(prompt=str(n), chosen="", rejected="", images=[]) for n in range(count)]
    clock = Clock(options.device == "cuda")
    config = trl.DPOConfig(
        output_dir=str(options.output), report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        max_length=None, num_train_epochs=2, per_device_train_batch_size=batch_size, dataloader_pin_memory=False,
        gradient_checkpointing=recompute, train_sampling_strategy="sequential", bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
    )  # fmt: skip
    kind, budget = (PackedDPOTrainer, dict(token_budget=options.budget)) if mode == "packed" else (trl.DPOTrainer, {})
    trainer = kind(
        model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor(),
        data_collator=batches, callbacks=[clock], peft_config=lora_of(options), **budget,
    )  # fmt: skip
    trainer.train()
    seconds = sum(clock.steps)
    record = dict(rate=count / seconds, ms=1e3 * seconds / len(clock.steps), peak_gb=peak(options))
    if mode != "stock":
        savings = flexpatch.savings(model)
        record |= dict(
            tokens=savings.factor,
            images=savings.images / savings.images_run if savings.images_run else 1,
            says=str(savings),
        )
        record["comparing"] = 2 * comparing(batches, next(iter(batches.made.values()))) / (record["ms"] / 1e3)
    return record


def best_grpo(options: argparse.Namespace, shape: str, mode: str, group: int) -> dict[str, Any]:
    """Find the fastest way to take a group: whole or in parts, with and without checkpointing."""
    tried: list[dict[str, Any]] = []
    parts = [1] if mode == "one line" else [n for n in (1, 2, 4, 8, 16) if group % n == 0]
    for recompute in (False, True):
        for count in parts:
            setting = dict(mode=mode, group=group, parts=count, recompute=recompute)
            found = tried_until_memory_ends(lambda **each: grpo(options, shape, **each), tried, **setting)
            if found and found < 0.9 * max(record["rate"] for record in tried):
                break
        if mode == "one line" and tried[-1]["rate"]:
            break
    return max(tried, key=lambda record: record["rate"]) | dict(tried=tried)


def grpo(options: argparse.Namespace, shape: str, mode: str, group: int, parts: int, recompute: bool) -> dict[str, Any]:
    """Time log-probs of a group's answers and their gradients."""
    model = make_model(options, shape)
    batches = Batches(model.config, options, shape)
    if mode != "stock":
        flexpatch.apply(model)
    model = peft.get_peft_model(model, lora_of(options)).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    calls = [batches.call([0], group // parts, options.completions, repeat=part) for part in range(parts)]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for call in calls:
            kept = options.completions + 1
            logits = model(**call, logits_to_keep=kept, use_cache=False).logits[:, :-1]
            targets = call["input_ids"][:, -options.completions :]
            (nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / parts).backward()

    seconds = timed(step, options.device, options.repeats)
    record: dict[str, Any] = dict(rate=1 / seconds, ms=1e3 * seconds, peak_gb=peak(options))
    if mode != "stock":
        record |= dict(says=str(flexpatch.savings(model)), comparing=comparing(batches, calls[0]) / seconds)
    return record


def peak(options: argparse.Namespace) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else None


def comparing(batches: Batches, call: dict[str, Tensor]) -> float:
    """Time how long a call's images take to be compared: fingerprints, their copy to the host, equality, names."""
    ids, mask = call["input_ids"].cpu().numpy(), call["attention_mask"].cpu().numpy().astype(bool)
    record = batches.record
    types = call[record.types].cpu().numpy() if record.types in call else None

    def step() -> None:
        held = held_by(record, call)
        numbers = [each.flatten() for own in held for each in own.numbers()]
        host = torch.cat(numbers).cpu().numpy()
        split = np.split(host, np.cumsum([len(each) for each in numbers])[:-1])
        images_of(record, batches.config, held, iter(split), ids, mask, types)

    return timed(step, batches.options.device)


def tables(results: dict[str, Any], options: argparse.Namespace) -> str:
    parts = []
    if results["dpo"]:
        modes = [mode for mode in options.modes if mode != "stock"]
        heads = "".join(f" {mode}, pairs/s (batch, checkpointing) | speed-up |" for mode in modes)
        peaks = f" peak GB: {', '.join(['stock', *modes])} |"
        lines = [f"| DPO | stock, pairs/s (batch, checkpointing) |{heads} images run | comparing |{peaks}"]
        lines.append("|---" * (lines[0].count("|") - 1) + "|")
        for shape, found in results["dpo"].items():
            cells = [shape, rate_of(found["stock"])]
            for mode in modes:
                gain = found[mode]["rate"] / (found["stock"]["rate"] or float("nan"))
                cells += [rate_of(found[mode]), f"**{gain:.2f}×**"]
            ours = found.get("one line", found[modes[-1]])
            cells += [f"÷ {ours.get('images', 1):.2f}", f"{ours.get('comparing', 0):.2%}"]
            cells.append(", ".join(gb(found[mode]) for mode in ("stock", *modes)))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    if results["grpo"]:
        lines = ["| GRPO's step | stock, ms (parts, checkpointing) | one line, ms | speed-up | comparing "]
        lines[0] += "| peak GB: stock, one line |"
        lines.append("|---" * 6 + "|")
        for shape, found in results["grpo"].items():
            stock, ours = found["stock"], found["one line"]
            if not (stock["rate"] and ours["rate"]):
                lines.append(f"| {shape} | – | – | – | – | – |")
                continue
            setting = f"{stock['parts']}, {'on' if stock['recompute'] else 'off'}"
            cells = [shape, f"{stock['ms']:.0f} ({setting})", f"{ours['ms']:.0f}"]
            cells += [f"**{stock['ms'] / ours['ms']:.2f}×**", f"{ours['comparing']:.2%}", f"{gb(stock)}, {gb(ours)}"]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, results["conditions"]]) + "\n"


def rate_of(record: dict[str, Any]) -> str:
    if not record["rate"]:
        return "–"
    return f"{record['rate']:.2f} ({record['batch_size']}, {'on' if record['recompute'] else 'off'})"


def gb(record: dict[str, Any]) -> str:
    return "–" if record.get("peak_gb") is None else f"{record['peak_gb']:.0f}"


if __name__ == "__main__":
    main()
