"""Preference losses: pure functions of the log-probabilities of answers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flexpatch.errors import FlexpatchError


class PreferenceLoss(NamedTuple):
    """Loss and rewards of a batch of pairs.

    Attributes:
        loss: () float, mean over pairs.
        chosen_rewards: (pairs,) float, beta * (policy - reference), detached.
        rejected_rewards: (pairs,) float, beta * (policy - reference), detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    policy: Tensor, reference: Tensor | None = None, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Compute the sigmoid DPO loss (arXiv 2305.18290, eq. 7; with label smoothing: conservative DPO).

    Args:
        policy: (2 * pairs,) float, summed log-probs in nats, chosen and rejected in turn. :func:`answer_logprobs`
            returns them in this order for trees made by ``Tree.of(prompt, chosen, rejected)``.
        reference: (2 * pairs,) float, log-probs of the reference model; ``None`` for a reference-free loss.
        beta: Strength of the reference, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Returns:
        The mean loss, and the rewards of chosen and rejected answers.

    Raises:
        FlexpatchError: For an odd number of answers, shapes that differ, values that are not floats, or settings out
            of range.
    """
    for name, values in dict(policy=policy, reference=policy if reference is None else reference).items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise FlexpatchError(f"{name} log-probs are {kind}; expected a tensor of floats")
    if policy.ndim != 1 or policy.numel() == 0 or policy.numel() % 2:
        raise FlexpatchError(
            f"DPO needs chosen and rejected log-probs in turn, a vector of even length; got {tuple(policy.shape)}"
        )
    if reference is None:
        reference = torch.zeros_like(policy)
    if reference.shape != policy.shape:
        raise FlexpatchError(f"policy log-probs have shape {tuple(policy.shape)}, reference {tuple(reference.shape)}")
    if not 0 < beta < math.inf or not 0 <= label_smoothing < 0.5:
        raise FlexpatchError(f"beta={beta} must be > 0 and finite, label_smoothing={label_smoothing} in [0, 0.5)")
    rewards = beta * (policy - reference.to(policy.device))
    chosen, rejected = rewards.view(-1, 2).unbind(-1)
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return PreferenceLoss(losses.mean(), chosen.detach(), rejected.detach())
