"""What sharing does to a model with quantized layers, measured."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flexpatch
from flexpatch import UnsupportedModelError, refusals
from flexpatch.models import TINY, tiny_model
from flexpatch.quantizers import check_quantization

WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32)  # quantizers want blocks of 32 or 64
# Allowed multiple of what stock is off itself, when the last bits of its embeddings differ.
FACTOR = 2.0


def model_of(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.models.TINY", TINY | WIDE)
        return tiny_model(model_type, dtype=dtype).eval()


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that quantizers take: all but the head."""
    return ((n, m) for n, m in list(model.named_modules()) if isinstance(m, nn.Linear) and "lm_head" not in n)


def inner_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def batch(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and mask (4, 57) of two prompts with two answers each."""
    generator = torch.Generator().manual_seed(0)
    p, q, *answers = (torch.randint(3, 151, (n,), generator=generator) for n in (40, 30, 11, 17, 9, 14))
    samples = [torch.cat([prompt, answer]) for prompt, answer in zip((p, p, q, q), answers, strict=True)]
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)


ANSWERS = slice(39, None)  # what predicts tokens of the first prompt's answers


def logprobs(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]


def apply_unchecked(model: nn.Module) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flexpatch.patch.check_quantization", lambda model: None)
        flexpatch.apply(model)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What sharing does to log-probs, in nats: means over tokens."""

    error: float  # folded against stock
    own: float  # stock against stock, with other last bits in the embeddings
    leak: float  # the largest change of one answer by another one's tokens


@torch.no_grad()
def sharing(model: nn.Module) -> Sharing:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refusals, "layer_fault", lambda layer: None)
        ids, mask = batch(model.device)
        stock = logprobs(model, ids, mask)
        embeddings = model.get_input_embeddings().weight
        kept, own = embeddings.clone(), []
        for seed in range(4):
            noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed), dtype=kept.dtype).to(kept)
            embeddings.copy_(kept * (1 + 2 * torch.finfo(kept.dtype).eps * noise))
            own.append(float((logprobs(model, ids, mask) - stock).abs().mean()))
        embeddings.copy_(kept)
        apply_unchecked(model)
        folded = logprobs(model, ids, mask)
        assert flexpatch.savings(model).folded == 1
        leak = 0.0
        for shift in (20, 45, 70, 95, 120):  # not every token is the one with the largest activation
            changed = ids.clone()
            changed[1, 41:57] = (ids[1, 41:57] + shift - 3) % 148 + 3
            leak = max(leak, float((logprobs(model, changed, mask)[0] - folded[0]).abs().max()))
        flexpatch.remove(model)
        return Sharing(float((folded - stock).abs().mean()), max(own), leak)


def keeps_apart(model: nn.Module) -> None:
    check_quantization(model)
    found = sharing(model)
    assert found.leak == 0
    assert found.error <= FACTOR * found.own, found


def leaks(model: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        flexpatch.apply(model)
    found = sharing(model)
    assert found.leak > 1e-3, found


def gradient(model: nn.Module) -> Tensor:
    """Of a DPO loss by all parameters, on the CPU in float64."""
    ids, mask = batch(model.device)
    answers = logprobs(model, ids, mask)[:, ANSWERS].sum(-1)
    model.zero_grad(set_to_none=True)
    (-F.logsigmoid(0.1 * (answers[::2] - answers[1::2]))).sum().backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


def rounds_no_more(model: nn.Module) -> None:
    """Gradients of a shared token are rounded as a sum. They are no further from unrounded ones than stock's."""
    keeps_apart(model)
    truth = gradient(model_of(dtype=torch.float64))
    model.train()
    stock = (gradient(model) - truth).norm()
    flexpatch.apply(model)
    folded = (gradient(model) - truth).norm()
    assert flexpatch.savings(model).folded == 1
    assert 0 < folded <= 1.5 * stock
