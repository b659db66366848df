"""LoRA-Pro: the corrected gradients move the product as near to the full gradient as two factors can."""

import pytest
import torch

from lorry.training.dynamics.lora_pro import corrected


def case(seed=1, scale=2.0, zero=False):
    generator = torch.Generator().manual_seed(seed)
    a, b, g = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 7), (9, 3), (9, 7)))
    b = torch.zeros_like(b) if zero else b
    return a, b, g, scale * b.mT @ g, scale * g @ a.mT, scale


def moved(a, b, da, db, scale):
    return scale * (b @ da + db @ a)


def test_the_product_moves_as_the_nearest_that_factors_allow():
    a, b, g, da, db, scale = case()
    more_a, more_b = corrected(a, b, da, db, scale, 1e-6)
    ours = moved(a, b, more_a, more_b, scale)
    # the best of all pairs, by least squares over their elements
    columns = [
        scale * torch.kron(b, torch.eye(7).double()),
        scale * torch.kron(torch.eye(9).double(), a.mT.contiguous()),
    ]
    jacobian = torch.cat(columns, 1)
    best = jacobian @ torch.linalg.lstsq(jacobian, g.flatten(), driver="gelsd").solution
    torch.testing.assert_close(ours.flatten(), best, rtol=1e-8, atol=1e-10)
    plain = moved(a, b, da, db, scale)
    assert (ours - g).norm() < (plain / (plain.norm() / g.norm()) - g).norm()


def test_of_all_such_pairs_it_is_the_one_nearest_to_the_gradients():
    a, b, _, da, db, scale = case()
    more_a, more_b = corrected(a, b, da, db, scale, 1e-6)

    def far(x):
        return ((more_a + x @ a - da) ** 2).sum() + ((more_b - b @ x - db) ** 2).sum()

    x = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    far(x).backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-8)
    with torch.no_grad():
        changed = moved(a, b, more_a + torch.ones(3, 3).double() @ a, more_b - b @ torch.ones(3, 3).double(), scale)
    torch.testing.assert_close(changed, moved(a, b, more_a, more_b, scale))


@pytest.mark.parametrize("zero", [False, True])
def test_a_small_step_lowers_the_loss(zero):
    a, b, _, da, db, scale = case(zero=zero)
    more_a, more_b = corrected(a, b, da, db, scale, 1e-6)
    assert (more_a * da).sum() + (more_b * db).sum() > 0
    assert bool(more_a.abs().sum()) != zero  # with B zero, A has no direction
    assert all(t.isfinite().all() for t in (more_a, more_b))


def test_a_frame_that_is_orthonormal_is_left_as_plain_up_to_the_projection():
    a, b, g, _, _, _ = case()
    a, b = torch.linalg.qr(a.mT)[0].mT.contiguous(), torch.linalg.qr(b)[0]
    da, db = b.mT @ g, g @ a.mT
    more_a, more_b = corrected(a, b, da, db, 1.0, 1e-6)
    # BᵀB = A Aᵀ = I: X is minus half of Bᵀ G Aᵀ
    torch.testing.assert_close(more_a, da - 0.5 * da @ a.mT @ a)
    torch.testing.assert_close(more_b, db - 0.5 * b @ b.mT @ db)
