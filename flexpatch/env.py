"""Describe a machine, its packages and a patched model for a bug report: ``python -m flexpatch.env [NAME]``.

Reads and prints, and sends nothing. Paths, host names and the names of users are left out. The parts that describe a
model are imported when one is asked for: the rest of the report is wanted most where transformers does not import.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import flexpatch
from flexpatch.errors import first_line

# Distributions whose releases decide what a model computes. Asked by name, never imported.
PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "safetensors", "tokenizers", "datasets", "numpy",
    "deepspeed", "bitsandbytes", "torchao", "flash-attn", "flash-attn-4", "liger-kernel", "kernels",
)  # fmt: skip
KINDS = ("cuda", "xpu")  # of accelerators
CPU = torch.device("cpu")
GIB = 2**30


def report(model: nn.Module | None = None) -> dict[str, Any]:
    """Describe this installation, its devices and, where one is given, a model.

    Args:
        model: A transformers model, bare or wrapped, patched or not.

    Returns:
        JSON types: ``versions`` (by distribution, ``None`` where it is not installed), ``platform``, ``devices`` (name,
        compute capability and memory in GiB of each) and ``model`` (class, type, dtype, device, attention, settings of
        :func:`flexpatch.apply`, and the backend of its rows; ``None`` without a model).

    Raises:
        FlexpatchError: If ``model`` holds no transformers model.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "model": None if model is None else settings(model),
    }


def versions() -> dict[str, str | None]:
    """The releases of flexpatch, Python, and the packages that matter; ``None`` for what is not installed."""
    found: dict[str, str | None] = {"flexpatch": flexpatch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda of torch": torch.version.cuda, "rocm of torch": torch.version.hip}


def devices() -> list[dict[str, Any]]:
    """Every accelerator that torch can use, then the processor."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        module = torch.get_device_module(kind)
        for index in range(module.device_count() if module.is_available() else 0):
            known = module.get_device_properties(index)
            capability = f"{known.major}.{known.minor}" if kind == "cuda" else None
            memory = round(known.total_memory / GIB, 1)
            found.append({"device": f"{kind}:{index}", "name": known.name, "capability": capability, "memory": memory})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    name = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    memory = None if pages is None else round(pages / GIB, 1)
    capability = torch.backends.cpu.get_cpu_capability()
    return [*found, {"device": "cpu", "name": name, "capability": capability, "memory": memory}]


def settings(model: nn.Module) -> dict[str, Any]:
    """Describe a model, and how :func:`flexpatch.apply` set it.

    Returns:
        As the ``model`` of :func:`report`. ``applied`` is ``None``, and there is no ``backend``, if it is not patched.

    Raises:
        FlexpatchError: If ``model`` holds no transformers model.
    """
    from flexpatch.dispatch import backend_at, original_of
    from flexpatch.internals import attention_name, device_of, pretrained
    from flexpatch.patch import settings_of

    inner, applied = pretrained(model), settings_of(model)
    device = device_of(inner)
    quantized = getattr(inner.config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    found = {
        "class": type(inner).__name__ if model is inner else f"{type(model).__name__} of {type(inner).__name__}",
        "model_type": inner.config.model_type,
        "layers": inner.config.get_text_config().num_hidden_layers,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "device": str(device),
        "attention": original_of(attention_name(inner)),
        "quantized": None if method is None else str(getattr(method, "value", method)),
        "gradient_checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()),
        "training": model.training,
        "applied": applied,
    }
    if applied is None:
        return found
    if device.type == "meta":  # a model without weights: the backend that rows would take on this machine
        device = next((torch.device(kind) for kind in KINDS if torch.get_device_module(kind).is_available()), CPU)
    return found | {"backend": backend_at(inner, device, applied["backend"])}


def patched(name: str) -> nn.Module:
    """A patched model without weights, of a registered architecture, a hub name, a directory or a GGUF file.

    Raises:
        FlexpatchError: If there is no such model, or :func:`flexpatch.apply` refuses it.
    """
    from transformers import AutoModelForCausalLM

    from flexpatch.models import check_architecture, load_config, tiny_model, tiny_types
    from flexpatch.registry import adapter_for

    if name in tiny_types() and not os.path.isdir(name):
        config: Any = tiny_model(name).config
    else:
        if not os.path.exists(name) and os.sep not in name:
            check_architecture(name)
        config = load_config(name)
    implementation = adapter_for(config).implementations[0]
    with torch.device("meta"):
        return flexpatch.apply(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


def text(found: dict[str, Any]) -> str:
    """The report for people: a line each."""
    lines = [(name, value) for name, value in found["versions"].items() if value is not None]
    missing = ", ".join(name for name in PACKAGES if found["versions"][name] is None)
    lines += [("not installed", missing)] * bool(missing) + [("platform", found["platform"])]
    for device in found["devices"]:
        described = [device["name"], device["capability"], device["memory"] and f"{device['memory']} GiB"]
        lines.append((device["device"], ", ".join(str(part) for part in described if part)))
    for name, value in (found["model"] or {}).items():
        value = ", ".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else value
        lines.append((f"model {name}", value))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the model cannot be described."""
    parser = argparse.ArgumentParser(
        prog="python -m flexpatch.env",
        description="Print versions, devices and a model's settings, for a bug report. Nothing is sent.",
        epilog="exit code: 0 done, 2 wrong usage, or the model cannot be described",
    )
    names = "hub name, directory, GGUF file or registered architecture to describe; no weights are read"
    parser.add_argument("model", metavar="NAME", nargs="?", help=names)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        found = report(None if options.model is None else patched(options.model))
    except Exception as error:  # errors of transformers and of drivers become one line too
        said = f"{type(error).__name__}: {first_line(error)}"
        print(f"flexpatch.env: could not describe {options.model or 'this machine'}: {said}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
