"""Dropout from a seed: statistics, recomputation, independence of padding."""

import pytest
import torch

from lorry.kernels.dropout import drop_, dropout, dropped_into, keep_bits, keep_mask, masked

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_mean_and_variance_of_the_mask(p):
    mask = keep_mask((64, 32, 96), p, 3, CPU).double()
    sd = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * sd / mask.numel() ** 0.5 + 1e-3
    # neither tokens nor channels are dropped more evenly or less evenly than independent draws are
    per_token, per_channel = mask.mean(-1).flatten(), mask.mean((0, 1))
    assert per_token.var() == pytest.approx(sd**2 / 96, rel=0.15)
    assert per_channel.var() < 4 * sd**2 / (64 * 32)


def test_two_tokens_and_two_seeds_are_independent():
    mask = keep_mask((256, 2, 64), 0.5, 11, CPU).double() - 0.5
    other = keep_mask((256, 2, 64), 0.5, 12, CPU).double() - 0.5
    assert abs((mask[:, 0] * mask[:, 1]).mean()) < 0.01 and abs((mask * other).mean()) < 0.01
    assert len({tuple(row.flatten().tolist()) for row in mask[:, 0]}) > 250, "tokens do not share one window"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_expectation_is_the_input(p):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([dropout(x, p, seed) for seed in range(4000)]).mean(0)
    # the standard error of each element is |x| sqrt(p / (1 - p) / 4000)
    assert ((mean - x).abs() <= 5 * x.abs() * (p / (1 - p) / 4000) ** 0.5 + 1e-6).all()


def test_same_seed_same_mask_in_forward_and_backward():
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = dropout(x, 0.4, 9)
    assert torch.equal(y, dropout(x, 0.4, 9)) and not torch.equal(y, dropout(x, 0.4, 10))
    y.sum().backward()
    kept = keep_mask(x.shape, 0.4, 9, CPU)
    torch.testing.assert_close(x.grad, kept / 0.6)
    torch.testing.assert_close(y, x.detach() * kept / 0.6)


def test_a_row_does_not_depend_on_padding():
    short, long = keep_mask((4, 6, 32), 0.5, 1, CPU), keep_mask((4, 11, 32), 0.5, 1, CPU)
    assert torch.equal(long[:, :6], short)


def test_gradients_of_dropout_are_right():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, 5), (x,))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, 5).square(), (x,))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, (1 << 19) + 1)], ids=["windows of the pool", "drawn"])
def test_dropping_by_bits_is_the_product_with_the_mask(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = keep_mask(shape, 0.4, 9, CPU)
    wanted = x.float() * mask
    assert torch.equal(drop_(x.clone(), keep_bits(shape, 0.4, 9, x)).float(), wanted)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    dropped = dropped_into(keep_bits(shape, 0.4, 9, x), turned)
    assert dropped.dtype == dtype and torch.equal(dropped.float(), wanted) and torch.equal(turned.float(), x.float())


def test_what_is_dropped_is_gone_whatever_it_was():
    x = torch.full((4, 64), torch.inf)
    x[1] = torch.nan
    y = drop_(x.clone(), keep_bits(x.shape, 0.5, 2, x))
    dropped = keep_mask(x.shape, 0.5, 2, CPU) == 0
    assert (y[dropped] == 0).all() and torch.equal(y[~dropped].isnan(), x[~dropped].isnan())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)])
def test_any_shape(shape):
    x = torch.ones(shape)
    assert dropout(x, 0.5, 0).shape == shape and keep_mask(shape, 0.5, 0, CPU).shape == shape


def test_edges():
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, 1) is x
    assert torch.equal(masked(x, 1.0, 1), torch.zeros(3, 4))
    wide = keep_mask((2, (1 << 19) + 1), 0.25, 1, CPU)
    assert wide.double().mean() == pytest.approx(0.75, abs=0.01) and not torch.equal(wide[0], wide[1])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keep_mask((3, 4, 8), 0.123, 7, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_is_kept_and_nothing_is_saved_for_the_backward_pass():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, 0.5, 1)
    assert y.dtype == torch.bfloat16 and not kept
