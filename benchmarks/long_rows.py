"""Checks rows of 32k and 64k tokens on one GPU with a 7B model, and measures their speed and memory.

    python benchmarks/long_rows.py
    python benchmarks/long_rows.py --rows 131072 --checks --sets --settings shared --compile --gb 80 \\
        --once --offload
    python benchmarks/long_rows.py --tiny           # on a CPU, small

A step is forward and backward of LoRA DPO (rank 16 in all linear layers, a reference pass with it off, random weights,
gradient checkpointing), without optimizer, over one row of shared tokens: one long document (a prompt of three quarters
of the row and two answers of an eighth), or pairs with lengths of real sets. *Stock* computes the same pairs
unpatched, right-padded, on sdpa, with the same checkpointing, in micro-batches of at most --tokens padded tokens, or of
one pair if it has more; its logits are of answers alone. *Triton* is backend="flex", where auto takes FlashAttention-4.
*Auto* is recompute_layers="auto" after two optimizer steps and what it measures after them, *triton auto* the same on
backend="flex". Every step is run twice, and the second run counts. With --gb torch may take no more memory than a card
of that size has; with --once a step is run once, to see whether it fits, and its time is not shown; with --offload
TRL's activation_offloading moves what backward needs to the host.

Checks come first, for every length of --checks (of --rows, unless given), with layers of the same width. The block mask
must be the rule in int64 for every pair of tokens. Log-probs and gradients of the long document may be at most twice as
far from a float32 truth as the stock model's, and must be farther with the mask or positions broken on purpose. Exit
code 1 if a check fails.

The most important measurements come first, and none is begun after --seconds. Prints results as they come; writes
long_rows.json and table.md to --output.
"""

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lengths import add_lengths
from torch import Tensor
from torch.nn import functional as F
from train import (
    OUT_OF_MEMORY,
    SHAPES,
    Batch,
    Job,
    draw_pairs,
    free_memory,
    log_probs,
    make_batches,
    make_job,
    matmul_rate,
    prepare,
    timed,
    train_step,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from trl.models.activation_offloading import get_act_offloading_ctx_manager

import flexpatch
from flexpatch.masks import BLOCK, block_mask
from flexpatch.rows import Rows, build_rows
from flexpatch.selective import way_of
from flexpatch.tree import Tree
from flexpatch.verification import FACTOR

DOCUMENT = "one document"
WIDE = "causal_float32"
CONTEXT_GB = 1.0  # of a card's memory that is not torch's
Pair = list[list[int]]


@dataclass(frozen=True)
class Case:
    """Draw pairs whose shared tokens fill a row of ``size`` tokens."""

    size: int
    name: str
    pairs: list[Pair]
    rows: Rows


def main() -> int:
    options = read_options()
    torch._dynamo.config.recompile_limit = 64
    conditions = describe(options)
    rate = matmul_rate(options.device, getattr(torch, options.dtype))
    results: dict[str, Any] = {"conditions": conditions, "matmul_tflops": rate, "checks": [], "steps": []}
    print(f"{conditions}; matrix product {rate:.1f} TFLOP/s", flush=True)
    cases = make_cases(options)
    AttentionInterface.register(WIDE, attend_wide)
    AttentionMaskInterface.register(WIDE, lambda *args, **kwargs: None)
    small = make_job(options.check_shape, "lora", "none", options) if options.checks else None
    for size in options.checks:
        assert small is not None
        try:
            results["checks"].append(check(small, cases[size, DOCUMENT], options))
        except torch.OutOfMemoryError:
            results["checks"].append(dict(size=size, shape=small.shape, error=OUT_OF_MEMORY, wrong=True))
            print(json.dumps(results["checks"][-1]), flush=True)
        free_memory()
        save(results, options)
    del small
    free_memory()
    job = make_job(options.shape, "lora", "none", options)
    for case, setting in plan(cases, options):
        if time.perf_counter() > options.deadline:
            print("out of time", flush=True)
            break
        results["steps"].append(measure(job, case, setting, options))
        save(results, options)
    print("\n" + table(results), flush=True)
    return int(any(found["wrong"] for found in results["checks"]))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--check-shape", choices=SHAPES, default="2 layers of Mistral-7B", help="model of the checks (%(default)s)")
    add("--rows", type=int, nargs="+", default=[32768, 65536], help="tokens of a row (%(default)s)")
    add("--sets", nargs="*", default=["capybara", "gsm8k_4shot"])
    settings = ("shared", "triton", "auto", "triton auto", "stock")
    add("--settings", nargs="+", choices=settings, default=list(settings))
    add("--checks", type=int, nargs="*", help="tokens of rows that are checked (all of --rows)")
    add("--gb", type=float, help="memory of a smaller card, which must suffice")
    add("--offload", action="store_true", help="move what backward needs to the host, as activation_offloading does")
    add("--once", action="store_true", help="run each step once, for its memory alone")
    add("--backend", default="auto", help="backend of shared rows, for flexpatch.apply (%(default)s)")
    add("--compile", action="store_true", help="compile the layers of shared rows")
    add("--tokens", type=int, default=16384, help="padded tokens of a stock micro-batch, at most (%(default)s)")
    add("--seconds", type=float, default=240, help="begin no measurement after so many seconds (%(default)s)")
    add("--tiny", action="store_true", help="run small models, on a CPU in seconds")
    add("--output", type=Path, default=Path("runs/long_rows"))
    options = parser.parse_args()
    vars(options).update(device="cuda", dtype="bfloat16", checkpointing="all", liger=False)
    if options.tiny:
        vars(options).update(device="cpu", shape="tiny", check_shape="tiny", rows=[1024, 2048], tokens=1024)
    options.checks = options.rows if options.checks is None or (options.tiny and options.checks) else options.checks
    if options.gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (options.gb - CONTEXT_GB) * 2**30 / total))
    options.deadline = time.perf_counter() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def describe(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    compiled = ", compiled layers" * options.compile + ", activation_offloading" * options.offload
    return (
        f"{options.shape}, LoRA, random weights, {options.dtype}, backend {options.backend}{compiled}; {device}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    )


def make_cases(options: argparse.Namespace) -> dict[tuple[int, str], Case]:
    lengths = json.loads(options.lengths.read_text())
    cases = {}
    for size in options.rows:
        document = [[size - 2 * (size // 8), size // 8, size // 8]]
        for name in (DOCUMENT, *options.sets):
            triples = document if name == DOCUMENT else lengths[name]
            pairs = draw_pairs(triples, size, SHAPES[options.shape][1]["vocab_size"])
            cases[size, name] = Case(size, name, pairs, build_rows([[Tree.of(*pair) for pair in pairs]]))
    return cases


def plan(cases: dict[tuple[int, str], Case], options: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    """List the measurements, the most important first."""
    document = [case for case in cases.values() if case.name == DOCUMENT]
    others = [case for case in cases.values() if case.name != DOCUMENT]
    short = [case for case in others if case.size == options.rows[0]]
    ordered = [(case, setting) for setting in ("shared", "triton") for case in document]
    ordered += [(case, "stock") for case in document]
    ordered += [(case, "shared") for case in others] + [(case, "stock") for case in short]
    ordered += [(case, setting) for setting in ("auto", "triton auto") for case in document]
    ordered += [(case, "auto") for case in others]
    ordered += [(case, "stock") for case in others if case not in short]
    return ((case, setting) for case, setting in ordered if setting in options.settings and may_run(setting, options))


def may_run(setting: str, options: argparse.Namespace) -> bool:
    return setting in ("shared", "stock") or options.device == "cuda"  # "auto" measures a GPU's memory


# --- speed and memory -------------------------------------------------------------------------------------------------


def measure(job: Job, case: Case, setting: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step. Returns a record of it, or of its lack of memory."""
    backend = "flex" if setting.startswith("triton") else options.backend
    prepare(job, "padded pairs" if setting == "stock" else "shared packed", options.compile, backend)
    record: dict[str, Any] = dict(
        size=case.size, case=case.name, setting=setting, pairs=len(case.pairs), tokens=case.rows.tokens,
        separate_tokens=case.rows.separate_tokens,
    )  # fmt: skip
    try:
        batches = make_batches(job, "padded pairs" if setting == "stock" else "shared packed", case.pairs, options)
        step = partial(train_step, job, batches)
        if options.offload:
            step = partial(offloaded, get_act_offloading_ctx_manager(job.wrapped), step)
        if setting.endswith("auto"):
            flexpatch.apply(job.causal, backend=backend, compile=options.compile, recompute_layers="auto")
            first_steps(job, step)
        record |= time_step(job, step, options) | {
            "tokens_computed": sum(rows.input_ids.numel() for rows, _ in batches)
        }
        if not options.once:
            record["useful_tflops"] = useful_flops(job, case.rows) / record["seconds"] / 1e12
    except torch.OutOfMemoryError:
        record["error"] = OUT_OF_MEMORY
    job.causal.zero_grad(set_to_none=True)
    free_memory()
    print(json.dumps(record), flush=True)
    return record


def offloaded(context: Any, step: Any) -> Any:
    """Run a step as TRL's trainers do with ``activation_offloading``."""
    with context:
        return step()


def first_steps(job: Job, step: Any) -> None:
    """Run steps of training, with an optimizer, until recompute_layers="auto" has measured all it asks for."""
    trained = [parameter for parameter in job.causal.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    for _ in range(2):
        step()
        optimizer.step()
    step()


def time_step(job: Job, step: Any, options: argparse.Namespace) -> dict[str, Any]:
    layers, seen = job.causal.model.layers, []
    counting = layers[0].register_forward_pre_hook(lambda *_: seen.append(Counter(map(way_of, layers))))
    times: list[float] = []
    try:
        for _ in range(1 if options.once else 2):
            seen.clear()
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times += timed(step, options.device, 1)[0]
    finally:
        counting.remove()
    cuda = options.device == "cuda"
    peak, reserved = (
        of() / 1e9 if cuda else None for of in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    kept = min(seen, key=lambda counts: counts["nothing"])  # the reference's forward keeps nothing
    seconds = None if options.once else times[-1]
    return dict(seconds=seconds, first=times[0], peak_gb=peak, reserved_gb=reserved, layers_keep=kept)


def useful_flops(job: Job, rows: Rows) -> float:
    """FLOPs of the products that the shared row needs: forward twice (policy, reference), backward by activations once.

    Attention counts visible pairs alone, the output layer answer tokens alone. Recomputation does not count.
    """
    config = job.causal.config
    index = torch.arange(rows.input_ids.shape[1])
    visible = int((rows.ends - index).sum())
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * visible
    head = config.hidden_size * config.vocab_size * len(rows.targets)
    # Attention has two products of visible pairs forward, and four backward.
    return 6.0 * (job.layer_parameters * rows.tokens + head) + (2 * 4.0 + 8.0) * attention


# --- checks -----------------------------------------------------------------------------------------------------------


def check(job: Job, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Check the mask, log-probs and gradients of long rows, and that the checks catch broken rows."""
    start = time.perf_counter()
    mask_errors = check_mask(case.rows.to(options.device))
    (pair,) = case.pairs
    alone = [[pair[0], answer] for answer in pair[1:]]  # one sequence a call: two in float32 might not fit
    one = argparse.Namespace(**vars(options) | {"tokens": 1})
    prepare(job, "padded pairs", False, options.backend)
    stock = probe(job, make_batches(job, "padded pairs", alone, one))
    wide = copy.deepcopy(job.wrapped).float()
    wide.get_base_model().set_attn_implementation(WIDE)
    truth = replace(job, causal=wide.get_base_model(), wrapped=wide)
    true = probe(truth, make_batches(truth, "padded pairs", alone, one))
    del wide, truth
    free_memory()
    prepare(job, "shared packed", options.compile, options.backend)
    batches = make_batches(job, "shared packed", case.pairs, options)
    shared = probe(job, batches)
    found: dict[str, Any] = dict(size=case.size, shape=job.shape, mask_errors=mask_errors)
    found |= dict(logprobs=log_prob_errors(stock, shared, true), gradients=gradient_errors(stock, shared, true))
    found["controls"] = {name: mean_error(probe(job, [batch], False), true) for name, batch in breakages(batches[0])}
    bounds = {name: FACTOR * found[name]["stock"] for name in ("logprobs", "gradients")}
    right = all(found[name]["shared"] <= bound for name, bound in bounds.items()) and mask_errors == 0
    right &= all(error > bounds["logprobs"] for error in found["controls"].values())
    found |= dict(bounds=bounds, wrong=not right, seconds=time.perf_counter() - start)
    job.causal.zero_grad(set_to_none=True)
    free_memory()
    print(json.dumps(found), flush=True)
    return found


def attend_wide(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **others: Any
) -> tuple[Tensor, None]:
    """Causal attention of one sequence in float32. sdpa would make L x L scores of shared keys, so keys repeat."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


Probe = tuple[Tensor, Tensor]  # log-probs, gradients; in float64 on the CPU


def probe(job: Job, batches: list[Batch], gradients: bool = True) -> Probe:
    """Compute log-probs of all scored tokens, and gradients of chosen - rejected.

    The loss is linear, so that no saturated sigmoid hides or magnifies a difference.
    """
    job.causal.zero_grad(set_to_none=True)
    tokens, answers = [], 0
    for batch in batches:
        batch[0].masks.clear()
        with torch.set_grad_enabled(gradients):
            found = log_probs(job.causal, *batch)
        if gradients:
            signs = torch.tensor([(-1.0) ** (answers + i) for i in range(len(found.answers))])
            (found.answers * signs.to(found.answers)).sum().backward()
        answers += len(found.answers)
        tokens.append(found.tokens.detach().double().cpu())
    trained = [p.grad.double().cpu().flatten() for p in job.causal.parameters() if p.grad is not None]
    return torch.cat(tokens), torch.cat(trained) if trained else torch.empty(0)


def mean_error(found: Probe, true: Probe) -> float:
    """Largest difference of log-probs, in nats."""
    return (found[0] - true[0]).abs().mean().item()


def log_prob_errors(stock: Probe, shared: Probe, true: Probe) -> dict[str, float]:
    return {"stock": mean_error(stock, true), "shared": mean_error(shared, true)}


def gradient_errors(stock: Probe, shared: Probe, true: Probe) -> dict[str, float]:
    """Norms of the differences, divided by norms of the truth."""
    errors = {"stock": stock[1] - true[1], "shared": shared[1] - true[1]}
    return {name: (error.norm() / true[1].norm()).item() for name, error in errors.items()}


def breakages(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Yield rows with one mistake each."""
    rows, call = batch
    length = rows.input_ids.shape[1]
    yield "answers see each other", (replace(rows, ends=torch.full_like(rows.ends, length), masks={}), call)
    packed = torch.arange(length, device=rows.ends.device)[None]
    yield "packed indices as positions", (replace(rows, position_ids=packed, depth=length, masks={}), call)


def check_mask(rows: Rows) -> int:
    """Count the pairs of tokens and blocks that differ from the rule, computed in int64 for every pair."""
    mask = block_mask(rows.ends, rows.position_ids, None)
    padded, device = mask.seq_lengths[0], rows.ends.device
    ends = torch.arange(1, padded + 1, device=device)
    ends[: rows.ends.shape[1]] = rows.ends[0]
    keys, zero = torch.arange(padded, device=device), torch.zeros((), dtype=torch.int32, device=device)
    partial_blocks = chosen(mask.kv_num_blocks, mask.kv_indices)
    full_blocks = chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    errors = (chosen(mask.q_num_blocks, mask.q_indices) != partial_blocks.T).sum()
    errors += (chosen(mask.full_q_num_blocks, mask.full_q_indices) != full_blocks.T).sum()
    for i, queries in enumerate(keys.split(BLOCK)):
        visible = (keys <= queries[:, None]) & (queries[:, None] < ends)
        errors += (mask.mask_mod(zero, zero, queries[:, None].int(), keys.int()) != visible).sum()
        blocks = visible.view(BLOCK, -1, BLOCK)
        some, every = blocks.any(2).any(0), blocks.all(2).all(0)
        errors += (full_blocks[i] != every).sum() + (partial_blocks[i] != (some & ~every)).sum()
    return int(errors)


def chosen(counts: Any, indices: Any) -> Tensor:
    """Convert a block mask's table to (N, N) bool, ``True`` for blocks that it lists."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[0, 0, :, None]
    return torch.zeros_like(listed).scatter_(1, indices[0, 0].long(), listed)


# --- report -----------------------------------------------------------------------------------------------------------


def save(results: dict[str, Any], options: argparse.Namespace) -> None:
    (options.output / "long_rows.json").write_text(json.dumps(results, indent=1))
    (options.output / "table.md").write_text(table(results))


NAMES = {
    "stock": "stock",
    "shared": "flexpatch",
    "triton": 'backend="flex"',
    "auto": 'recompute_layers="auto"',
    "triton auto": 'backend="flex", recompute_layers="auto"',
}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| row | pairs like | tokens ÷ | | s a step | speed-up | tokens/s | useful TFLOP/s (of a matrix product's) "
        "| peak GB | layers that keep everything, products, attention |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(step["size"], step["case"], step["setting"]): step for step in results["steps"]}
    for size, case in dict.fromkeys((step["size"], step["case"]) for step in results["steps"]):
        stock = found.get((size, case, "stock"), {})
        for step in (found[key] for name in NAMES if (key := (size, case, name)) in found):
            cells = [f"{step['tokens']:,}", f"{case} ({step['pairs']})"]
            cells += [f"{step['separate_tokens'] / step['tokens']:.2f}", NAMES[step["setting"]]]
            cells += numbers(step, stock, results["matmul_tflops"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *map(sentence, results["checks"]), "", results["conditions"] + CAPTION])


CAPTION = (
    "; *tokens ÷*: separate over shared tokens; stock: the same pairs unpatched on sdpa, padded, in micro-batches, the "
    "same gradient checkpointing. `python benchmarks/long_rows.py`"
)


def numbers(step: dict[str, Any], stock: dict[str, Any], rate: float) -> list[str]:
    if "seconds" not in step:
        return [step["error"], *["–"] * 5]
    ours = step is not stock and bool(stock.get("seconds"))
    kept = [str(step["layers_keep"].get(way, 0)) for way in ("everything", "products", "attention")]
    choice = ", ".join(kept) if step["setting"].endswith("auto") else "–"
    if step["seconds"] is None:
        return [*["–"] * 4, gigabytes(step), choice]
    return [
        f"{step['seconds']:.1f}",
        f"**{stock['seconds'] / step['seconds']:.2f}×**" if ours else "–",
        f"{step['tokens'] / step['seconds']:,.0f}",
        f"{step['useful_tflops']:.3g} ({step['useful_tflops'] / rate:.0%})",
        gigabytes(step),
        choice,
    ]


def gigabytes(record: dict[str, Any]) -> str:
    return "–" if record["peak_gb"] is None else f"{record['peak_gb']:.1f}"


def sentence(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{found['size']:,} tokens could not be checked: {found['error']}."
    logprobs, gradients = found["logprobs"], found["gradients"]
    controls = min(found["controls"].values()) / found["bounds"]["logprobs"]
    return (
        f"{found['size']:,} tokens, one document, {found['shape']}, against float32: log-probs off by "
        f"{logprobs['shared']:.1e} nats on average (stock: {logprobs['stock']:.1e}), gradients by "
        f"{gradients['shared']:.1e} (stock: {gradients['stock']:.1e}), at most twice stock's allowed"
        f"{': WRONG' if found['wrong'] else ''}; with mask or positions broken over {controls:.0f} × the bound; "
        f"{found['mask_errors']} of the mask's pairs and blocks wrong."
    )


if __name__ == "__main__":
    sys.exit(main())
