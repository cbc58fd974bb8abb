"""Log-probabilities of answers, from answer positions alone: prompt logits are never computed.

Shapes: V vocabulary, T scored tokens, A answers, K distinct tokens that predict a scored one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexpatch.patch import model_inputs
from flexpatch.registry import Adapter
from flexpatch.tree import Layout, Rows, Tree, lay_out


class AnswerLogprobs(NamedTuple):
    """Log-probabilities in nats, float32 (float64 for a float64 model).

    Attributes:
        answers: (A,) sums over each answer, in the order of the samples and their answers.
        tokens: (T,) one for each scored token, answer by answer.
    """

    answers: Tensor
    tokens: Tensor


def answer_logprobs(model: nn.Module, rows: Rows, *, adapter: Adapter | None = None) -> AnswerLogprobs:
    """Log-probabilities of every answer in ``rows``, each given its own ancestors alone.

    Args:
        model: A causal language model after :func:`flexpatch.apply`.
        rows: Packed rows on the model's device. One row a call is best: with several, logits are computed at the
            union of their answer positions.
        adapter: See :func:`flexpatch.patch.model_inputs`.

    Raises:
        FlexpatchError, UnsupportedModelError: As :func:`flexpatch.patch.model_inputs`.
    """
    # logits_to_keep as a tensor of columns, not a count: a count would keep prompts, and Gemma 4 slices masks by it.
    logits_BKV = model(**model_inputs(model, rows, adapter=adapter), logits_to_keep=rows.columns).logits
    tokens = _token_logprobs(logits_BKV.flatten(0, 1), rows.logit_of_token, rows.targets)
    return AnswerLogprobs(sum_answers(tokens, rows), tokens)


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
            tokens.append(_token_logprobs(logits_SV, sources, sequence[stop - count :].to(device)))
    return AnswerLogprobs(torch.stack([t.sum() for t in tokens]), torch.cat(tokens))


def _token_logprobs(logits_KV: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """log softmax of ``logits[source]`` at each target, in at least float32."""
    logits_TV = logits_KV[sources]
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    return logits_TV.gather(-1, targets[:, None])[:, 0] - logits_TV.logsumexp(-1)


def sum_answers(tokens: Tensor, rows: Rows) -> Tensor:
    """(T,) token values to (A,) sums. A gather and not an index_add: the same bits in every run on CUDA."""
    return torch.cat([tokens, tokens.new_zeros(1)])[rows.answer_tokens].sum(-1)
