"""The built-in losses against their definitions, token by token, in float64."""

import math

import pytest
import torch

from lorry.serving.training.losses import LOSSES, loss_named

P, Q, A = [-0.5, -2.0, -1.0, -3.0], [-1.0, -1.5, -1.1, -3.0], [1.0, -2.0, 0.5, 0.0]
R = [math.exp(p - q) for p, q in zip(P, Q, strict=True)]
S = math.exp(sum(p - q for p, q in zip(P[:3], Q[:3], strict=True)) / 3)


def clip(r):
    return min(max(r, 0.8), 1.2)


def lower(r, a):
    """The loss of a clipped ratio, and its gradient in the log-probability."""
    return (-r * a, -r * a) if r * a <= clip(r) * a else (-clip(r) * a, 0.0)


EXPECTED = {
    "cross_entropy": [(-p * w, -w) for p, w in zip(P, A, strict=True)],
    "importance_sampling": [(-r * a, -r * a) for r, a in zip(R, A, strict=True)],
    "ppo": [lower(r, a) for r, a in zip(R, A, strict=True)],
    "cispo": [(-clip(r) * p * a, -clip(r) * a) for p, r, a in zip(P, R, A, strict=True)],
    "dro": [(-p * a + 0.025 * (p - q) ** 2, -a + 0.05 * (p - q)) for p, q, a in zip(P, Q, A, strict=True)],
    "gspo": [lower(S, a) for a in A],
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_definition(name):
    loss, config = loss_named(name, {})
    p = torch.tensor(P, dtype=torch.float64, requires_grad=True)
    given = {
        "logprobs": torch.tensor(Q, dtype=torch.float64),
        "advantages": torch.tensor(A),
        "weights": torch.tensor(A),
    }
    value = loss.compute(p, given, config)
    value.backward()
    assert value.item() == pytest.approx(sum(each for each, _ in EXPECTED[name]), rel=1e-9)
    assert p.grad.tolist() == pytest.approx([slope for _, slope in EXPECTED[name]], rel=1e-9, abs=1e-12)


def test_thresholds_may_be_those_of_each_token():
    loss, config = loss_named("ppo", {"clip_high_threshold": 9.0})
    p = torch.tensor(P[:1], dtype=torch.float64)
    given = {"logprobs": torch.tensor(Q[:1], dtype=torch.float64), "advantages": torch.ones(1)}
    assert loss.compute(p, given, config).item() == pytest.approx(-R[0], rel=1e-9)
    tight = {**given, "clip_high_threshold": torch.tensor([1.1], dtype=torch.float64)}
    assert loss.compute(p, tight, config).item() == pytest.approx(-1.1, rel=1e-9)
