"""Checkerboards: there and back, what one output sees, and both directions as each other's transpose."""

import pytest
import torch
from torch import nn

from lorry.core.errors import OptionError
from lorry.systems.deyolo.focus import BiFocus, Boards, join, split


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(boards: Boards) -> Boards:
    """The same without normalisation and SiLU."""
    boards.even, boards.odd = boards.even[0].double(), boards.odd[0].double()
    return boards


def test_boards_hold_the_pixels_that_the_formula_names():
    x = drawn(1, 2, 6, 8)
    even, odd = split(x)
    for i in range(6):
        for k in range(4):
            assert torch.equal(even[..., i, k], x[..., i, 2 * k + i % 2])
            assert torch.equal(odd[..., i, k], x[..., i, 2 * k + 1 - i % 2])
    assert torch.equal(join(even, odd), x)


@pytest.mark.parametrize("upright", [False, True])
def test_identity_convolutions_give_the_map_back(upright):
    boards = Boards(3, upright)
    boards.even, boards.odd = nn.Identity(), nn.Identity()
    x = drawn(2, 3, 4, 6)
    assert torch.equal(boards(x), x)


def test_one_direction_is_the_other_transposed():
    across, down = plain(Boards(3, False)), plain(Boards(3, True))
    with torch.no_grad():
        for name in ("even", "odd"):
            getattr(down, name).weight.copy_(getattr(across, name).weight.mT)
    x = drawn(2, 3, 6, 8)
    torch.testing.assert_close(down(x), across(x.mT).mT, rtol=1e-12, atol=1e-12)


def test_one_output_sees_three_rows_and_six_columns_of_its_own_board():
    boards = plain(Boards(1, False))
    x = drawn(1, 1, 10, 10).requires_grad_()
    boards(x)[0, 0, 4, 4].backward()
    seen = {tuple(place) for place in x.grad[0, 0].nonzero().tolist()}
    assert seen == {(3, 3), (3, 5), (3, 7), (4, 2), (4, 4), (4, 6), (5, 3), (5, 5), (5, 7)}


def test_the_whole_block_keeps_the_shape_and_has_the_published_count():
    block = BiFocus(32)
    assert sum(each.numel() for each in block.parameters()) == 39 * 32**2 + 43 * 32 == 41312
    assert block(torch.randn(2, 32, 4, 6)).shape == (2, 32, 4, 6)


def test_an_odd_side_is_refused():
    with pytest.raises(OptionError, match="5 x 4 has no two equal checkerboards"):
        split(torch.zeros(1, 1, 5, 4))
