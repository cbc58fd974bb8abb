"""Compute log-probabilities of answers from their own positions, in chunks: no prompt logits, no (T, V) tensor.

Shapes: V vocabulary, T scored tokens, A answers, D hidden size, C tokens of a chunk.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from flexpatch.attention import many_recompiles
from flexpatch.calls import is_transformed
from flexpatch.errors import FlexpatchError
from flexpatch.fold import lookup
from flexpatch.internals import head_of, pretrained, text_config
from flexpatch.layouts import placeholders_of
from flexpatch.patch import model_inputs, settings_of
from flexpatch.registry import UNCHANGED, LogitTransform
from flexpatch.rows import Rows
from flexpatch.scoring import run_rows
from flexpatch.tree import Layout, Tree, lay_out
from flexpatch.tree_images import sequence_arguments

# Logits of a chunk, by default: 512 MiB in float32, and about five times that with what their gradient needs. Smaller
# chunks save little more and keep a GPU less busy.
CHUNK_LOGITS = 1 << 27
# Compiled, no float32 copy is made, and a trained head computes no logits twice if all are this few: 1 GiB in bfloat16.
CHUNK_LOGITS_COMPILED = 1 << 29


class AnswerLogprobs(NamedTuple):
    """Log-probabilities in nats, float32 (float64 for a float64 model).

    Attributes:
        answers: (A,) sums over each answer, in the order of the samples and their answers.
        tokens: (T,) one for each scored token, answer by answer.
    """

    answers: Tensor
    tokens: Tensor


def answer_logprobs(model: nn.Module, rows: Rows, *, chunk_tokens: int | None = None) -> AnswerLogprobs:
    """Compute the log-probability of every answer in ``rows``, each given its own ancestors alone.

    Args:
        model: A causal language model after :func:`flexpatch.apply`.
        rows: Packed rows on the model's device.
        chunk_tokens: As in :func:`token_logprobs`.

    Returns:
        Sums over answers (A,) and single tokens (T,), with gradients.

    Raises:
        FlexpatchError, UnsupportedModelError: As :func:`flexpatch.model_inputs`.
    """
    return score_rows(model, rows, model_inputs(model, rows), chunk_tokens=chunk_tokens)


def score_rows(
    model: nn.Module, rows: Rows, inputs: dict[str, Any], *, chunk_tokens: int | None = None
) -> AnswerLogprobs:
    """Compute the log-probability of every answer in ``rows`` from given inputs.

    Args:
        model: A causal language model after :func:`flexpatch.apply`.
        rows: Packed rows on the model's device.
        inputs: From :func:`flexpatch.model_inputs`; the verifier breaks their masks on purpose.
        chunk_tokens: As in :func:`token_logprobs`.

    Returns:
        Sums over answers (A,) and single tokens (T,), with gradients.

    Raises:
        FlexpatchError: For ``chunk_tokens < 1``, or a model whose hooks are gone.
    """
    head, transform = head_of(model)
    compiled = bool((settings_of(model) or {}).get("compile"))

    def score(hidden_BLD: Tensor) -> Tensor:
        hidden_TD = lookup(hidden_BLD.flatten(0, 1), rows.predictors)  # backward adds in a fixed order
        fused = compiled and hidden_TD.device.type != "cpu"
        return token_logprobs(
            head, hidden_TD, rows.targets, transform=transform, chunk_tokens=chunk_tokens, compiled=fused
        )

    tokens = run_rows(model, inputs, score)
    return AnswerLogprobs(sum_answers(tokens, rows), tokens)


def token_logprobs(
    head: nn.Module,
    hidden_TD: Tensor,
    targets_T: Tensor,
    *,
    transform: LogitTransform = UNCHANGED,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Compute the log-probability of each target from the hidden states that predict them.

    One chunk of logits exists at a time. If the head is frozen, a chunk's gradient by its hidden states is taken while
    its logits are there, for a log-prob depends on its own hidden state alone: nothing is computed twice. A head that
    is trained recomputes each chunk in backward. It is called as a module, so that its hooks (FSDP, DeepSpeed,
    adapters) run; one whose own weights are sharded takes all tokens in one chunk.

    Args:
        head: (C, D) -> (C, V): the model's output embeddings.
        hidden_TD: In the model's dtype.
        targets_T: (T,) int64.
        transform: The model's own change of the head's output.
        chunk_tokens: Tokens of a chunk; ``None``: as many as have 2^27 logits, compiled 2^29.
        compiled: Whether to compile the softmax: it then reads logits once, and no float32 copy of them is kept.

    Returns:
        (T,) in nats, float32 (float64 for float64 logits).

    Raises:
        FlexpatchError: For ``chunk_tokens < 1``.
    """
    parameters = list(head.parameters())
    if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise FlexpatchError(f"chunk_tokens={chunk_tokens!r}; expected a whole number from 1 on, or None")
    # Sharded heads (flat or empty parameters, DTensors, or none) are gathered by hooks at every call: ranks must call
    # equally often, and the hooks' bookkeeping expects one backward.
    whole = any(p.ndim == 2 for p in parameters)
    whole &= not any(isinstance(p, DTensor) or p.numel() == 0 for p in parameters)
    weight = getattr(head, "weight", None) if whole else None  # DeepSpeed gathers one that is read
    if weight is not None and weight.is_floating_point() and weight.dtype.itemsize < hidden_TD.dtype.itemsize:
        hidden_TD = hidden_TD.to(weight.dtype)  # as models do that keep their residuals in float32 (Mamba)
    logits = CHUNK_LOGITS_COMPILED if compiled else CHUNK_LOGITS
    size = chunk_tokens or max(1, logits // getattr(head, "out_features", 1 << 17))
    size = size if whole else max(1, len(hidden_TD))
    pick = _compiled(_pick_by_comparing) if compiled else _pick

    def score(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return pick(_logits(head, transform, hidden_CD), targets_C)

    chunks = list(zip(hidden_TD.split(size), targets_T.split(size), strict=True))
    trains = hidden_TD.requires_grad or any(p.requires_grad for p in parameters)
    if not torch.is_grad_enabled() or not trains or is_transformed(hidden_TD):  # torch.func takes no checkpoint
        return torch.cat([score(*chunk) for chunk in chunks])
    if whole and not any(p.requires_grad for p in parameters):
        slopes = _compiled(_slopes) if compiled else _slopes
        return _FrozenHead.apply(hidden_TD, targets_T, partial(_logits, head, transform), slopes, size)
    if len(chunks) == 1:
        return score(hidden_TD, targets_T)
    return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])


