"""Make the inputs and measures of a verification: trees, their loss, other batches of them, broken rows, errors."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexpatch.errors import FlexpatchError
from flexpatch.internals import is_torchao, pretrained
from flexpatch.layouts import media_of
from flexpatch.logprobs import AnswerLogprobs, separate_logprobs
from flexpatch.rows import Rows
from flexpatch.tree import Tree, lay_out

BETA = 0.1

Gradients = dict[str, Tensor]


def sample_trees(reach: int, vocabulary: int, generator: torch.Generator, turns: bool = True) -> list[Tree]:
    """Draw trees with uneven answers, one-token runs, a nested level, and answers that begin alike.

    Args:
        reach: Tokens that the first prompt exceeds, so that windows cut it and index distances differ from position
            distances.
        vocabulary: Ids are drawn from 3 to this, exclusive.
        generator: Of the ids.
        turns: Whether a tree may have prompts behind answers.

    Returns:
        Four trees.
    """

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    prompt, chosen, rejected = ids(reach + 40), ids(29), ids(11)
    # Nothing of the chosen answer is shared, so the leak check may change all of it.
    rejected[0] = (chosen[0] - 2) % (vocabulary - 3) + 3
    like = ids(6)
    replies = [Tree(ids(6)), Tree(ids(7))]
    nested = [Tree(ids(4), replies, answer=False)]
    return [
        Tree.of(prompt, chosen, rejected),
        Tree.of(ids(1), ids(1), ids(35), ids(3)),
        Tree(ids(12), [Tree(ids(5), nested if turns else replies, answer=True)]),
        Tree.of(ids(17), like + ids(4), like + ids(9), like),
    ]


def in_one_batch(model: nn.Module, trees: Sequence[Tree]) -> AnswerLogprobs:
    """Compute log-probs as :func:`flexpatch.logprobs.separate_logprobs` does, in one batch of all sequences.

    Without images none is padded: each is continued with its own tokens to the length of the longest, and no token
    sees later ones.

    Args:
        model: A causal language model.
        trees: The samples.

    Returns:
        Sums over answers and single tokens.
    """
    layouts = [lay_out(tree, sample) for sample, tree in enumerate(trees)]
    record = media_of(pretrained(model).config)
    if any(layout.images for layout in layouts) or (record is not None and record.text_blocks):
        return separate_logprobs(model, trees)  # placeholders and prompts that see ahead cannot be repeated
    sequences = [torch.from_numpy(layout.ids[path]) for layout in layouts for path in layout.answers]
    scored = [length for layout in layouts for length in layout.answer_lengths]
    longest = max(map(len, sequences))
    ids = torch.stack([sequence.repeat(-(-longest // len(sequence)))[:longest] for sequence in sequences])
    logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    tokens = []
    for logits_SV, sequence, count in zip(logits, sequences, scored, strict=True):
        stop = len(sequence)
        targets = sequence[stop - count :].to(logits_SV.device)
        logps = logits_SV[stop - count - 1 : stop - 1].log_softmax(-1)
        tokens.append(logps.gather(-1, targets[:, None])[:, 0])
    return AnswerLogprobs(torch.stack([each.sum() for each in tokens]), torch.cat(tokens))


def dpo(answers: Tensor, reference: Tensor) -> Tensor:
    """Compute the DPO loss of one sample: its first answer chosen over each other, summed.

    Args:
        answers: (A,) log-probs of its answers, in nats.
        reference: (A,) log-probs under the reference.

    Returns:
        A scalar.
    """
    rewards = BETA * (answers - reference.to(answers))
    return -F.logsigmoid(rewards[:1] - rewards[1:]).sum()


def derivatives(model: nn.Module, inputs: dict[str, Any], inside: Tensor) -> float:
    """Count tokens by which some logit of others has a derivative other than zero.

    Args:
        model: A patched model.
        inputs: Of rows.
        inside: (B, L) bool, the tokens.

    Returns:
        How many of them.
    """
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    try:
        logits = model(**inputs).logits[~inside]
    finally:
        hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (logits * weights).sum().backward()
    model.zero_grad(set_to_none=True)
    gradient = embedded[0].grad
    assert gradient is not None
    return float((gradient[:, : inside.shape[1]][inside] != 0).any(-1).sum())  # compiled rows are padded


def whole_trees(rows: Rows) -> Tensor:
    """Make the ends (B, L) of naive packing, where every token of a tree sees all tokens before it."""
    roots = torch.where(rows.position_ids == 0, torch.arange(rows.ends.shape[1], device=rows.ends.device), 0)
    return rows.ends.gather(-1, roots.cummax(-1).values)


def worst_error(ours: Tensor, oracle: Tensor) -> float:
    """Measure the largest difference of log-probs.

    Args:
        ours: (T,) log-probs.
        oracle: (T,) log-probs.

    Returns:
        Nats.
    """
    return float((ours.double() - oracle.double()).abs().max())


def distance(ours: Gradients, oracle: Gradients) -> tuple[float, str]:
    """Measure the difference of gradients over all parameters together.

    Args:
        ours: Gradients by parameter.
        oracle: Gradients by parameter.

    Returns:
        ||ours - oracle|| / ||oracle||, and the parameter that adds most to it.
    """
    squares = {name: float((ours[name].double() - oracle[name].double()).square().sum()) for name in oracle}
    norm = sum(float(gradient.double().square().sum()) for gradient in oracle.values())
    return math.sqrt(sum(squares.values()) / norm), max(squares, key=lambda name: squares[name])


def take_gradients(model: nn.Module) -> Gradients:
    """Move the gradients of all trainable parameters to the CPU, and clear them on the model.

    Raises:
        FlexpatchError: If no parameter has one.
    """
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    if not gradients:
        raise FlexpatchError("no parameter of the model got a gradient; unfreeze some, or add LoRA adapters")
    return gradients


def has_adapters(model: nn.Module) -> bool:
    """Tell whether peft wraps ``model``. peft is not imported for it: who has such a model has imported it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        FlexpatchError: Naming the first one.
    """
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().dequantize() if is_torchao(parameter) else parameter
        if not numbers.isfinite().all():
            raise FlexpatchError(f"the weight '{name}' holds NaN or infinite values")
