"""Rows with lists of rows of another matrix, against plain products and sums in float64."""

import pytest
import torch

from lorry.kernels.lists import RowLists, runs

LISTS = [[3, 7, 1], [], [0], [5, 5, 2, 6], [], [9]]


def made(dtype):
    """Return the lists, vectors for their rows, and a matrix whose rows that nobody lists are no numbers."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([len(each) for each in LISTS])
    lists = RowLists(counts, torch.tensor([number for each in LISTS for number in each]), dtype)
    x = torch.randn(len(LISTS), 12, generator=generator, dtype=torch.float64).to(dtype)
    of = torch.randn(11, 12, generator=generator, dtype=torch.float64).to(dtype)
    of[[4, 8, 10]] = float("nan")
    return lists, x, of


def in_place(lists):
    return lists


def copied(lists):
    """Let listed rows be copied, as on other devices."""
    lists._pattern = None
    return lists


KINDS = [(torch.float64, in_place, 1e-12), (torch.float32, in_place, 1e-5), (torch.float64, copied, 1e-12)]
KINDS += [(torch.bfloat16, in_place, 0.1)]


@pytest.mark.parametrize(("dtype", "way", "near"), KINDS)
def test_products_and_sums_are_plain_ones(dtype, way, near):
    lists, x, of = made(dtype)
    wide = of.double()
    dots = way(lists).dots(x, of)
    expected = [x[row].double() @ wide[number] for row, each in enumerate(LISTS) for number in each]
    torch.testing.assert_close(dots.double(), torch.stack(expected), atol=near, rtol=near)
    sums, places = lists.sums(dots, of), iter(range(len(dots)))
    for row, each in enumerate(LISTS):
        own = sum((dots[next(places)].double() * wide[number] for number in each), torch.zeros(12).double())
        torch.testing.assert_close(sums[row].double(), own, atol=near, rtol=near)


@pytest.mark.parametrize("further", [None, torch.arange(6).double()])
def test_the_softmax_of_each_list(further):
    lists, x, of = made(torch.float64)
    dots = lists.dots(x, of)
    found, start = lists.softmax(dots, further), 0
    for row, each in enumerate(LISTS):
        own = dots[start : start + len(each)]
        if further is not None:
            own = torch.cat([own, further[row : row + 1]])
        torch.testing.assert_close(found[start : start + len(each)], own.softmax(-1)[: len(each)])
        start += len(each)


def test_runs_follow_each_other():
    found = runs(torch.tensor([4, 0, 9, 2]), torch.tensor([3, 0, 1, 2]), step=2)
    assert found.tolist() == [4, 6, 8, 9, 2, 4]
    assert runs(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)).tolist() == []
