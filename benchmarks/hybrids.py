"""Times hybrids on shared rows against packed pairs: the same model, kernels and loss, without and with shared prompts.

    python benchmarks/hybrids.py                        # on a GPU; writes hybrids.json and table.md
    python benchmarks/hybrids.py --sets gsm8k_4shot hh --mixers unshared branched
    python benchmarks/hybrids.py --device cpu --shape tiny --budget 2048 --dtype float32 --sets hh --grpo 99 4 16

Ids are random. A step is that of DPO with LoRA on all linear layers: log-probs of the answers with the adapters off,
then on, and the backward pass. With --full all weights get gradients, and the reference is a second model; no optimizer
runs in either. *Shared* packs trees into one row of --budget tokens, *pairs* packs each answer with its own copy of the
prompt into as many such rows. GRPO's shape is a prompt of 4,096 tokens with 16 answers of 256. Times are medians after
two warm steps. *kept* is the speed-up over the token ratio: 1 if shared tokens cost nothing at all.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lengths import add_lengths
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch.packing import pack
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree

THREE_OF_FOUR = (["linear_attention"] * 3 + ["full_attention"]) * 2
SHAPES: dict[str, dict[str, Any]] = {
    "8 layers of Qwen3.5-9B": dict(model_type="qwen3_5_text", num_hidden_layers=8, layer_types=THREE_OF_FOUR),
    "8 layers of Nemotron-H-8B": dict(
        model_type="nemotron_h", layers_block_type=["linear_attention", "mlp"] * 3 + ["full_attention", "mlp"],
        num_hidden_layers=8, hidden_size=4096, intermediate_size=21504, mamba_num_heads=128, mamba_head_dim=64,
    ),
    "4 layers like DeepSeek V3.2": dict(
        model_type="deepseek_v32", num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=32, vocab_size=32000,
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=32, index_n_heads=16,
    ),
    "tiny": dict(
        model_type="qwen3_5_text", num_hidden_layers=4, layer_types=THREE_OF_FOUR[:4], hidden_size=64,
        intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=512,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--sets", nargs="*", help="default: all")
    add("--shape", choices=SHAPES, default="8 layers of Qwen3.5-9B")
    add("--mixers", nargs="+", default=["unshared", "branched"], help="ways of flexpatch.apply (%(default)s)")
    add("--budget", type=int, default=16384, help="tokens of a row (%(default)s)")
    add("--grpo", type=int, nargs="*", default=[4096, 16, 256], help="prompt, answers, tokens of each; none: skipped")
    add("--steps", type=int, default=5, help="that are timed (%(default)s)")
    add("--full", action="store_true", help="train all weights instead of LoRA")
    add("--recompute", action="store_true", help="gradient checkpointing")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/hybrids"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    model, reference = make_models(options)
    training = (
        "all weights, a second model as the reference"
        if options.full
        else "LoRA on all linear layers, reference by adapters off"
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    conditions = (
        f"{options.shape} shape, random weights, {options.dtype}, {device}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; {training}, rows of "
        f"{options.budget:,} tokens, gradient checkpointing {'on' if options.recompute else 'off'}"
    )
    names = lengths if options.sets is None else options.sets
    batches = {name: draw(lengths[name], options) for name in names}
    if options.grpo:
        prompt, answers, length = options.grpo
        rng = random.Random(0)
        batches["GRPO's shape"] = [tree_of(rng, options, prompt, [length] * answers)]
    records: list[dict[str, Any]] = []
    for name, trees in batches.items():
        record: dict[str, Any] = dict(name=name, trees=len(trees))
        pairs = bins([Tree.of(tree.ids, answer.ids) for tree in trees for answer in tree.children], options.budget)
        shared = bins(trees, options.budget)
        record["tokens"] = sum(r.tokens for r in pairs) / sum(r.tokens for r in shared)
        for mixers in options.mixers:
            try:
                for each in {id(model): model, id(reference): reference}.values():
                    flexpatch.apply(each, mixers=mixers)
                for kind, rows in (("pairs", pairs), ("shared", shared)):
                    record[f"{mixers} {kind}"] = timed(step_of(model, reference, rows), options)
            except (flexpatch.FlexpatchError, torch.OutOfMemoryError) as error:
                record[f"{mixers} failed"] = str(error)[:200]
        print(record, flush=True)
        records.append(record)
        (options.output / "hybrids.json").write_text(json.dumps([conditions, records], indent=1))
    table = table_of(records, options.mixers) + "\n" + conditions + ". `python benchmarks/hybrids.py`\n"
    (options.output / "table.md").write_text(table)
    print(table)


def make_models(options: argparse.Namespace) -> tuple[Any, Any]:
    """Make the model that trains and the reference, the same one with adapters that can be switched off."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[options.shape])
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.config.use_cache = False
    reference = copy.deepcopy(model).requires_grad_(False) if options.full else None
    if not options.full:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets_of(model)))
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return model, model if reference is None else reference


