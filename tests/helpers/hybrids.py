"""Models whose mixers run on separate sequences: one of each kind, batches of any padding, and what a step gives."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import flexpatch
from flexpatch.fold import predicting_padding
from flexpatch.forward import hook_of
from flexpatch.internals import pretrained
from flexpatch.mixers import mixers_of
from flexpatch.models import tiny_model, tiny_types
from flexpatch.registry import adapter_for, adapters
from flexpatch.unshare import Unsharing
from helpers.oracle import random_ids

# Delta rule, and in a mixture of experts; state spaces of both kinds; state spaces whose mixers get no argument of a
# call; convolutions; attention that chooses its keys.
EVERY = ("qwen3_5_text", "qwen3_next", "nemotron_h", "jamba", "mamba", "lfm2", "deepseek_v32", "zaya")
KINDS = [kind for kind in EVERY if kind in tiny_types()]
# States that branch on the row; mamba2 gives its mixers no argument of a call.
BRANCHED = [f"{kind}, branched" for kind in ("qwen3_5_text", "mamba2", "lfm2") if adapters()[kind].branched]
# Whole batches are read at padding in front of a sequence too, unless attention is eager: see ``see_themselves``.
SIDES = ("none", "right", "left", "both")


def batch(side: str, seed: int = 0, swapped: bool = False) -> dict[str, Any]:
    """Five sequences of two prompts; equal lengths without padding, else of 13 to 31 tokens.

    ``swapped``: each prompt has the other's answers, which makes another row of equal length.
    """
    p, q, a, b, c, d = random_ids(20, 9, 7, 4, 11, 5, seed=seed)
    p, q = (q, p) if swapped else (p, q)
    sequences = [p + a, p + b, q + c, q + d, q + c[:3]]
    if side == "none":
        sequences = [p + each[:4] for each in (a, b, c, d, a)]
    columns = max(map(len, sequences)) + (0 if side == "none" else 6)
    ids, mask = torch.zeros(5, columns, dtype=torch.int64), torch.zeros(5, columns, dtype=torch.int64)
    for n, sequence in enumerate(sequences):
        start = {"left": columns - len(sequence), "both": 2}.get(side, 0)
        ids[n, start : start + len(sequence)] = torch.tensor(sequence)
        mask[n, start : start + len(sequence)] = 1
    call = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    return {name: value for name, value in call.items() if side != "none" or name != "attention_mask"}


def with_hole(call: dict[str, Any]) -> dict[str, Any]:
    """Two tokens less inside each sequence."""
    mask = call["attention_mask"].clone()
    mask[:, 8:10] = 0
    return call | {"attention_mask": mask}


def readable(call: dict[str, Any]) -> Tensor:
    """(N, S) bool: tokens, and padding that predicts one."""
    mask = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool().numpy()
    return torch.from_numpy(mask | predicting_padding(mask))


def loss_of(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A loss of log-probs with a weight of its own each, and all logits that may be read."""
    logits = model(**call).logits[readable(call)]
    logps = logits.log_softmax(-1)[:, 3:20]
    return (logps * torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype).view_as(logps)).sum(), logits.detach()


def gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector; they are taken from the model."""
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def step(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits that may be read, and the loss's gradient."""
    loss, logits = loss_of(model, call)
    loss.backward()
    return logits, gradient(model)


def apart(ours: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> float:
    """The largest distance of two results, over the norm of the true one."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, true, strict=True))


def unsharing_of(model: nn.Module) -> Unsharing:
    """The hooks of a patched model's mixers."""
    hook = hook_of(model)
    assert hook is not None and hook.unsharing is not None
    return hook.unsharing


def mixers(model: nn.Module) -> list[nn.Module]:
    """The mixers of a patched model that no mask can cut."""
    return list(mixers_of(model, adapter_for(pretrained(model).config).unshared))


def twins(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model, unpatched and patched."""
    model_type, _, branched = kind.partition(", ")
    stock = tiny_model(model_type, dtype=dtype)
    options |= dict(mixers=branched or "unshared")
    return stock, flexpatch.apply(copy.deepcopy(stock), **options)
