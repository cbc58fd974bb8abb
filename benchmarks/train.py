"""Times whole training steps of 7-8B models on one GPU, with sharing and packing and without.

    python benchmarks/train.py                                # Mistral-7B, on 80 GB
    python benchmarks/train.py --shapes Llama-3-8B --modes lora --sets hh tldr --compile --profile
    python benchmarks/train.py --device cpu --shapes tiny --dtype float32 --shared-tokens 2048

Ids and weights are random. A step is forward and backward of DPO, without optimizer, on the same pairs in every layout.
Modes: full (gradients of all weights, reference log-probs given), lora (rank 16 in all linear layers, a reference pass
with it off). Layouts:

padded pairs    Right-padded micro-batches through the unpatched model on sdpa, as in stock trainers, each of as many
                pairs as --tokens padded tokens allow. Logits are computed only of tokens that predict an answer.
packed pairs    Every prompt with its answer as a separate sequence, all in one row, without sharing or padding, on the
                fastest attention for such rows (--paired-kernel; auto: FlashAttention-4 if it works here, torch's
                varlen, FlexAttention; on a CPU a dense mask). Speed-ups are over this layout.
shared padded   One tree a row, several rows in a call, micro-batches as above: prefix sharing without packing.
shared packed   All trees in one row.
padded pairs, flex; packed pairs, flex    The first two on FlexAttention, as what sharing alone gains is over these.

--compile compiles the decoder layers of the two packed layouts (the others have too many shapes), and fills rows of
packed pairs up to a multiple of 2,048 tokens. Exit code 1 if layouts differ in losses or log-probs beyond rounding.
Prints tables; writes train.json, table.md and train.png to --output after every set.
"""

import argparse
import copy
import gc
import importlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature, unwrap
from itertools import accumulate
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lengths import add_lengths
from torch import Tensor, nn
from torch.autograd import DeviceType
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

import flexpatch
from flexpatch.logprobs import AnswerLogprobs, sum_answers, token_logprobs
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree, lay_out
from flexpatch.verification import FACTOR

WIDE = dict(
    hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=False, max_position_embeddings=131072,
)  # fmt: skip
MISTRAL = WIDE | dict(vocab_size=32000, sliding_window=None)
LLAMA = WIDE | dict(vocab_size=128256, rope_parameters=dict(rope_type="default", rope_theta=500000.0))
TINY = MISTRAL | dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, vocab_size=512)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral-7B": ("mistral", MISTRAL),
    "Llama-3-8B": ("llama", LLAMA),
    "8 layers of Mistral-7B": ("mistral", MISTRAL | dict(num_hidden_layers=8)),
    "2 layers of Mistral-7B": ("mistral", MISTRAL | dict(num_hidden_layers=2)),
    "tiny": ("mistral", TINY | dict(num_key_value_heads=2, head_dim=16)),
}
LAYOUTS = ("padded pairs", "packed pairs", "shared padded", "shared packed")
FLEX = ("padded pairs, flex", "packed pairs, flex")
FILL = 2048
OUT_OF_MEMORY = "out of memory"
# Classes of kernels by words in their lower-cased names; the first match counts.
KERNELS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matmul", ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk", "triton_tem", "triton_mm")),
    ("elementwise, norm, rope", ("triton", "norm", "rope", "swiglu")),
    ("copies, memory", ("memcpy", "memset", "copy", "fill", "catarray", "index", "gather", "scatter", "embedding")),
    ("elementwise, norm, rope", ("at::native", "elementwise")),
    ("other", ("",)),
)
CLASSES = tuple(dict.fromkeys(kind for kind, _ in KERNELS))
Batch = tuple[Rows, dict[str, Any] | None]  # arguments of the backbone; None: flexpatch.answer_logprobs makes them


