"""Choices, losses and statistics of routing, against brute force."""

import itertools
import math

import pytest
import torch

import lorry
from lorry.methods.parts import routing


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_mask_is_brute_force(k):
    scores = random(4, 9, 6)
    mask = routing.top_k_mask(scores, k)
    expected = torch.zeros_like(mask)
    for i, j in itertools.product(range(4), range(9)):
        order = sorted(range(6), key=lambda e: (-float(scores[i, j, e]), e))
        expected[i, j, order[:k]] = True
    assert torch.equal(mask, expected)
    again = torch.zeros_like(mask).scatter(-1, routing.ranked(scores, k), True)
    assert torch.equal(again, expected)


def test_ties_go_to_the_first_experts():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert routing.top_k_mask(scores, 3).tolist() == [
        [True, True, True, False, False],
        [True] * 3 + [False] * 2,
    ]
    assert routing.ranked(scores, 3).tolist() == [[1, 0, 2], [0, 1, 2]]


def test_top_p_stops_at_the_expert_that_exceeds_p():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.9, 0.05, 0.03, 0.02]])
    assert routing.top_p_mask(p, 0.7).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert routing.top_p_mask(p, 1.0).all()


def test_capacity_is_in_running_order():
    mask = torch.tensor([[[1, 0], [1, 0], [0, 1], [1, 0]]], dtype=torch.bool)
    assert routing.within_capacity(mask, 2)[0, :, 0].tolist() == [True, True, False, False]


def test_balance_loss_is_k_if_uniform_and_the_number_of_experts_if_collapsed():
    experts, k, tokens = 8, 2, 8
    uniform = torch.full((tokens, experts), 1 / experts)
    choices = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8], 1)
    assert routing.balance_loss(routing.balance_sums(uniform, choices, None)) == pytest.approx(k)
    one = torch.zeros(tokens, experts)
    one[:, 3] = 1
    assert routing.balance_loss(routing.balance_sums(one, torch.full((tokens, 1), 3), None)) == pytest.approx(experts)


def test_balance_loss_drives_only_probabilities_and_ignores_padding():
    logits = random(2, 5, 4).requires_grad_()
    p = logits.softmax(-1)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    order = routing.ranked(p.detach(), 2)
    loss = routing.balance_loss(routing.balance_sums(p, order, real))
    f = torch.zeros(4, dtype=torch.float64)
    for i, j in real.nonzero().tolist():
        f[order[i, j]] += 1 / 8
    torch.testing.assert_close(loss, 4 * (f * p[real].mean(0)).sum())
    loss.backward()
    assert not logits.grad[0, 3:].any() and logits.grad[0, :3].any()


def test_pooling_is_not_the_mean_of_layers():
    """Two layers collapsed onto complementary experts look balanced together; each alone does not."""
    layers = []
    for expert in (0, 1):
        p = torch.zeros(6, 2)
        p[:, expert] = 1
        layers.append(routing.balance_sums(p, torch.full((6, 1), expert), None))
    assert routing.balance_loss(sum(layers)) == pytest.approx(1)
    assert routing.balance_loss(layers[0]) == pytest.approx(2)


def test_loss_free_balancing_evens_out_fixed_scores():
    scores = random(512, 8) * 0.2 + torch.arange(8) * 0.3
    bias = torch.zeros(8, dtype=torch.float64)

    def variation():
        load = routing.counts(routing.top_k_mask(scores + bias, 2), None)
        return float(load.std() / load.mean()), load

    before, _ = variation()
    for _ in range(400):
        routing.balance_step(bias, variation()[1], 0.01)
    assert before > 1 and variation()[0] < 0.3


def test_entropy_and_effective_number():
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]])
    assert routing.entropy(p) == pytest.approx(math.log(4) / 2)
    assert routing.entropy(p, torch.tensor([True, False])) == pytest.approx(math.log(4))
    assert routing.effective_experts(p) == pytest.approx(2.5)
    assert routing.effective_experts(torch.zeros(3, 4)) == 0


def tuples(n, k):
    return torch.tensor(list(itertools.permutations(range(n), k)))


def test_log_probability_sums_to_one_and_is_plackett_luce():
    logits = random(5)
    q = logits.softmax(-1)
    every = tuples(5, 3)
    found = routing.log_probability(logits.expand(len(every), 5), every).exp()
    assert found.sum() == pytest.approx(1)
    a, b, c = every[17].tolist()
    assert found[17] == pytest.approx(float(q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b])))
    # peaked: subtracting from 1 would give nothing
    peaked = torch.tensor([[60.0, 0.0, -1.0]])
    assert routing.log_probability(peaked, torch.tensor([[0, 1]])) == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-5)


def test_draws_follow_the_log_probability():
    from scipy.stats import chisquare

    logits = random(4).float()
    every = tuples(4, 2)
    expected = routing.log_probability(logits.expand(len(every), 4), every).exp()
    count = 20000
    drawn = routing.draw_order(logits.expand(count, 4), 2, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    found = torch.stack([(drawn == t).all(-1).sum() for t in every]).double()
    assert chisquare(found.numpy(), (expected.double() / expected.double().sum() * count).numpy()).pvalue > 1e-3


def test_draws_of_a_row_do_not_depend_on_padding():
    logits = random(3, 6, 5).float()
    first = routing.draw_order(logits[:, :4], 2, torch.Generator().manual_seed(1))
    assert torch.equal(routing.draw_order(logits, 2, torch.Generator().manual_seed(1))[:, :4], first)


@pytest.mark.parametrize("draws", [2, 3])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_leave_one_out_is_unbiased(draws, shift):
    """Every tuple of draws enumerated: the expected gradient is the exact one of the expected loss, whatever
    is added to the loss.
    """
    logits = random(4).requires_grad_()
    every = tuples(4, 2)
    table = random(4, 4, seed=3)
    losses = (table + table.T)[every[:, 0], every[:, 1]] + shift
    log_q = routing.log_probability(logits.expand(len(every), 4), every)
    exact = torch.autograd.grad((log_q.exp() * losses).sum(), logits, retain_graph=True)[0]
    total = torch.zeros(4, dtype=torch.float64)
    for chosen in itertools.product(range(len(every)), repeat=draws):
        index = torch.tensor(chosen)
        surrogate = routing.leave_one_out(losses[index].unsqueeze(1), log_q[index].unsqueeze(1))
        weight = log_q[index].sum().exp().detach()
        total += weight * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    torch.testing.assert_close(total, exact, atol=1e-12, rtol=1e-9)


def test_a_single_draw_is_refused():
    with pytest.raises(lorry.OptionError, match="at least 2 draws"):
        routing.leave_one_out(torch.ones(1, 3), torch.ones(1, 3))


def test_differences_within_rounding_train_nobody():
    """Draws that give one loss up to rounding would otherwise make full steps of an optimizer that normalises."""
    losses = torch.tensor([[3.0, 1.0], [3.0 + 5e-7, 1.5]])
    chosen = torch.zeros(2, 2, requires_grad=True)
    routing.leave_one_out(losses, chosen).backward()
    assert torch.equal(chosen.grad[:, 0], torch.zeros(2))
    torch.testing.assert_close(chosen.grad[:, 1], torch.tensor([-0.125, 0.125]))
