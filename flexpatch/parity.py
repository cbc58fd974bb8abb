"""Check that a patched model computes the same as the unpatched one.

Three independent checks, on the device, in the dtype and under the checkpointing setting that will be trained with:

1. **Leak**, no tolerance: change every token of one answer; no logit outside it may change by a single bit. In a
   mixture of experts a token's routing alters the shapes of other tokens' matrix products, and with them the rounding;
   there the derivative of all outside logits by the answer's embeddings must be exactly zero.
2. **Log-probs** of every answer token, in one packed row, in several padded ones and in folded batches, against
   separate runs.
3. **Gradients** of the DPO loss by all trainable parameters, against separate runs.

The unpatched model is the oracle. In float64 the two are compared directly: ours may be off by a stated multiple of
what the stock model is off itself in batches of another shape, or by a floor. On a CPU all float32 steps within the
model are lifted to float64, so the floor serves every architecture. Where they cannot be lifted, a float32 softmax
counts as the stock model's own error too, because FlexAttention has none.

In lower precision both are compared with the same weights in float64 (the truth; float32 for 16-bit models whose
float64 copy does not fit into memory), and ours may be off by no more than a stated multiple of what stock is.

Each check is repeated with a mask, positions or a mixer's states broken on purpose (the negative controls), and must
then fail, in float64 by a thousand bounds. If a model's own error makes its bounds so wide that a broken mask does not,
the report fails: it would show nothing. Mixers that are branched are also compared with themselves on separate
sequences.
"""

from importlib import metadata
from typing import Any

import torch
import transformers
from torch import nn

from flexpatch.attention import flex
from flexpatch.errors import FlexpatchError, UnsupportedModelError
from flexpatch.float64 import checkpoints
from flexpatch.internals import head_of, pretrained
from flexpatch.masks import block_mask
from flexpatch.patch import apply, backend_of, remove, settings_of
from flexpatch.picture_checks import PictureVerification, takes_images
from flexpatch.registry import adapter_for
from flexpatch.report import Check, Report
from flexpatch.trials import has_adapters
from flexpatch.verification import Verification

__all__ = ["Check", "Report", "check_parity"]


def check_parity(
    model: nn.Module,
    *,
    name: str | None = None,
    backend: str = "auto",
    compile: bool = False,
    mixers: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Run all checks on a model as it is: its device, dtype, adapters, mode and checkpointing.

    The model is left as it was found, patched or not; its gradients are cleared.

    Args:
        model: A causal language model of a supported architecture, bare or wrapped by peft.
        name: What to call it in the report.
        backend, compile, mixers: As in :func:`flexpatch.apply`.
        seed: Of the token ids.
        progress: Show a progress bar on stderr.

    Returns:
        All checks and negative controls, with errors and bounds; ``report.passed`` tells whether parity holds.

    Raises:
        UnsupportedModelError: If the model cannot be patched, or has no log-probs: classifiers, bare backbones.
        FlexpatchError: If ``model`` is none, or ``backend`` and ``compile`` cannot run where it is; if its weights or
            log-probs are not finite, or the float64 truth does not fit into memory.
    """
    _check_model(model)
    before = settings_of(model)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would hide a wrong mask behind its rounding
    try:
        model.zero_grad(set_to_none=True)  # each pass clears its own after reading them
        options: dict[str, Any] = dict(backend=backend, compile=compile, mixers=mixers)
        _check_options(model, **options)
        remove(model)
        report = Report(name or type(model).__name__, _settings(model))
        Verification(model, report, options, seed, progress).run()
        if takes_images(model):
            remove(model)
            PictureVerification(model, report, options, seed, progress).run()
        return report
    finally:
        torch.set_float32_matmul_precision(precision)
        model.zero_grad(set_to_none=True)
        remove(model) if before is None else apply(model, **before)


def _check_model(model: Any) -> None:
    """Refuse what has no log-probs to compare."""
    if not isinstance(model, nn.Module):
        shown = repr(model).partition("\n")[0][:60]  # processors fill pages
        given = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {shown}"
        raise FlexpatchError(
            f"check_parity expects a loaded causal language model, and got {given}. By its name or folder a model is "
            "verified with: python -m flexpatch.verify NAME"
        )
    adapter_for(pretrained(model).config)
    try:
        head_of(model)
    except UnsupportedModelError:
        raise
    except FlexpatchError:
        raise UnsupportedModelError(
            f"check_parity compares log-probs, and {type(model).__name__} has no language model head to make them. "
            "Folding changes the backbone alone: verify the causal model of the same checkpoint and settings "
            "(AutoModelForCausalLM), which has the same one"
        ) from None


def _check_options(model: nn.Module, backend: str, compile: bool, mixers: str) -> None:
    """Refuse what could not be verified where the model is, before anything runs."""
    backend = backend_of(apply(model, backend=backend, compile=compile, mixers=mixers))
    if backend == "dense" and compile:
        raise FlexpatchError(
            "compile=True compiles layers of the flex backend alone, and this model's rows run on the dense one: "
            "nothing would be compiled, so nothing verified. Verify it on a GPU, or without compile"
        )
    device = next(model.parameters()).device
    if backend != "dense" and device.type == "cpu":
        one = torch.ones(1, 1, 1, 16, device=device, requires_grad=True)
        ends = torch.ones(1, 1, dtype=torch.int64, device=device)
        flex(one, one, one, block_mask(ends, ends - 1, None))  # raises where flex cannot train


def _settings(model: nn.Module) -> dict[str, str]:
    """Describe the model and its device for the report."""
    parameter = next(model.parameters())
    device = parameter.device
    settings = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    if has_adapters(model):
        settings["peft"] = metadata.version("peft")
    if checkpoints(model):
        settings["checkpointing"] = "on"
    return settings