@dataclass
class Job:
    """Measure one shape in one mode."""

    shape: str
    mode: str
    kernel: str  # of packed pairs
    causal: Any  # the model of transformers
    wrapped: Any  # peft's wrapper of it, or the same
    layer_parameters: int
    padded_attention: str = "sdpa"  # of padded pairs
    micro_pairs: int | None = None  # pairs of a padded micro-batch; None: as many as --tokens allow


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lengths(parser)
    add("--shapes", nargs="+", choices=SHAPES, default=["Mistral-7B"])
    add("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    add("--sets", nargs="*", help="default: all")
    add("--layouts", nargs="+", choices=(*LAYOUTS, *FLEX), default=LAYOUTS)
    add("--tokens", type=int, default=16384, help="padded tokens of a micro-batch, at most (%(default)s)")
    add("--micro-pairs", type=int, help="pairs of a padded micro-batch, instead of --tokens")
    add("--padded-attention", default="sdpa", help="attention of padded pairs, by transformers' name (%(default)s)")
    add("--shared-tokens", type=int, default=8192, help="tokens of the shared row, at most (%(default)s)")
    add(
        "--fixed",
        nargs="+",
        default=[],
        metavar="P:C",
        help="further sets of pairs of one size: tokens of a prompt, of each answer",
    )
    add("--backend", default="auto", help="backend of shared rows, for flexpatch.apply (%(default)s)")
    add("--paired-kernel", choices=("auto", "fa4", "varlen", "flex", "sdpa"), default="auto")
    add("--checkpointing", default="all", help="decoder layers that are recomputed in backward: all, none or a number")
    add("--compile", action="store_true")
    add("--liger", action="store_true", help="Liger's norms, rope and SwiGLU in all layouts")
    add("--repeats", type=int, default=3, help="timed steps of each layout, after one more (%(default)s)")
    add("--seconds", type=float, default=math.inf, help="begin no measurement after so many seconds")
    add("--profile", action="store_true", help="profile the kernels of a step of the packed layouts (GPU)")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/train"))
    return parser


def main() -> int:
    options = make_parser().parse_args()
    options.deadline = time.perf_counter() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = json.loads(options.lengths.read_text())
    names = options.sets if options.sets is not None else list(lengths)
    for fixed in options.fixed:
        prompt, completion = map(int, fixed.split(":"))
        names.append(f"{prompt:,} + 2 × {completion:,}")
        lengths[names[-1]] = [[prompt, completion, completion]]
    kernel, dtype = choose_kernel(options), getattr(torch, options.dtype)
    extras = "".join(f"; --{extra}" for extra in ("compile", "liger") if getattr(options, extra))
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    conditions = (
        f"{device}, {options.dtype}, random weights, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; packed pairs: {kernel}; shared rows of at most "
        f"{options.shared_tokens:,} tokens, backend {options.backend}; layers checkpointed: {options.checkpointing}"
        f"{extras}"
    )
    rate = matmul_rate(options.device, dtype)
    results: dict[str, Any] = {"conditions": conditions, "matmul_tflops": rate, "runs": []}
    print(f"{conditions}; matrix product {rate:.1f} TFLOP/s", flush=True)
    torch._dynamo.config.recompile_limit = (
        64  # with the default of 8 the baseline would run uncompiled, without a warning
    )
    for shape in options.shapes:
        torch._dynamo.reset()
        for mode in options.modes:
            if time.perf_counter() > options.deadline:
                break
            job = make_job(shape, mode, kernel, options)
            for name in tqdm(names, desc=f"{shape}, {mode}", disable=None):
                if time.perf_counter() > options.deadline:
                    break
                results["runs"].append(measure_set(job, name, lengths[name], options))
                (options.output / "train.json").write_text(json.dumps(results, indent=1))
                (options.output / "table.md").write_text(table(results))
                plot(results, options.output / "train.png")
            del job
            free_memory()
    print("\n" + table(results), flush=True)
    return int(any(run["wrong"] for run in results["runs"]))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the TFLOP/s of one large product of random matrices. Zeros draw less power and run faster."""
    size = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times, _ = timed(lambda: a @ b, device, 25)
    return 2 * size**3 / statistics.median(times[5:]) / 1e12


def timed(step: Callable[[], Any], device: str, repeats: int) -> tuple[list[float], Any]:
    """Time each call, in seconds. Returns the times, and the result of the last call."""
    times, result, wait = [], None, torch.get_device_module(device).synchronize
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        result = step()
        wait()
        times.append(time.perf_counter() - start)
    return times, result


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def choose_kernel(options: argparse.Namespace) -> str:
    """Register the attention of packed pairs with transformers: the first that runs forward and backward here."""
    names = {"auto": ["fa4", "varlen"] if options.device == "cuda" else ["sdpa"]}
    for name in names.get(options.paired_kernel, [options.paired_kernel]):
        if name in ("flex", "sdpa"):
            return str(name)  # backends of flexpatch, on trees that share nothing
        try:
            attend = partial(packed_attention, kernel=load_kernel(name))
            x = torch.randn(1, 8, 256, 128, device=options.device, dtype=torch.bfloat16, requires_grad=True)
            starts = torch.tensor([0, 100, 256], dtype=torch.int32, device=options.device)
            out, _ = attend(None, x, x[:, :2], x[:, 2:4], None, scaling=0.1, cu_seq_lens_q=starts, max_length_q=156)
            out.sum().backward()
            AttentionInterface.register(f"packed_{name}", attend)
            AttentionMaskInterface.register(f"packed_{name}", lambda *args, **kwargs: None)
            return str(name)
        except Exception as error:
            if options.paired_kernel != "auto":
                raise
            print(f"packed pairs cannot run on {name}: {type(error).__name__}: {error}", flush=True)
    return "flex"


def load_kernel(name: str) -> Any:
    """Causal attention within packed sequences, of (q, k, v, starts, longest, scaling); q is (L, H, D), k (L, G, D)."""
    if name == "varlen":
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        causal: dict[str, Any] = dict(window_size=(-1, 0))
        if "enable_gqa" in signature(varlen).parameters:  # torch 2.11 takes fewer key heads as they are
            causal["enable_gqa"] = True
        return lambda q, k, v, at, longest, scaling: varlen(q, k, v, at, at, longest, longest, scale=scaling, **causal)
    fa4 = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scaling: float) -> Any:
        lengths = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest)
        return fa4(q, k, v, **lengths, softmax_scale=scaling, causal=True)

    return torch.compiler.disable(run)  # else Dynamo would trace into its just-in-time compiler


def packed_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, kernel: Any, scaling: float, cu_seq_lens_q: Tensor,
    max_length_q: int, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of transformers: q is (1, H, L, D), the output (1, L, H, D)."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return (out[0] if isinstance(out, tuple) else out)[None], None  # FA4 returns log-sum-exps too


def make_job(shape: str, mode: str, kernel: str, options: argparse.Namespace) -> Job:
    torch.manual_seed(0)
    config = AutoConfig.for_model(SHAPES[shape][0], **SHAPES[shape][1])
    with torch.device(options.device):
        causal = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    causal.train()
    layers = causal.model.layers
    parameters = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
    if options.liger:
        liger = importlib.import_module("liger_kernel.transformers")
        # Liger's fused loss stays off, because it replaces the model's forward.
        liger._apply_liger_kernel_to_instance(model=causal, fused_linear_cross_entropy=False)
    named = {"all": len(layers), "none": 0}
    recomputed = named[options.checkpointing] if options.checkpointing in named else int(options.checkpointing)
    if recomputed:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < recomputed
    wrapped = causal
    if mode == "lora":
        # Random adapters: with B = 0 policy and reference are equal, and so are the losses of right and wrong layouts.
        # Adapters have the weights' dtype, since float32 adapters are fast only under autocast.
        adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        wrapped = peft.get_peft_model(causal, adapters, autocast_adapter_dtype=False)
    given = {name: getattr(options, name) for name in ("padded_attention", "micro_pairs") if name in options}
    return Job(shape, mode, kernel, causal, wrapped, parameters, **given)


def prepare(job: Job, layout: str, compiled: bool, backend: str) -> None:
    """Give the model the attention of ``layout``."""
    causal = job.causal
    flexpatch.remove(causal)
    for layer in causal.model.layers:
        vars(layer).pop("forward", None)
    causal.set_attn_implementation("sdpa")
    own = {"flex": "auto", "sdpa": "dense"}  # packed pairs on backends of flexpatch
    if layout == "padded pairs":
        causal.set_attn_implementation(job.padded_attention)
    elif layout.startswith("shared") or layout in FLEX or job.kernel in own:
        backend = own[job.kernel] if layout == "packed pairs" else backend
        flexpatch.apply(causal, backend=backend, compile=compiled and "packed" in layout)
    else:
        causal.set_attn_implementation(f"packed_{job.kernel}")
        if compiled:
            forward = compiled_forward(type(causal.model.layers[0]))
            for layer in causal.model.layers:
                layer.forward = partial(run_compiled, layer, forward)


@cache
def compiled_forward(layer_type: type) -> Any:
    """Compile the forward of a type of layers, once for all of them."""
    return torch.compile(unwrap(layer_type.forward), dynamic=False)  # type: ignore[attr-defined]


def run_compiled(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint around the compiled layer: newer transformers do so within, where a graph with a break fails."""
    if layer.gradient_checkpointing and layer.training and "__call__" not in vars(GradientCheckpointingLayer):
        return layer._gradient_checkpointing_func(partial(forward, layer, **kwargs), *args)
    return forward(layer, *args, **kwargs)


def draw_pairs(lengths: list[list[int]], budget: int, vocabulary: int) -> list[list[list[int]]]:
    """Draw the ids of the pairs of a step, with replacement, as many as fit. Of 200 draws the fullest is kept.

    FlexAttention compiles for each bucket of lengths, and full rows of most sets fall into one bucket.
    """
    most = budget // min(map(sum, lengths)) + 1

    def draw(seed: int) -> list[list[int]]:
        drawn = random.Random(seed).choices(lengths, k=most)
        return drawn[: sum(total <= budget for total in accumulate(map(sum, drawn)))]

    best = max(map(draw, range(200)), key=lambda drawn: sum(map(sum, drawn)))
    if not best:
        raise SystemExit(f"no pair fits in --shared-tokens {budget}")
    ids = random.Random(0)
    return [[[ids.randrange(5, vocabulary) for _ in range(length)] for length in triple] for triple in best]


def make_batches(job: Job, layout: str, pairs: list[list[list[int]]], options: argparse.Namespace) -> list[Batch]:
    own_kernel = layout == "packed pairs" and job.kernel in ("fa4", "varlen")
    if layout.startswith("shared"):
        trees = [[lay_out(Tree.of(*pair), i)] for i, pair in enumerate(pairs)]
    else:
        trees = [[lay_out(Tree.of(pair[0], answer), i) for answer in pair[1:]] for i, pair in enumerate(pairs)]
    if "packed" in layout:
        calls = [[[tree for pair in trees for tree in pair]]]
        missing = -sum(map(len, calls[0][0])) % FILL
        if options.compile and own_kernel and missing:
            calls[0][0].append(lay_out(Tree([0] * missing), "filler"))  # a root alone has no scored tokens
    else:
        # Equally many pairs in each micro-batch, as in trainers.
        longest = max(len(tree) for pair in trees for tree in pair)
        most = job.micro_pairs or max(1, options.tokens // (longest * len(trees[0])))
        size = math.ceil(len(trees) / math.ceil(len(trees) / most))
        groups = [trees[at : at + size] for at in range(0, len(trees), size)]
        calls = [[[tree] for pair in group for tree in pair] for group in groups]
    batches: list[Batch] = []
    for bins in calls:
        rows = build_rows(bins).to(options.device)
        call: dict[str, Any] | None = None
        if layout == "padded pairs":
            lengths = torch.tensor([len(tree) for (tree,) in bins])
            mask = torch.arange(rows.input_ids.shape[1]) < lengths[:, None]
            call = {"attention_mask": mask.long().to(options.device)}
        elif own_kernel:
            ends = list(accumulate(map(len, bins[0])))
            starts = torch.tensor([0, *ends], dtype=torch.int32, device=options.device)
            longest = max(map(len, bins[0]))  # an int, since a tensor would make every layer wait for the GPU
            call = dict(position_ids=rows.position_ids, cu_seq_lens_q=starts, max_length_q=longest)
        batches.append((rows, call))
    return batches


def log_probs(causal: Any, rows: Rows, call: dict[str, Any] | None) -> AnswerLogprobs:
    if call is None:
        return flexpatch.answer_logprobs(causal, rows)
    hidden = causal.base_model(input_ids=rows.input_ids, use_cache=False, **call).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, rows.predictors)
    compiled = "forward" in vars(causal.model.layers[0])
    tokens = token_logprobs(causal.get_output_embeddings(), hidden, rows.targets, compiled=compiled)
    return AnswerLogprobs(sum_answers(tokens, rows), tokens)


def train_step(job: Job, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Run a step. Returns the loss, and log-probs of all scored tokens: of the reference (lora), then of the policy."""
    job.causal.zero_grad(set_to_none=True)
    for rows, _ in batches:
        rows.masks.clear()  # a training run builds masks in every step
    losses, tokens = [], []
    if job.mode == "lora":
        passes = reference_pass(job, batches)
        references = [of.answers for of in passes]
        tokens = [of.tokens for of in passes]
    else:  # log-probs of a uniform model, with which the loss depends on every answer
        scale = -math.log(job.causal.config.vocab_size)
        references = [scale * (rows.answer_tokens < len(rows.targets)).sum(-1) for rows, _ in batches]
    for batch, reference in zip(batches, references, strict=True):
        policy = log_probs(job.causal, *batch)
        loss = flexpatch.dpo_loss(policy.answers, reference).loss * (len(reference) / sum(map(len, references)))
        loss.backward()
        losses.append(loss.detach())
        tokens.append(policy.tokens.detach())
    return torch.stack(losses).sum(), torch.cat(tokens)


def reference_pass(job: Job, batches: list[Batch]) -> list[AnswerLogprobs]:
    with torch.no_grad(), job.wrapped.disable_adapter():
        return [log_probs(job.causal, *batch) for batch in batches]


def true_tokens(job: Job, pairs: Any, options: argparse.Namespace) -> Tensor:
    """Compute the log-probs of :func:`train_step` unpatched, in padded pairs, with weights of twice the precision."""
    job = replace(job, padded_attention="sdpa")  # FlashAttention has no float32
    prepare(job, "padded pairs", False, options.backend)
    wrapped = copy.deepcopy(job.wrapped).to(torch.float64 if options.dtype == "float32" else torch.float32)
    true = replace(job, causal=wrapped if job.mode == "full" else wrapped.get_base_model(), wrapped=wrapped)
    batches = make_batches(true, "padded pairs", pairs, options)
    tokens = [of.tokens for of in reference_pass(true, batches)] if job.mode == "lora" else []
    with torch.no_grad():
        tokens += [log_probs(true.causal, *batch).tokens for batch in batches]
    return torch.cat(tokens).cpu()


def measure_layouts(
    job: Job, layouts: Sequence[str], pairs: Any, options: argparse.Namespace
) -> dict[str, tuple[dict[str, Any], Tensor] | str]:
    """Measure a record and the log-probs of each layout, or ``OUT_OF_MEMORY``.

    Layouts take turns, because a GPU slows down as it warms up, which would hurt the last of several blocks.
    """
    batches: dict[str, list[Batch]] = {}
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    peaks: dict[str, list[int]] = {layout: [] for layout in layouts}
    results: dict[str, tuple[dict[str, Any], Tensor] | str] = {}
    for turn in range(1 + options.repeats):
        for layout in layouts:
            if layout in results:  # out of memory
                continue
            prepare(job, layout, options.compile, options.backend)
            try:
                if turn == 0:
                    batches[layout] = make_batches(job, layout, pairs, options)
                if options.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                step = partial(train_step, job, batches[layout])
                took, (loss, tokens) = timed(step, options.device, 1)
                seconds[layout] += took
                peaks[layout].append(torch.cuda.max_memory_allocated() if options.device == "cuda" else 0)
                if turn == options.repeats:
                    record = record_of(job, pairs, batches[layout], seconds[layout], peaks[layout], loss)
                    if options.profile and options.device == "cuda" and "packed" in layout:
                        record["kernels_ms"] = profile(step, record["ms"])
                    results[layout] = record, tokens.cpu()
            except torch.OutOfMemoryError:
                results[layout] = OUT_OF_MEMORY
            job.causal.zero_grad(set_to_none=True)
            if results.get(layout) == OUT_OF_MEMORY:
                free_memory()
    return {layout: results[layout] for layout in layouts}


def record_of(
    job: Job, pairs: Any, batches: list[Batch], times: list[float], peaks: list[int], loss: Tensor
) -> dict[str, Any]:
    seconds = statistics.median(times[1:])
    computed = sum(rows.input_ids.numel() for rows, _ in batches)
    # 2 forward, 2 for gradients by inputs; and 2 for those by weights, or 2 for the reference pass.
    tflops = 6 * job.layer_parameters * computed / seconds / 1e12
    norm = nn.utils.get_total_norm([p.grad for p in job.causal.parameters() if p.grad is not None]).item()
    return dict(
        pairs_per_s=len(pairs) / seconds, ms=1e3 * seconds, steps_ms=[1e3 * t for t in times[1:]], warm_up_s=times[0],
        peak_gb=max(peaks[1:]) / 1e9 or None, calls=len(batches), tokens_computed=computed, tflops=tflops,
        loss=loss.item(), gradient_norm=norm,
    )  # fmt: skip


def measure_layout(job: Job, layout: str, pairs: Any, options: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Measure one layout.

    Raises:
        torch.OutOfMemoryError: If a step does not fit into memory.
    """
    found = measure_layouts(job, [layout], pairs, options)[layout]
    if isinstance(found, str):
        raise torch.OutOfMemoryError(found)
    return found


def measure_set(job: Job, name: str, lengths: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    pairs = draw_pairs(lengths, options.shared_tokens, job.causal.config.vocab_size)
    shared = sum(len(lay_out(Tree.of(*pair))) for pair in pairs)
    paired = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs)
    layouts: dict[str, Any] = {}
    tokens: dict[str, Tensor] = {}
    for layout, found in measure_layouts(job, options.layouts, pairs, options).items():
        if isinstance(found, str):
            layouts[layout] = found
        else:
            layouts[layout], tokens[layout] = found
        print(job.shape, job.mode, name, layout, layouts[layout], flush=True)
    run = dict(shape=job.shape, mode=job.mode, set=name, pairs=len(pairs), shared_tokens=shared, paired_tokens=paired)
    run |= dict(token_ratio=paired / shared, layouts=layouts, wrong=None)  # None if there is nothing to compare with
    base = next((layout for layout in ("padded pairs", "packed pairs") if layout in tokens), None)
    if base is not None:
        true = true_tokens(job, pairs, options)
        free_memory()
        losses = [layouts[layout]["loss"] for layout in tokens]
        errors = {layout: (tokens[layout] - true).abs().mean().item() for layout in tokens}
        bound = FACTOR * errors[base]
        wrong = not all(error <= bound for error in errors.values())  # so that NaN counts as wrong
        run |= dict(losses_between=[min(losses), max(losses)], errors_nats=errors, bound_nats=bound, wrong=wrong)
        nats = ", ".join(f"{layout} {error:.2e}" for layout, error in errors.items())
        verdict = "WRONG" if wrong else "right"
        print(f"{name}: log-probs of tokens are off by {nats} nats on average (at most {bound:.2e}: {verdict})")
        print(f"{name}: losses between {min(losses):.6f} and {max(losses):.6f}", flush=True)
    return run


def profile(step: Callable[[], Any], step_ms: float) -> dict[str, float]:
    """Return milliseconds by class of kernel. Idle is the time of an unprofiled step beyond that of all kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        step()
        torch.cuda.synchronize()
    spent = by_class(profiler.key_averages())
    return spent | {"GPU idle": step_ms - sum(spent.values())}


def by_class(events: Any) -> dict[str, float]:
    """Add up the milliseconds of profiled kernels, by class."""
    spent = dict.fromkeys(CLASSES, 0.0)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            name = event.key.lower()
            kind = next(kind for kind, words in KERNELS if any(word in name for word in words))
            spent[kind] += event.self_device_time_total / 1e3
    return spent


def table(results: dict[str, Any]) -> str:
    parts = [results["conditions"]]
    for shape, mode in dict.fromkeys((run["shape"], run["mode"]) for run in results["runs"]):
        lines = [
            f"**{shape}, {mode}**\n",
            "| lengths like | pairs | layout | pairs/s | over packed pairs | over padded pairs | tokens | of the ideal "
            "| peak GB | TFLOP/s (of a matrix product's) |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        profiles = ["", f"| ms (share) | {' | '.join(CLASSES)} | GPU idle |", "|---" * (len(CLASSES) + 2) + "|"]
        runs = [r for r in results["runs"] if (r["shape"], r["mode"]) == (shape, mode)]
        for run, layout, record in [(r, *item) for r in runs for item in r["layouts"].items()]:
            head = f"| {run['set']} | {run['pairs']} | {layout} |"
            if record == OUT_OF_MEMORY:
                lines.append(f"{head} {OUT_OF_MEMORY} |" + " |" * 6)
                continue
            packed, padded = speed_up(run, layout, "packed pairs"), speed_up(run, layout, "padded pairs")
            cells = [f"{record['pairs_per_s']:.2f}", *(f"{gain:.2f}×" if gain else "–" for gain in (packed, padded))]
            if layout.startswith("shared"):
                cells += [f"÷ {run['token_ratio']:.2f}", f"{packed / run['token_ratio']:.0%}" if packed else "–"]
            else:
                cells += ["", ""]
            cells.append("–" if record["peak_gb"] is None else f"{record['peak_gb']:.1f}")
            cells.append(f"{record['tflops']:.3g} ({record['tflops'] / results['matmul_tflops']:.0%})")
            lines.append(f"{head} {' | '.join(cells)} |")
            if spent := record.get("kernels_ms"):
                cells = [f"{ms:.0f} ({ms / record['ms']:.0%})" for ms in spent.values()]
                profiles.append(f"| {run['set']}, {layout} | {' | '.join(cells)} |")
        parts.append("\n".join(lines + (profiles if len(profiles) > 3 else [])))
    parts.append(
        "*Of the ideal*: speed-up over packed pairs / saving of tokens. *TFLOP/s*: 6 × weights of the layers' matrices "
        "× tokens computed, padding too; not recomputation, attention and head. A matrix product of this run: "
        f"{results['matmul_tflops']:.1f} TFLOP/s. `python benchmarks/train.py`."
    )
    return "\n\n".join(parts)


def speed_up(run: dict[str, Any], layout: str, over: str) -> float | None:
    records = [run["layouts"].get(name, OUT_OF_MEMORY) for name in (layout, over)]
    return None if OUT_OF_MEMORY in records else records[0]["pairs_per_s"] / records[1]["pairs_per_s"]


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(f"{run['shape']}, {run['mode']}" for run in results["runs"]))
    figure, panels = pyplot.subplots(len(titles), figsize=(8, 3.4 * len(titles)), layout="constrained", squeeze=False)
    for axes, title in zip(panels[:, 0], titles, strict=True):
        runs = [run for run in results["runs"] if f"{run['shape']}, {run['mode']}" == title]
        measured = [layout for layout in (*LAYOUTS, *FLEX) if any(layout in run["layouts"] for run in runs)]
        for i, layout in enumerate(measured):
            gains = [speed_up(run, layout, "packed pairs") or 0.0 for run in runs]
            places = [x + 0.8 * ((i + 0.5) / len(measured) - 0.5) for x in range(len(runs))]
            axes.bar(places, gains, 0.72 / len(measured), label=layout)
        edges = [[x + side for x in range(len(runs))] for side in (-0.45, 0.45)]
        axes.hlines([run["token_ratio"] for run in runs], *edges, colors="black", linestyles="--", label="÷ tokens")
        axes.set_xticks(range(len(runs)), [run["set"] for run in runs])
        axes.set(title=title, ylabel="pairs a second, packed pairs = 1")
        axes.legend(fontsize=7, ncols=5)
    panels[-1, 0].set_xlabel(results["conditions"], fontsize=5)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