class _FrozenHead(torch.autograd.Function):
    """Log-probs of all chunks. Their gradients by the hidden states are taken in forward, for unit gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, logits_of: Any, slopes_of: Any, size: int) -> Tensor:
        slopes, tokens = [], []
        for hidden_CD, targets_C in zip(hidden_TD.split(size), targets_T.split(size), strict=True):
            hidden_CD = hidden_CD.detach().requires_grad_()
            with torch.enable_grad():
                logits_CV = logits_of(hidden_CD)
            tokens_C, slope_CV = slopes_of(logits_CV.detach(), targets_C)
            slopes += torch.autograd.grad(logits_CV, hidden_CD, slope_CV)
            tokens.append(tokens_C)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes_TD,) = ctx.saved_tensors
        return (slopes_TD * gradient_T[:, None]).to(slopes_TD.dtype), None, None, None, None


def _logits(head: nn.Module, transform: LogitTransform, hidden_CD: Tensor) -> Tensor:
    """Make logits as the model's own forward does, in its dtype."""
    logits_CV = _widen(head(hidden_CD)) if transform.wide else head(hidden_CD)
    if transform.scale != 1:
        logits_CV = logits_CV * transform.scale
    if transform.softcap is not None:
        logits_CV = torch.tanh(logits_CV / transform.softcap) * transform.softcap
    return logits_CV


