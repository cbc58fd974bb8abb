"""Log-probabilities of answers, from answer positions alone, in chunks: no prompt logits, no (T, V) tensor.

Shapes: V vocabulary, T scored tokens, A answers, D hidden size, C tokens of a chunk.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flexpatch.errors import FlexpatchError
from flexpatch.patch import head_of, model_inputs, run_rows
from flexpatch.registry import PLAIN, Adapter, Head
from flexpatch.tree import Layout, Rows, Tree, lay_out

# Logits of a chunk, by default: 512 MiB in float32, and about five times that with what their gradient needs. Smaller
# chunks save little more and keep a GPU less busy.
CHUNK_LOGITS = 1 << 27


class AnswerLogprobs(NamedTuple):
    """Log-probabilities in nats, float32 (float64 for a float64 model).

    Attributes:
        answers: (A,) sums over each answer, in the order of the samples and their answers.
        tokens: (T,) one for each scored token, answer by answer.
    """

    answers: Tensor
    tokens: Tensor


def answer_logprobs(
    model: nn.Module, rows: Rows, *, chunk_tokens: int | None = None, adapter: Adapter | None = None
) -> AnswerLogprobs:
    """Log-probabilities of every answer in ``rows``, each given its own ancestors alone.

    Args:
        model: A causal language model after :func:`flexpatch.apply`.
        rows: Packed rows on the model's device.
        chunk_tokens: As in :func:`token_logprobs`.
        adapter: See :func:`flexpatch.patch.model_inputs`.

    Raises:
        FlexpatchError, UnsupportedModelError: As :func:`flexpatch.patch.model_inputs`.
    """
    inputs = model_inputs(model, rows, adapter=adapter)
    head, form = head_of(model)

    def score(hidden_BLD: Tensor) -> Tensor:
        hidden_TD = F.embedding(rows.sources, hidden_BLD.flatten(0, 1))  # its backward adds in a fixed order
        return token_logprobs(head, hidden_TD, rows.targets, form=form, chunk_tokens=chunk_tokens)

    tokens = run_rows(model, inputs, score)
    return AnswerLogprobs(sum_answers(tokens, rows), tokens)


def token_logprobs(
    head: nn.Module, hidden_TD: Tensor, targets_T: Tensor, *, form: Head = PLAIN, chunk_tokens: int | None = None
) -> Tensor:
    """Log-probability of each target, from the hidden states that predict them.

    One chunk of logits exists at a time. If the head is frozen, a chunk's gradient by its hidden states is taken while
    its logits are there, for a log-prob depends on its own hidden state alone: nothing is computed twice. A head that
    is trained computes each chunk again in backward. It is called as a module, so that its hooks (FSDP, DeepSpeed,
    adapters) run.

    Args:
        head: (C, D) -> (C, V): the model's output embeddings.
        hidden_TD: In the model's dtype.
        targets_T: (T,) int64.
        form: What the model does to the head's output.
        chunk_tokens: Tokens of a chunk; ``None``: as many as have 2^27 logits.

    Returns:
        (T,) in nats, float32 (float64 for float64 logits).

    Raises:
        FlexpatchError: For ``chunk_tokens < 1``.
    """
    parameters = list(head.parameters())
    if chunk_tokens is not None and chunk_tokens < 1:
        raise FlexpatchError(f"chunk_tokens={chunk_tokens}; expected at least 1, or None")
    size = chunk_tokens or max(1, CHUNK_LOGITS // getattr(head, "out_features", 1 << 17))
    # Sharded heads are gathered by hooks, whose bookkeeping expects one backward.
    whole = not any(isinstance(p, DTensor) or p.numel() == 0 for p in parameters)
    if not torch.is_grad_enabled() or not (hidden_TD.requires_grad or any(p.requires_grad for p in parameters)):
        chunks = [_picked(_logits(head, form, h), t) for h, t in _chunks(size, hidden_TD, targets_T)]
        return torch.cat(chunks)
    if whole and not any(p.requires_grad for p in parameters):
        return _FrozenHead.apply(hidden_TD, targets_T, partial(_logits, head, form), size)
    if len(hidden_TD) <= size:
        return _picked(_logits(head, form, hidden_TD), targets_T)

    def again(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return _picked(_logits(head, form, hidden_CD), targets_C)

    return torch.cat([checkpoint(again, h, t, use_reentrant=False) for h, t in _chunks(size, hidden_TD, targets_T)])


class _FrozenHead(torch.autograd.Function):
    """Log-probs of all chunks, with their gradients by the hidden states taken in forward, for unit gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, logits_of: Any, size: int) -> Tensor:
        slopes_TD = torch.empty_like(hidden_TD)
        tokens = []
        for start in range(0, len(hidden_TD), size):
            hidden_CD, targets_C = hidden_TD[start : start + size].detach(), targets_T[start : start + size]
            with torch.enable_grad():
                logits_CV = logits_of(hidden_CD.requires_grad_())
            wide_CV = _widen(logits_CV.detach())
            sums_C = wide_CV.logsumexp(-1)
            tokens.append(wide_CV.gather(-1, targets_C[:, None])[:, 0] - sums_C)
            # d log p(target) / d logits = onehot(target) - softmax
            slope_CV = torch.exp(wide_CV - sums_C[:, None]).neg_()
            slope_CV.scatter_add_(-1, targets_C[:, None], slope_CV.new_ones(len(targets_C), 1))
            slopes_TD[start : start + size] = torch.autograd.grad(logits_CV, hidden_CD, slope_CV.to(logits_CV.dtype))[0]
        ctx.save_for_backward(slopes_TD)
        return torch.cat(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes_TD,) = ctx.saved_tensors
        return (slopes_TD * gradient_T[:, None]).to(slopes_TD.dtype), None, None, None


