"""Padding that predicts a token, through compiled kernels: such a query may see nothing at all, or not itself."""

import copy

import pytest
import torch
from parameterized import parameterized
from torch import Tensor, nn

import flexpatch
from flexpatch.internals import eager_experts
from flexpatch.models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
DEVICE = torch.device("cuda")
KINDS = [("llama", 0), ("mistral", 1), ("gemma2", 0), ("gemma3_text", 0), ("gpt_oss", 0)]
# In front of a sequence, and in a hole longer than a window, eager attention averages over the whole row of a batch:
# in the first case there is nothing to compare with, in the second the batch runs as it was given.
EAGER = ("gemma2", "gpt_oss")


def batch(left: bool) -> dict[str, Tensor]:
    """Prompts of 400 and 150 tokens with four completions each. The shorter prompt is padded on the left, or on the
    right, between it and its completions."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.zeros(8, 490, dtype=torch.int64), torch.zeros(8, 490, dtype=torch.int64)
    for n in range(8):
        if n % 4 == 0:
            prompt = torch.randint(3, 151, (400 if n == 0 else 150,), generator=generator)
        length = (90, 17, 60, 1)[n % 4]
        at = slice(400 - len(prompt), 400) if left else slice(0, len(prompt))
        for span, run in (
            (at, prompt),
            (slice(400, 400 + length), torch.randint(3, 151, (length,), generator=generator)),
        ):
            ids[n, span], mask[n, span] = run, 1
    return dict(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE))


def run(model: nn.Module, left: bool, read: Tensor) -> list[Tensor]:
    """Log-probs of all tokens, and their sum's gradient."""
    inputs = batch(left)
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0][read]
    logps.sum().backward()
    return [logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()]


@parameterized.expand([(*kind, left) for kind in KINDS for left in (False, True)])
def test_as_close_to_the_truth_as_the_unpatched_model(model_type: str, variant: int, left: bool) -> None:
    model = tiny_model(model_type, variant, dtype=torch.float32).to(DEVICE).train()
    mask = batch(left)["attention_mask"].bool()
    read = mask[:, 1:] & (mask[:, :-1] if left and model_type in EAGER else True)
    predicting = (read & ~mask[:, :-1])[read]
    assert predicting.any() or (left and model_type in EAGER)
    truth, stock = run(eager_experts(copy.deepcopy(model).double()), left, read), run(model, left, read)
    ours = run(flexpatch.apply(model), left, read)
    assert flexpatch.savings(model).folded == (left or model_type not in EAGER)
    for true, theirs, mine in zip(truth, stock, ours, strict=True):
        assert mine.isfinite().all()
        if not true.isfinite().all():  # in float64 eager attention gives NaN for padding that a window leaves keyless
            true = theirs
        assert (mine - true).norm() <= max(2 * float((theirs - true).norm()), 1e-5 * float(theirs.norm()))
    if predicting.any():
        assert (ours[0] - stock[0])[predicting].abs().max() < 1e-3


def test_padding_that_sees_other_tokens_is_noticed() -> None:
    """The control: the token's log-prob, read where another sequence ends."""
    model = tiny_model("llama", dtype=torch.float32).to(DEVICE)
    mask = batch(False)["attention_mask"].bool()
    read = mask[:, 1:]
    stock = run(model, False, read)[0]
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("flexpatch.fold.predicting_padding", lambda mask: mask & False)
        ours = run(flexpatch.apply(model), False, read)[0]
    assert (ours - stock)[(read & ~mask[:, :-1])[read]].abs().max() > 0.01