def _pick(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Take the log softmax at each target, in at least float32."""
    wide_CV = _widen(logits_CV)
    return wide_CV.gather(-1, targets_C[:, None])[:, 0] - wide_CV.logsumexp(-1)


def _pick_by_comparing(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Compute :func:`_pick` for compilers, which would not fuse the backward of a gather."""
    wide_CV = _widen(logits_CV)
    return torch.where(_is_target(wide_CV, targets_C), wide_CV, 0.0).sum(-1) - wide_CV.logsumexp(-1)


def _slopes(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Take the log softmax at each target, and its derivative by the logits: onehot(target) - softmax."""
    wide_CV = _widen(logits_CV)
    sums_C = wide_CV.logsumexp(-1)
    own_CV = _is_target(wide_CV, targets_C)
    tokens_C = torch.where(own_CV, wide_CV, 0.0).sum(-1) - sums_C
    return tokens_C, (own_CV.to(wide_CV) - torch.exp(wide_CV - sums_C[:, None])).to(logits_CV.dtype)


def _is_target(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return torch.arange(logits_CV.shape[-1], device=logits_CV.device) == targets_C[:, None]


@cache
def _compiled(function: Any) -> Any:
    fused = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*tensors: Tensor) -> Any:
        with many_recompiles():
            return fused(*tensors)

    return call


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def separate_logprobs(
    model: nn.Module, trees: Sequence[Tree | Layout], *, pad_id: int = 0, batch_size: int | None = None
) -> AnswerLogprobs:
    """Compute log-probabilities the ordinary way: every answer with its prompt as a right-padded sequence of its own.

    It is the reference :func:`answer_logprobs` is checked against, and the ``--paired`` side of the example. On a
    patched model its batches fold like any others: for an independent reference call :func:`flexpatch.remove` first.

    Args:
        model: A causal language model.
        trees: The samples.
        pad_id: Id of padding tokens.
        batch_size: Sequences a call; ``None`` for all at once. Gemma 2 in float64 needs 1: for padding beyond a window
            transformers' eager attention gives NaN there.

    Returns:
        Sums over answers (A,) and single tokens (T,), in the order of :func:`answer_logprobs`.

    Raises:
        FlexpatchError: For a malformed tree (the message names the sample), an id or ``pad_id`` outside the vocabulary,
            or ``batch_size < 1``.
    """
    if batch_size is not None and batch_size < 1:
        raise FlexpatchError(f"batch_size={batch_size}; expected at least 1, or None")
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    layouts = [tree if isinstance(tree, Layout) else lay_out(tree, i) for i, tree in enumerate(trees)]
    vocabulary, config = text_config(model).vocab_size, pretrained(model).config
    known = [layout.ids[~np.isin(layout.ids, placeholders_of(config))] for layout in layouts]
    largest_ids = [(f"sample {x.sample}: id", int(ids.max(initial=0))) for x, ids in zip(layouts, known, strict=True)]
    for what, largest in [*largest_ids, ("pad_id", pad_id)]:
        if not 0 <= largest < vocabulary:
            raise FlexpatchError(f"{what} {largest} is outside the vocabulary of {vocabulary} tokens")
    sequences = [torch.from_numpy(layout.ids[path]) for layout in layouts for path in layout.answers]
    scored = [length for layout in layouts for length in layout.answer_lengths]
    each = [(layout, path) for layout in layouts for path in layout.answers]
    tokens: list[Tensor] = []
    size = batch_size or max(len(sequences), 1)
    for at in range(0, len(sequences), size):
        some = sequences[at : at + size]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad_id).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in some], batch_first=True).to(device)
        images = sequence_arguments(config, each[at : at + size], ids, dtype)
        logits_NSV = model(input_ids=ids, attention_mask=mask, use_cache=False, **images).logits
        for logits_SV, sequence, count in zip(logits_NSV, some, scored[at : at + size], strict=True):
            stop = len(sequence)
            sources = torch.arange(stop - count - 1, stop - 1, device=device)
            tokens.append(_pick(logits_SV[sources], sequence[stop - count :].to(device)))
    none = torch.zeros(1, device=device)[:0]
    return AnswerLogprobs(torch.stack([t.sum() for t in tokens]) if tokens else none, torch.cat(tokens or [none]))


def sum_answers(tokens: Tensor, rows: Rows) -> Tensor:
    """Add up token values, answer by answer, with equal bits in every run, also on CUDA.

    Args:
        tokens: (T,), one for each scored token.
        rows: The rows that they belong to.

    Returns:
        (A,) sums.
    """
    lengths_A = (rows.answer_tokens < len(tokens)).sum(-1)
    return torch.segment_reduce(tokens, "sum", lengths=lengths_A, unsafe=True)