def _chunks(size: int, *tensors: Tensor) -> Any:
    return zip(*(x.split(size) for x in tensors), strict=True)


def _logits(head: nn.Module, form: Head, hidden_CD: Tensor) -> Tensor:
    """As the model's own forward makes them, in its dtype."""
    logits_CV = head(hidden_CD)
    if form.scale != 1:
        logits_CV = logits_CV * form.scale
    if form.softcap is not None:
        logits_CV = torch.tanh(logits_CV / form.softcap) * form.softcap
    return logits_CV


def _picked(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """log softmax at each target, in at least float32."""
    wide_CV = _widen(logits_CV)
    return wide_CV.gather(-1, targets_C[:, None])[:, 0] - wide_CV.logsumexp(-1)


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def separate_logprobs(
    model: nn.Module, trees: Sequence[Tree | Layout], *, pad_id: int = 0, batch_size: int | None = None
) -> AnswerLogprobs:
    """The same numbers the ordinary way: every answer with its prompt as a sequence of its own, right-padded.

    It is the reference :func:`answer_logprobs` is checked against, and the ``--paired`` side of the example. On a
    patched model its batches fold like any others: for an independent reference call :func:`flexpatch.remove` first.

    Args:
        model: A causal language model.
        trees: The samples.
        pad_id: Id of padding tokens.
        batch_size: Sequences a call; ``None`` for all at once. Gemma 2 in float64 needs 1: for padding beyond a window
            transformers' eager attention gives NaN there.

    Raises:
        FlexpatchError: For a malformed tree (the message names the sample).
    """
    device = next(model.parameters()).device
    layouts = [tree if isinstance(tree, Layout) else lay_out(tree, i) for i, tree in enumerate(trees)]
    sequences = [torch.from_numpy(layout.ids[path]) for layout in layouts for path in layout.answers]
    scored = [length for layout in layouts for length in layout.answer_lengths]
    tokens: list[Tensor] = []
    size = batch_size or len(sequences)
    for at in range(0, len(sequences), size):
        some = sequences[at : at + size]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad_id).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in some], batch_first=True).to(device)
        logits_NSV = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for logits_SV, sequence, count in zip(logits_NSV, some, scored[at : at + size], strict=True):
            stop = len(sequence)
            sources = torch.arange(stop - count - 1, stop - 1, device=device)
            tokens.append(_picked(logits_SV[sources], sequence[stop - count :].to(device)))
    return AnswerLogprobs(torch.stack([t.sum() for t in tokens]), torch.cat(tokens))


def sum_answers(tokens: Tensor, rows: Rows) -> Tensor:
    """(T,) token values, answer by answer, to (A,) sums. Not an index_add: the same bits in every run on CUDA."""
    lengths_A = (rows.answer_tokens < len(tokens)).sum(-1)
    return torch.segment_reduce(tokens, "sum", lengths=lengths_A, unsafe=True)
