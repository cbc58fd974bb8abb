"""Profiles one decoder layer under LoRA: what adapters add to its matrix products, kernel by kernel.

    python benchmarks/lora.py                                  # on a GPU, about a minute
    python benchmarks/lora.py --device cpu --tiny              # a dry run

A layer of Mistral-7B's shape with random weights runs forward and backward over a shared row of equal pairs (--pair,
tokens of a prompt and of each of two answers), bfloat16 under autocast, nothing recomputed, as under TRL's trainers.
Adapters have rank 16 on all linear layers. Settings are those of --settings:

none           weights frozen, no adapters: the least that a step of LoRA computes
float32        adapters in float32, as peft makes them on 16-bit weights
bfloat16       adapters in the weights' own dtype
uncompiled     as float32, without compile=True

Kernels are counted by class: products of whole weights, products with an adapter's narrow side, attention, everything
that Inductor fused, and the rest. *Ideal*: products of whole weights at the rate of a large product in the same run.
Prints a table, and writes lora.json and table.md to --output.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.autograd import DeviceType
from train import SHAPES, free_memory, matmul_rate
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch

RANK = 16
SETTINGS = ("none", "float32", "bfloat16", "uncompiled")
CLASSES = ("whole products", "adapters' products", "attention", "fused", "other")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--tokens", type=int, default=16384, help="of the row, at most (%(default)s)")
    add("--pair", default="512:256", metavar="P:C", help="(%(default)s)")
    add("--repeats", type=int, default=10)
    add("--kernels", type=int, default=25, help="list so many kernels of each setting (%(default)s)")
    add("--tiny", action="store_true", help="a narrow layer and a short row")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("runs/lora"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prompt, answer = map(int, options.pair.split(":"))
    count = 1 if options.tiny else max(1, options.tokens // (prompt + 2 * answer))
    pairs = [[torch.randint(5, 500, (size,)).tolist() for size in (prompt, answer, answer)] for _ in range(count)]
    rows = flexpatch.build_rows([[flexpatch.Tree.of(*pair) for pair in pairs]]).to(options.device)
    rate = matmul_rate(options.device, torch.bfloat16)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    command = shlex.join(["python", "benchmarks/lora.py", *sys.argv[1:]]).split(" --output")[0]
    conditions = (
        f"One layer of Mistral-7B's shape, random weights, bfloat16, autocast, LoRA of rank {RANK} on all linear "
        f"layers, forward and backward of a shared row of {count} pairs of {prompt} + 2 × {answer} tokens; {device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; a matrix "
        f"product: {rate:.0f} TFLOP/s. `{command}`"
    )
    print(conditions, flush=True)
    results: dict[str, Any] = {"conditions": conditions, "tflops": rate, "settings": {}}
    for setting in options.settings:
        results["settings"][setting] = measure(setting, rows, options)
        (options.output / "lora.json").write_text(json.dumps(results, indent=1))
        free_memory()
    (options.output / "table.md").write_text(table(results))
    print("\n" + table(results), flush=True)


def measure(setting: str, rows: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time and profile a layer's forward and backward under one setting."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    narrow = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    kind, shape = SHAPES["Mistral-7B"]
    config = AutoConfig.for_model(kind, **(shape | (narrow if options.tiny else {}) | dict(num_hidden_layers=1)))
    with torch.device(options.device):
        causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train().requires_grad_(False)
    if setting != "none":
        adapters = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(causal, adapters, autocast_adapter_dtype=setting != "bfloat16")
    on_gpu = options.device == "cuda"
    flexpatch.apply(causal, backend="flex" if on_gpu else "dense", compile=on_gpu and setting != "uncompiled")
    calls: list[Any] = []
    layer = causal.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        causal.base_model(**flexpatch.model_inputs(causal, rows))
    handle.remove()
    (hidden,), arguments = calls[0]
    given, upstream = hidden.detach().requires_grad_(), torch.randn_like(hidden)
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def step() -> None:
        given.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16):
            output = layer(given, **arguments)
        (output[0] if isinstance(output, tuple) else output).backward(upstream)

    began = time.perf_counter()
    step()
    wait()
    first, times = time.perf_counter() - began, []
    for _ in range(options.repeats):
        began = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
        wait()
    classes, kernels = by_class(profiler.events(), hidden.shape[1])
    matrices = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2 and "lora_" not in name)
    record = dict(
        ms=statistics.median(times), first_s=first, classes=classes, kernels=dict(kernels.most_common(options.kernels)),
        floor_gflop=4e-9 * matrices * hidden.shape[1],
    )  # fmt: skip
    print(f"{setting}: {json.dumps(record, indent=1)}", flush=True)
    return record


def by_class(events: Any, tokens: int) -> tuple[dict[str, float], Counter[str]]:
    """Add up milliseconds of kernels by class, and by operation or name."""
    classes, kernels = dict.fromkeys(CLASSES, 0.0), Counter()
    seen = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.name not in PRODUCTS or not event.kernels:
            continue
        shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
        ms = sum(kernel.duration for kernel in event.kernels) / 1e3
        narrow = min(min(shape) for shape in shapes) <= RANK
        classes["adapters' products" if narrow else "whole products"] += ms
        kernels[f"{event.name} {shapes}"] += ms
        for kernel in event.kernels:
            seen[kernel.name] += kernel.duration / 1e3
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        ms = event.self_device_time_total / 1e3
        counted = min(ms, seen[event.name])
        seen[event.name] -= counted
        ms -= counted
        if ms > 1e-6:
            kernels[event.name[:110]] += ms
            flex = "flex_attention" in event.name
            classes["attention" if flex else "fused" if event.name.startswith("triton") else "other"] += ms
    return classes, kernels


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| ms of one layer | {' | '.join(CLASSES)} | all kernels | a step | ideal |",
        "|---" * (len(CLASSES) + 4) + "|",
    ]
    for name, record in results["settings"].items():
        spent = record["classes"]
        cells = [f"{spent[kind]:.2f}" for kind in CLASSES]
        floor = record["floor_gflop"] / results["tflops"]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(spent.values()):.2f} | {record['ms']:.2f} | {floor:.2f} |")
    return "\n".join([*lines, "", results["conditions"]]) + "\n"


if __name__ == "__main__":
    main()
