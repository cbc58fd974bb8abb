"""Profiles one decoder layer under LoRA: what adapters add to its matrix products, kernel by kernel.

    python benchmarks/lora.py                                  # on a GPU, about a minute
    python benchmarks/lora.py --device cpu --tiny              # a dry run, without kernels

A layer of Mistral-7B's shape with random weights runs forward and backward over a shared row of equal pairs (--pair,
tokens of a prompt and of each of two answers), bfloat16 under autocast, nothing recomputed. All linear layers have
adapters of rank 16. Settings:

none           weights frozen, no adapters: the least that a step of LoRA computes
float32        adapters in float32, as peft makes them on 16-bit weights
bfloat16       adapters in the weights' own dtype
uncompiled     as float32, without compile=True

Kernels of one step are counted by class: products of whole weights, products with an adapter's narrow side, attention,
everything that Inductor fused, and the rest. Adapters' products have the rate at which they move activations through
memory. *A step* is the median from one idle GPU to the next; a model's layers follow each other without such breaks.
*Ideal*: whole products at the rate of one large product in the same run. Prints a table, and writes lora.json (with the
longest kernels of each setting) and table.md to --output.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.autograd import DeviceType
from train import SHAPES, free_memory, matmul_rate, timed
from transformers import AutoConfig, AutoModelForCausalLM

import flexpatch

RANK = 16
SETTINGS = {
    "none": "compiled, no adapters",
    "float32": "compiled, adapters in float32",
    "bfloat16": "compiled, adapters in bfloat16",
    "uncompiled": "not compiled, adapters in float32",
}
CLASSES = ("whole products", "adapters' products", "attention", "fused", "other")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")
NARROW = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


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
    shape = f"One layer {'narrower than' if options.tiny else 'of'} Mistral-7B's shape"
    conditions = (
        f"{shape}, random weights, bfloat16, autocast, LoRA of rank {RANK} on all linear layers, forward and backward "
        f"of a shared row of {count} pairs of {prompt} + 2 × {answer} tokens; {device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}; a matrix product: {rate:.0f} TFLOP/s. "
        f"`{command}`"
    )
    print(conditions, flush=True)
    results: dict[str, Any] = {"conditions": conditions, "tflops": rate, "settings": {}}
    for setting in options.settings:
        results["settings"][setting] = measure(setting, rows, options)
        (options.output / "lora.json").write_text(json.dumps(results, indent=1))
        free_memory()
    (options.output / "table.md").write_text(table(results))
    print("\n" + table(results), flush=True)


def measure(setting: str, rows: flexpatch.Rows, options: argparse.Namespace) -> dict[str, Any]:
    """Time and profile a layer's forward and backward under one setting."""
    torch._dynamo.reset()
    causal = make_model(setting, options)
    layer = causal.model.layers[0]
    hidden, arguments = call_of(causal, layer, rows, options.device)
    given, upstream = hidden.requires_grad_(), torch.randn_like(hidden)

    def step() -> None:
        given.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16):
            output = layer(given, **arguments)
        (output[0] if isinstance(output, tuple) else output).backward(upstream)

    times, _ = timed(step, options.device, 1 + options.repeats)  # the first compiles
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if options.device == "cuda" else []
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        timed(step, options.device, 1)
    classes, kernels = by_class(profiler.events())
    tokens = hidden.shape[1]
    matrices = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2 and "lora_" not in name)
    adapted = [module for module in layer.modules() if hasattr(module, "lora_A")]
    record = dict(
        ms=1e3 * statistics.median(times[1:]),
        classes=classes,
        # Forward, and gradients of inputs; weights are frozen.
        gflop=4e-9 * matrices * tokens,
        # Six products an adapter: three read or write inputs of its layer or their gradients, three those of outputs.
        adapters_gb=6e-9 * tokens * sum(module.in_features + module.out_features for module in adapted),
        kernels=dict(kernels.most_common(options.kernels)),
    )
    print(f"{setting}: {json.dumps(record, indent=1)}", flush=True)
    return record


def make_model(setting: str, options: argparse.Namespace) -> Any:
    """Make a patched model of one layer."""
    torch.manual_seed(0)
    kind, shape = SHAPES["Mistral-7B"]
    config = AutoConfig.for_model(kind, **shape | (NARROW if options.tiny else {}) | dict(num_hidden_layers=1))
    with torch.device(options.device):
        causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train().requires_grad_(False)
    if setting != "none":
        adapters = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(causal, adapters, autocast_adapter_dtype=setting != "bfloat16")
    on_gpu = options.device == "cuda"
    flexpatch.apply(causal, backend="flex" if on_gpu else "dense", compile=on_gpu and setting != "uncompiled")
    return causal


def call_of(causal: Any, layer: nn.Module, rows: flexpatch.Rows, device: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run the model once, and return the layer's input and its other arguments."""
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        causal.base_model(**flexpatch.model_inputs(causal, rows))
    handle.remove()
    [((hidden,), arguments)] = calls
    return hidden.detach(), arguments


def by_class(events: Any) -> tuple[dict[str, float], Counter[str]]:
    """Add up milliseconds of kernels by class, and by name; products by operation and shapes."""
    classes: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    kernels: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.name not in PRODUCTS or not event.kernels:
            continue
        shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
        ms = sum(kernel.duration for kernel in event.kernels) / 1e3
        narrow = min(map(min, shapes)) <= RANK
        classes["adapters' products" if narrow else "whole products"] += ms
        kernels[f"{event.name} {shapes}"] += ms
        for kernel in event.kernels:
            counted[kernel.name] += kernel.duration / 1e3
    # Kernels that no product has launched: products are taken off by the names of their kernels.
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        ms = event.self_device_time_total / 1e3
        known = min(ms, counted[event.name])
        counted[event.name] -= known
        if ms - known > 1e-6:
            kernels[event.name[:110]] += ms - known
            fused = "attention" if "flex_attention" in event.name else "fused"
            classes[fused if event.name.startswith("triton") else "other"] += ms - known
    return classes, kernels


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| ms of one layer | {' | '.join(CLASSES)} | all kernels | a step | ideal |",
        "|---" * (len(CLASSES) + 4) + "|",
    ]
    for name, record in results["settings"].items():
        spent = record["classes"]
        cells = {kind: f"{spent[kind]:.2f}" for kind in CLASSES}
        if ms := spent["adapters' products"]:
            cells["adapters' products"] += f" ({record['adapters_gb'] / ms:.1f} TB/s)"
        cells |= {"all kernels": f"{sum(spent.values()):.2f}", "a step": f"{record['ms']:.2f}"}
        cells["ideal"] = f"{record['gflop'] / results['tflops']:.2f}"
        lines.append(f"| {SETTINGS[name]} | {' | '.join(cells.values())} |")
    note = (
        "*TB/s*: activations that adapters' products read or write; *a step*: from one idle GPU to the next; *ideal*: "
        "whole products at the rate of one large product."
    )
    return "\n".join([*lines, "", f"{note} {results['conditions']}"]) + "\n"


if __name__ == "__main__":
    main()