def targets_of(model: Any) -> str | list[str]:
    """Name the layers that get adapters: all linear ones but those that peft refuses in Mamba models."""
    if "nemotron_h" not in model.config.model_type:
        return "all-linear"
    linears = {name.rsplit(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(linears - {"out_proj", "lm_head"})


def tree_of(rng: random.Random, options: argparse.Namespace, prompt: int, answers: Sequence[int]) -> Tree:
    """Draw a prompt and its answers."""
    top = SHAPES[options.shape].get("vocab_size", 32000)

    def ids(length: int) -> list[int]:
        return [rng.randrange(5, top) for _ in range(length)]

    return Tree.of(ids(prompt), *(ids(length) for length in answers))


def draw(lengths: Sequence[Sequence[int]], options: argparse.Namespace) -> list[Tree]:
    """Draw pairs with lengths from ``lengths`` that fill a row."""
    rng, trees, tokens = random.Random(0), [], 0
    while True:
        prompt, *answers = rng.choice(lengths)
        tokens += prompt + sum(answers)
        if tokens > options.budget:
            return trees
        trees.append(tree_of(rng, options, prompt, answers))


def bins(trees: Sequence[Tree], budget: int) -> list[Rows]:
    """Pack trees into rows of at most ``budget`` tokens, one row a bin."""
    sizes = [len(tree.ids) + sum(len(child.ids) for child in tree.children) for tree in trees]
    packed = pack(sizes, max(budget, *sizes))
    return [build_rows([[trees[i] for i in each]]) for each in packed]


def step_of(model: Any, reference: Any, rows: Sequence[Rows]) -> Callable[[], None]:
    """Make the step of DPO: log-probs of the reference and of the model, and gradients."""
    without = model.disable_adapter if reference is model else nullcontext
    here = [each.to(model.device) for each in rows]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for each in here:
            with torch.no_grad(), without():
                before = flexpatch.answer_logprobs(reference, each).answers
            rewards = flexpatch.answer_logprobs(model, each).answers - before
            (-torch.nn.functional.logsigmoid(rewards)).sum().backward()

    return step


def timed(step: Callable[[], None], options: argparse.Namespace) -> float:
    """Time a step in seconds: the median, after two warm ones."""
    times = []
    for _ in tqdm(range(options.steps + 2), leave=False):
        begin = time.perf_counter()
        step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def table_of(records: Sequence[dict[str, Any]], mixers: Sequence[str]) -> str:
    heads = [f"{way}: pairs, shared, ms | speed-up | kept" for way in mixers]
    lines = [f"| lengths like | token ratio | {' | '.join(heads)} |", "|---|---|" + "---|---|---|" * len(mixers)]
    for record in records:
        cells = [record["name"], f"{record['tokens']:.2f}"]
        for way in mixers:
            pairs, shared = (record.get(f"{way} {kind}") for kind in ("pairs", "shared"))
            if pairs is None or shared is None:
                cells += ["–", "–", "–"]
                continue
            gain = pairs / shared
            cells += [f"{1e3 * pairs:.0f}, {1e3 * shared:.0f}", f"**{gain:.2f}×**", f"{gain / record['tokens']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
