"""Measures what a decoder layer keeps for its backward, what keeping less costs, and steps by the memory they may have.

    python benchmarks/recomputation.py                                                      # on a GPU; both parts
    python benchmarks/recomputation.py --parts layer --modes lora --compile yes
    python benchmarks/recomputation.py --parts model --limits 40 60
    python benchmarks/recomputation.py --device cpu --narrow 8 --tokens 512 --pair 128:64 --least 32 --repeats 1 --kinds

A shared row is filled with equal pairs (--pair, tokens of a prompt and of each answer); weights and ids are random.
bfloat16 under autocast, as TRL's trainers run; LoRA of rank 16 on all linear layers, in float32 as peft makes it.
Parts:

layer   Kilobytes that one layer keeps for a token beyond its input and its output, and milliseconds of its forward and
        backward, for each of --ways, with compiled layers and without:
        everything          no checkpointing
        products            flexpatch's: matrix products and attention are kept, everything else is computed again
        all but gate, up    the same without products that are wider than the model
        attention           its outputs alone
        nothing             the whole layer is computed again
        budget 0.5 (etc.)   Inductor's activation memory budget, compiled layers without checkpointing
        On a CPU compiled layers run uncompiled operations, in graphs that are cut in the same places, and --kinds
        lists what is kept: compiled kernels hide it on a GPU.
model   Steps of a whole model (forward and backward of DPO, AdamW) whose process may hold --limits GB, with
        recompute_layers="auto": as it chooses, against whole layers alone (before), and the ms with nothing recomputed
        if that fits. The share of a step spent in recomputation follows. GPU alone.

Prints every line as it is measured, then the tables, and writes them with recomputation.json to --output.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from train import SHAPES, free_memory, matmul_rate
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch
from flexpatch import attention, compiled, selective

BUDGETS = (0.9, 0.7, 0.5, 0.3, 0.1)
WAYS = ("everything", "products", "nothing", "all but gate, up", "attention", *(f"budget {b}" for b in BUDGETS))
PRODUCTS = ("aten.mm", "aten.addmm")
KEEPING = ("everything", "products", "attention")  # as flexpatch counts layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("layer", "model"), default=["layer", "model"])
    add("--shape", choices=SHAPES, default="Mistral-7B")
    add("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    add("--compile", nargs="+", choices=("yes", "no"), default=["yes", "no"])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--tokens", type=int, default=16384, help="of the row, at most (%(default)s)")
    add("--pair", default="512:256", metavar="P:C", help="tokens of a prompt, of each of two answers (%(default)s)")
    add("--adapter-dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    add("--no-autocast", action="store_true", help="part layer: as in loops of your own")
    add("--layers", type=int, help="part model: layers of the model (default: the shape's)")
    add(
        "--limits",
        nargs="+",
        type=float,
        default=[],
        metavar="GB",
        help="part model (default: three, from its weights)",
    )
    add("--least", type=int, default=selective.INNER, help="terms of products that are kept, at least (%(default)s)")
    add("--repeats", type=int, default=7)
    add("--seconds", type=float, default=float("inf"), help="begin no measurement after so many seconds")
    add("--kinds", action="store_true", help="on a CPU: list what is kept")
    add("--narrow", type=int, default=1, help="on a CPU: divide widths and ranks by this, and multiply kB with it")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/recomputation"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.deadline = time.perf_counter() + options.seconds
    selective.INNER = options.least
    selective.contexts.cache_hash = f"products of {options.least} terms"  # names stored graphs
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    prompt, answer = map(int, options.pair.split(":"))
    count = max(1, options.tokens // (prompt + 2 * answer))
    options.trees = [
        flexpatch.Tree.of(*(torch.randint(5, 500, (size,)).tolist() for size in (prompt, answer, answer)))
        for _ in range(count)
    ]
    rate = matmul_rate(options.device, torch.bfloat16)
    width = f" (widths divided by {options.narrow})" * (options.narrow > 1)
    command = shlex.join(["python", "benchmarks/recomputation.py", *sys.argv[1:]]).split(" --output")[0]
    product = f"; a matrix product: {rate:.0f} TFLOP/s" if options.device == "cuda" else ""
    conditions = (
        f"{options.shape}{width}, random weights, bfloat16, {'no ' * options.no_autocast}autocast, LoRA of rank 16 on "
        f"all linear layers; a shared row of {count} pairs of {prompt} + 2 × {answer} tokens; {device}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}{product}. `{command}`"
    )
    print(conditions, flush=True)
    results: dict[str, Any] = {"conditions": conditions, "layer": [], "model": []}

    def note(part: str, record: dict[str, Any]) -> None:
        results[part].append(record)
        print(json.dumps({name: value for name, value in record.items() if name != "kinds"}), flush=True)
        (options.output / "recomputation.json").write_text(json.dumps(results, indent=1))
        (options.output / "table.md").write_text(tables(results))

    wrong = False
    with let_flex_train() if options.device == "cpu" else nullcontext():
        if "layer" in options.parts:
            for mode in options.modes:
                for dtype in options.adapter_dtype if mode == "lora" else ["bfloat16"]:
                    for compiles in options.compile:
                        wrong |= measure_layer(mode, dtype, compiles == "yes", options, partial(note, "layer"))
        if "model" in options.parts and options.device == "cuda":
            measure_model(options, partial(note, "model"))
    print("\n" + tables(results), flush=True)
    if wrong:
        print("gradients differ between ways", file=sys.stderr)
    return int(wrong)


@contextmanager
def let_flex_train() -> Iterator[None]:
    """Let FlexAttention and compiled layers run forward and backward on a CPU, by uncompiled operations.

    Graphs of layers are cut into forward and backward after Inductor's decompositions, as for Inductor.
    """
    attend = torch.compile(attention._attend, backend="aot_eager", fullgraph=True, dynamic=False)
    layer = torch.compile(compiled._plain, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None),
        mock.patch.object(attention, "_check_device", lambda *tensors: None),
        mock.patch.object(attention, "_compiled", lambda: attend),
        mock.patch.object(compiled, "_compiled", lambda: layer),
    ):
        yield


def make_model(mode: str, adapter_dtype: str, layers: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Make a model. Returns transformers' and peft's, or the same twice."""
    torch.manual_seed(0)
    kind, shape = SHAPES[options.shape]
    wide = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    narrow = {name: shape[name] // options.narrow for name in wide}
    config = AutoConfig.for_model(kind, **(shape | narrow | dict(num_hidden_layers=layers)))
    with torch.device(options.device):
        causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    wrapped = causal
    if mode == "lora":
        rank = max(1, 16 // options.narrow)
        adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        wrapped = peft.get_peft_model(causal, adapters, autocast_adapter_dtype=adapter_dtype == "float32")
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    causal.enable_input_require_grads()
    return causal, wrapped


# --- a layer --------------------------------------------------------------------------------------------------------


def measure_layer(
    mode: str, dtype: str, compiles: bool, options: argparse.Namespace, note: Callable[[dict[str, Any]], None]
) -> bool:
    """Measure a layer in all ways. Returns whether gradients differ between them."""
    causal, _ = make_model(mode, dtype, 1, options)
    flexpatch.apply(causal, backend="flex", compile=compiles)
    layer = causal.model.layers[0]
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    rows = flexpatch.build_rows([options.trees]).to(options.device)
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=not options.no_autocast):
        causal.base_model(**flexpatch.model_inputs(causal, rows))
    handle.remove()
    (hidden,), arguments = calls[0]
    plain, expected, differ = layer._gradient_checkpointing_func, None, False
    shown = dict(mode=mode, adapters=dtype if mode == "lora" else None, compiled=compiles)
    for way in options.ways:
        if (way.startswith("budget") and not compiles) or time.perf_counter() > options.deadline:
            continue
        torch._dynamo.reset()
        layer.gradient_checkpointing = not (way == "everything" or way.startswith("budget"))
        layer._gradient_checkpointing_func = plain if way == "nothing" else partial(
            checkpoint, use_reentrant=False, context_fn=contexts_of(way, hidden.shape[-1])
        )  # fmt: skip
        budget = float(way.split()[1]) if way.startswith("budget") else 1.0
        record: dict[str, Any]
        try:
            with torch._functorch.config.patch(activation_memory_budget=budget):
                record, gradient = time_layer(layer, hidden, arguments, options)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            note(shown | dict(way=way, error=f"{type(error).__name__}: {str(error)[:300]}"))
            free(options)
            continue
        expected = gradient if expected is None else expected
        error = ((gradient - expected).norm() / expected.norm()).item()
        differ |= not error < 2e-2
        note(shown | dict(way=way, error_to_first=error) | record)
        free(options)
    return differ


def contexts_of(way: str, width: int) -> Callable[[], Any]:
    """Make the contexts of a way: functions of their own, by which compiled graphs tell ways apart."""
    if way == "products":
        return selective.contexts

    def choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        chosen = selective.choose(context, operation, *args, **kwargs)
        if str(operation).startswith(PRODUCTS) and (way == "attention" or args[-1].shape[-1] > width):
            return CheckpointPolicy.PREFER_RECOMPUTE
        return chosen

    return lambda: create_selective_checkpoint_contexts(choose)


def time_layer(
    layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """Measure one way. Returns its record and the gradients of a call."""
    on_gpu, tokens = options.device == "cuda", hidden.shape[1]
    given = hidden.detach().clone().requires_grad_()
    torch.manual_seed(1)
    upstream = torch.randn_like(hidden) / hidden.numel() ** 0.5
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    forwards, backwards, kept, kinds, first = [], [], 0, {}, 0.0
    for turn in range(1 + options.repeats):
        given.grad = None
        layer.zero_grad(set_to_none=True)
        live = Live() if not on_gpu and turn else nullcontext()  # the first call compiles
        before = torch.cuda.memory_allocated() if on_gpu else 0
        wait()
        start = time.perf_counter()
        with live, torch.autocast(options.device, torch.bfloat16, enabled=not options.no_autocast):
            output = layer(given, **arguments)
        output = output[0] if isinstance(output, tuple) else output
        wait()
        middle = time.perf_counter()
        if on_gpu:
            kept = torch.cuda.memory_allocated() - before - output.nbytes
        elif turn:
            gc.collect()
            kinds = live.kinds()
            kept = sum(kinds.values()) - output.nbytes
        begun = time.perf_counter()
        output.backward(upstream)
        wait()
        end = time.perf_counter()
        if turn:
            forwards.append(1e3 * (middle - start))
            backwards.append(1e3 * (end - begun))
        else:
            first = end - start
        del output
    grads = [given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    record = dict(
        kb_a_token=options.narrow * kept / tokens / 1e3, tokens=tokens, forward_ms=statistics.median(forwards),
        backward_ms=statistics.median(backwards), first_s=first,
        kinds={kind: options.narrow * size / tokens / 1e3 for kind, size in kinds.items()} if options.kinds else {},
    )  # fmt: skip
    return record, torch.cat([grad.flatten().float() for grad in grads])


class Live(TorchDispatchMode):
    """Watches operations, for the storages that they make and that still live: what a forward keeps."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()).cdata for x in tree_leaves((args, kwargs)) if plain_tensor(x)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if plain_tensor(tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in given:  # no view
                    kind = f"{str(func).removesuffix('.default')} {str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
                    self.made[storage.cdata] = storage, tensor.untyped_storage().nbytes(), kind
        return output

    def kinds(self) -> Counter[str]:
        """Count bytes that live by operation, dtype and shape."""
        found: Counter[str] = Counter()
        for storage, size, kind in self.made.values():
            if not storage.expired():
                found[kind] += size
        return found


def plain_tensor(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def free(options: argparse.Namespace) -> None:
    gc.collect()
    if options.device == "cuda":
        free_memory()


# --- a model --------------------------------------------------------------------------------------------------------


def measure_model(options: argparse.Namespace, note: Callable[[dict[str, Any]], None]) -> None:
    """Measure steps by the memory that the process may hold."""
    layers = options.layers or SHAPES[options.shape][1]["num_hidden_layers"]
    total = torch.cuda.get_device_properties(0).total_memory
    for mode in [mode for mode in options.modes if mode == "lora"]:
        causal, wrapped = make_model(mode, options.adapter_dtype[0], layers, options)
        weights = torch.cuda.memory_allocated() / 1e9
        limits = options.limits or [weights + layers * room for room in (0.8, 1.5, 2.0)]
        for compiles in [each == "yes" for each in options.compile]:
            for limit in [total / 1e9, *sorted(limits, reverse=True)]:
                for whole in (False, True) if limit < total / 1e9 else (None,):
                    if time.perf_counter() > options.deadline:
                        return
                    free(options)
                    torch._dynamo.reset()
                    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
                    record = dict(mode=mode, compiled=compiles, layers=layers, weights_gb=weights, limit_gb=limit)
                    record["layers recomputed"] = {None: "as few as fit", True: "whole", False: "auto"}[whole]
                    try:
                        patch = mock.patch("flexpatch.checkpointing.can_keep_products", lambda layer: False)
                        with patch if whole else nullcontext():
                            note(record | time_steps(causal, compiles, options))
                    except (torch.OutOfMemoryError, RuntimeError) as error:
                        note(record | dict(error=f"{type(error).__name__}: {str(error)[:300]}"))
        torch.cuda.set_per_process_memory_fraction(1.0)
        del causal, wrapped
        free(options)


def time_steps(causal: Any, compiles: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Run steps until flexpatch has chosen, and time those after it."""
    flexpatch.apply(causal, compile=compiles, recompute_layers="auto")
    trained = [p for p in causal.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    rows = flexpatch.build_rows([options.trees]).to(options.device)
    stage = flexpatch.forward.hook_of(causal).recomputation
    reference = torch.full((2 * len(options.trees),), -100.0, device=options.device)
    choices: list[list[int]] = []
    choose = stage.plan

    def plan(*args: Any, **kwargs: Any) -> Any:
        chosen = choose(*args, **kwargs)
        choices.append([len(layers) for layers in chosen[0]])
        return chosen

    stage.plan = plan
    times = []
    for turn in range(5 + options.repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        rows.masks.clear()
        with torch.autocast("cuda", torch.bfloat16):
            logprobs = flexpatch.answer_logprobs(causal, rows).answers
            loss = flexpatch.dpo_loss(logprobs, reference).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if turn == 4:
            torch.cuda.reset_peak_memory_stats()
    flexpatch.remove(causal)
    return dict(
        ms=1e3 * statistics.median(times[5:]), **dict(zip(KEEPING, choices[-1], strict=True)),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9, first_steps_s=[round(t, 2) for t in times[:5]],
        kb_a_token={way: [size / 1e3 for size in sizes.values()] for way, sizes in stage.sizes.of.items()},
        tokens=rows.input_ids.numel(), loss=loss.item(),
    )  # fmt: skip


# --- tables ---------------------------------------------------------------------------------------------------------


def name_of(record: dict[str, Any]) -> str:
    name = {"lora": f"LoRA, adapters in {record['adapters']}", "full": "all weights"}[record["mode"]]
    return name + (", compiled" if record["compiled"] else "")


def counted(records: list[dict[str, Any]]) -> list[str]:
    """Make the table of a CPU: what is kept, without times."""
    ways = [way for way in WAYS if any(record["way"] == way for record in records)]
    lines = [f"| kB a token that a layer keeps: | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for name in dict.fromkeys(map(name_of, records)):
        of = {record["way"]: record.get("kb_a_token") for record in records if name_of(record) == name}
        cells = ["–" if of.get(way) is None else f"{of[way]:.1f}" for way in ways]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def tables(results: dict[str, Any]) -> str:
    lines = counted(results["layer"]) if "; CPU," in results["conditions"] else []
    if results["layer"] and not lines:
        lines = [
            "| a layer | kept | kB a token | forward, ms | backward, ms | both, beyond everything kept |",
            "|---|---|---|---|---|---|",
        ]
    fastest: dict[str, float] = {}
    for record in results["layer"]:
        if "; CPU," in results["conditions"]:
            break
        name = name_of(record)
        if isinstance(record.get("error"), str):
            lines.append(f"| {name} | {record['way']} | {record['error'][:60]} | | | |")
            continue
        ms = record["forward_ms"] + record["backward_ms"]
        if record["way"] == "everything":
            fastest[name] = ms
        more = f"{ms / fastest[name] - 1:+.1%}" if name in fastest else ""
        cells = f"{record['kb_a_token']:.1f} | {record['forward_ms']:.2f} | {record['backward_ms']:.2f} | {more}"
        lines.append(f"| {name} | {record['way']} | {cells} |")
    if results["model"]:
        lines += [""] * bool(lines) + [
            "| a model | GB it may hold | recomputed | layers: everything, products, attention, nothing kept "
            "| step, ms | share of it in recomputation | peak GB |",
            "|---|---|---|---|---|---|---|",
        ]
    steps: dict[str, float] = {}
    for record in results["model"]:
        name = f"{record['layers']} layers, {record['mode']}" + (", compiled" if record["compiled"] else "")
        head = f"| {name} | {record['limit_gb']:.0f} | {record['layers recomputed']} |"
        if "error" in record:
            lines.append(f"{head} {record['error'][:60]} | | | |")
            continue
        nothing = record["layers"] - record["everything"] - record["products"] - record["attention"]
        if record["everything"] == record["layers"]:
            steps.setdefault(name, record["ms"])
        share = f"{1 - steps[name] / record['ms']:.1%}" if name in steps else "–"
        lines.append(
            f"{head} {record['everything']}, {record['products']}, {record['attention']}, {nothing} "
            f"| {record['ms']:.0f} | {share} | {record['peak_gb']:.1f} |"
        )
    listed = [record for record in results["layer"] if record.get("kinds")]
    for record in listed:
        lines += ["", f"{record['mode']}, compiled {record['compiled']}, {record['way']}, kB a token:", ""]
        lines += [f"- {size:.2f} {kind}" for kind, size in sorted(record["kinds"].items(), key=lambda item: -item[1])]
    return "\n".join([*lines, "", results["conditions"]])


if __name__ == "__main__":
    sys.exit(main())
