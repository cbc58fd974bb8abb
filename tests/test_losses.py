"""The DPO loss against its formula, in plain floats."""

import math

import pytest
import torch
from parameterized import parameterized
from torch import Tensor

from flexpatch import FlexpatchError, dpo_loss

POLICY = [-12.0, -11.5, -30.25, -41.0, -5.0, -5.0]
REFERENCE = [-12.5, -10.0, -31.0, -40.0, -4.0, -7.5]


def formula(policy: list[float], reference: list[float], beta: float, label_smoothing: float) -> float:
    losses = []
    for i in range(0, len(policy), 2):
        margin = beta * ((policy[i] - reference[i]) - (policy[i + 1] - reference[i + 1]))
        right, wrong = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
        losses.append(-(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(wrong))
    return sum(losses) / len(losses)


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@parameterized.expand([(0.1, 0.0), (0.5, 0.0), (0.1, 0.25), (2.0, 0.49)])
def test_dpo_loss_is_its_formula(beta: float, label_smoothing: float) -> None:
    settings = dict(beta=beta, label_smoothing=label_smoothing)
    loss, chosen, rejected = dpo_loss(vector(POLICY), vector(REFERENCE), **settings)
    assert loss.item() == pytest.approx(formula(POLICY, REFERENCE, beta, label_smoothing), rel=1e-12)
    rewards = [beta * (p - r) for p, r in zip(POLICY, REFERENCE, strict=True)]
    assert chosen.tolist() == pytest.approx(rewards[::2], rel=1e-12)
    assert rejected.tolist() == pytest.approx(rewards[1::2], rel=1e-12)
    # The comparison can fail: swapped answers and other settings give other losses.
    swapped = formula([POLICY[i ^ 1] for i in range(len(POLICY))], REFERENCE, beta, label_smoothing)
    assert loss.item() != pytest.approx(swapped, rel=1e-3)
    assert loss.item() != pytest.approx(formula(POLICY, REFERENCE, 1.1 * beta, label_smoothing), rel=1e-3)
    assert loss.item() != pytest.approx(formula(POLICY, REFERENCE, beta, label_smoothing + 0.1), rel=1e-3)


def test_without_reference_it_is_zero() -> None:
    zeros = vector([0.0] * len(POLICY))
    for got, expected in zip(dpo_loss(vector(POLICY)), dpo_loss(vector(POLICY), zeros), strict=True):
        assert torch.equal(got, expected)
    assert dpo_loss(vector(POLICY)).loss != dpo_loss(vector(POLICY), vector(REFERENCE)).loss


def test_gradient() -> None:
    policy = vector(POLICY).requires_grad_()
    for settings in (dict(), dict(beta=1.0, label_smoothing=0.3)):

        def loss_of(policy: Tensor, settings=settings) -> Tensor:
            return dpo_loss(policy, vector(REFERENCE), **settings).loss

        assert torch.autograd.gradcheck(loss_of, policy)
    loss, chosen, rejected = dpo_loss(policy, vector(REFERENCE))
    assert not chosen.requires_grad and not rejected.requires_grad
    loss.backward()
    assert policy.grad is not None
    assert (policy.grad[::2] < 0).all() and (policy.grad[1::2] > 0).all()  # descending raises chosen, lowers rejected


def test_far_margins_stay_finite() -> None:
    policy = vector([0.0, -1e5, -1e5, 0.0]).float().requires_grad_()
    loss = dpo_loss(policy).loss
    loss.backward()
    assert loss.item() == pytest.approx(1e4 / 2)
    assert policy.grad is not None and policy.grad.isfinite().all()


@parameterized.expand(
    [
        ("odd", [torch.zeros(3)], {}, r"vector of even length; got \(3,\)"),
        ("empty", [torch.zeros(0)], {}, r"vector of even length; got \(0,\)"),
        ("matrix", [torch.zeros(2, 2)], {}, r"vector of even length; got \(2, 2\)"),
        ("shapes", [torch.zeros(4), torch.zeros(2)], {}, r"policy .* shape \(4,\), reference \(2,\)"),
        ("beta", [torch.zeros(2)], dict(beta=0.0), r"beta=0.0 must be > 0"),
        ("beta NaN", [torch.zeros(2)], dict(beta=math.nan), r"beta=nan must be > 0"),
        ("smoothing", [torch.zeros(2)], dict(label_smoothing=0.5), r"label_smoothing=0.5 in \[0, 0.5\)"),
        ("beta infinite", [torch.zeros(2)], dict(beta=math.inf), r"beta=inf must be > 0 and finite"),
        ("integers", [torch.zeros(2, dtype=torch.int64)], {}, "policy log-probs are torch.int64; expected a tensor"),
        ("a list", [torch.zeros(2), [0.0, 0.0]], {}, "reference log-probs are list; expected a tensor of floats"),
        ("negative", [torch.zeros(2)], dict(label_smoothing=-0.1), r"label_smoothing=-0.1 in \[0, 0.5\)"),
    ]
)
def test_refuses(_name: str, arguments: list[Tensor], settings: dict[str, float], message: str) -> None:
    with pytest.raises(FlexpatchError, match=message):
        dpo_loss(*arguments, **settings)
