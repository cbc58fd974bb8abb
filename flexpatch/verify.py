"""``python -m flexpatch.verify MODEL``: the command line of :func:`flexpatch.check_parity`."""

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import peft
import torch
import transformers
from torch import nn

from flexpatch.branching import WAYS
from flexpatch.errors import FlexpatchError, UnsupportedModelError, first_line
from flexpatch.models import check_architecture, load_model, similar_architecture, tiny_model, tiny_types, variants
from flexpatch.parity import Report, check_parity
from flexpatch.registry import adapters


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 parity holds, 1 parity fails, 2 could not be run."""
    options = _parser().parse_args(argv)
    reports = []
    adapters()  # here, because warnings of other packages' adapters are silenced below
    with _quiet():
        try:
            for name, model in _models(options):
                model = _prepared(model, options)
                progress = sys.stderr.isatty()
                report = check_parity(
                    model, name=name, backend=options.backend, compile=options.compile, mixers=options.mixers,
                    seed=options.seed, progress=progress,
                )  # fmt: skip
                reports.append(report)
                if not options.json:
                    print(_line(report) if options.model == "all" else f"{report}\n", flush=True)
        except KeyboardInterrupt:
            print("flexpatch.verify: interrupted", file=sys.stderr)
            return 2
        except Exception as error:  # errors of transformers, peft or a driver are told in one line too
            said = f"{type(error).__name__}: {first_line(error)}"
            print(f"flexpatch.verify: could not verify {options.model}: {said}", file=sys.stderr)
            return 2
    if options.json:
        print(json.dumps([report.as_dict() for report in reports], indent=1))
    elif options.model == "all":
        settings = " · ".join(f"{key} {value}" for key, value in reports[0].settings.items())
        print(f"\n{sum(report.passed for report in reports)} of {len(reports)} models hold parity\n{settings}")
    return 0 if all(report.passed for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexpatch.verify",
        description="Check that a patched model gives the log-probs and gradients of the unpatched one.",
        epilog="exit code: 0 parity holds, 1 parity fails, 2 could not be run",
    )
    add = parser.add_argument
    add(
        "model",
        help="hub name, local directory, GGUF file, registered architecture (tiny random models of all its variants), "
        "or 'all' for all registered architectures",
    )
    dtypes = ["auto", "float64", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: float64 for tiny models on the CPU, else float32")
    add("--device", default="auto", help="auto: cuda if available, else cpu")
    add("--compile", action="store_true", help="compile decoder layers (flex backend)")
    add(
        "--backend",
        default="auto",
        choices=["auto", "flex", "fa4", "dense"],
        help="auto: flex on cuda and xpu, else dense",
    )
    add("--mixers", default="auto", choices=WAYS, help="how layers run that no mask can cut (scans, convolutions)")
    add("--lora", action="store_true", help="train random LoRA adapters on all linear layers")
    kinds = ["non-reentrant", "reentrant"]
    add("--gradient-checkpointing", nargs="?", const=kinds[0], choices=kinds, help="train with gradient checkpointing")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    add("--allow-pickle", action="store_true", help="read weights that are pickles, which may run code")
    add("--seed", type=int, default=0, help="seed of token ids and random weights (%(default)s)")
    add("--json", action="store_true", help="print the reports as JSON")
    return parser


def _models(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """Load the models to verify, one at a time, with their names."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    known = tiny_types()
    types = known if options.model == "all" else [options.model] * (options.model in known)
    tiny = bool(types) and not os.path.isdir(options.model)
    default = torch.float64 if tiny and torch.device(device).type == "cpu" else torch.float32
    default = torch.bfloat16 if options.backend == "fa4" else default
    dtype = default if options.dtype == "auto" else getattr(torch, options.dtype)
    if not tiny:
        yield options.model, _loaded(options, dtype).to(device)
        return
    for model_type in types:
        count = len(variants(model_type))
        for variant in range(count):
            model = tiny_model(model_type, variant, dtype=dtype, seed=options.seed).to(device)
            yield f"{model_type} (tiny random model {variant + 1} of {count})", model


def _loaded(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """Load the model of a hub, directory or file. If a bare name fails, suggest an architecture of a similar name."""
    bare = not os.path.exists(options.model) and os.sep not in options.model
    if bare:
        check_architecture(options.model)
    try:
        return load_model(
            options.model, dtype, trust_remote_code=options.trust_remote_code, allow_pickle=options.allow_pickle
        )
    except UnsupportedModelError:
        raise
    except FlexpatchError as error:
        like = similar_architecture(options.model) if bare else None
        raise FlexpatchError(f"{error}{f'; did you mean the architecture {like}?' if like else ''}") from error


def _prepared(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Add the adapters and the checkpointing that the command line asks for."""
    if options.gradient_checkpointing:
        reentrant = options.gradient_checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
    if options.lora:
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(options.seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, which would leave lora_A without gradients
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _line(report: Report) -> str:
    """Sum up the report of one model in one line."""
    worst = {}
    for kind in ("leak", "log-probs", "gradients"):
        worst[kind] = max(
            check.error for check in report.checks if check.margin is None and check.name.startswith(kind)
        )
    caught = min((c.error / c.bound for c in report.checks if c.margin and c.bound), default=math.nan)
    return (
        f"{report.model:<42} leak {worst['leak']:.0f}  log-probs {worst['log-probs']:.1e}  gradients "
        f"{worst['gradients']:.1e}  controls >= {caught:.0e} x bound  {'ok' if report.passed else 'FAILS'}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and progress bars of other libraries."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.enable_progress_bar()
        logging.disable(disabled)


if __name__ == "__main__":
    sys.exit(main())
