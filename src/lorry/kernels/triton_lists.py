"""Products with listed rows, and sums of them, as Triton kernels: each is read where it lies, and nothing is padded.

The functions are those of `lorry.kernels.lists.RowLists`. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LISTED, _INNER, _OUTER = 16, 64, 128


@triton.jit  # type: ignore[untyped-decorator]
def _dots(  # type: ignore[no-untyped-def]
    x, of, found, row, listed, count, width, x_row, of_row, LISTED: tl.constexpr, INNER: tl.constexpr, SUM: tl.constexpr
):
    """Multiply a block of listed rows with the rows on whose lists they are."""
    place = tl.program_id(0) * LISTED + tl.arange(0, LISTED)
    real = place < count
    own = x + (tl.load(row + place, mask=real, other=0) * x_row)[:, None]
    other = of + (tl.load(listed + place, mask=real, other=0) * of_row)[:, None]
    total = tl.zeros((LISTED,), dtype=SUM)
    for first in range(0, width, INNER):
        k = first + tl.arange(0, INNER)[None, :]
        here = real[:, None] & (k < width)
        part = tl.load(own + k, mask=here, other=0.0).to(SUM)
        total += tl.sum(part * tl.load(other + k, mask=here, other=0.0).to(SUM), 1)
    tl.store(found + place, total.to(found.dtype.element_ty), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    weights, of, found, starts, listed, width, of_row, found_row,
    LISTED: tl.constexpr, OUTER: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Sum the listed rows of one row, in one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    inside = n < width
    total = tl.zeros((OUTER,), dtype=SUM)
    last = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), last, LISTED):
        place = first + tl.arange(0, LISTED)
        real = place < last
        weight = tl.load(weights + place, mask=real, other=0.0).to(SUM)
        other = tl.load(listed + place, mask=real, other=0) * of_row
        part = tl.load(of + other[:, None] + n[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        total += tl.sum(weight[:, None] * part.to(SUM), 0)
    tl.store(found + row * found_row + n, total.to(found.dtype.element_ty), mask=inside)


def listed_dots(x: Tensor, of: Tensor, row: Tensor, listed: Tensor) -> Tensor:
    """Return ``x[row[i]] · of[listed[i]]`` for each i, ``(listed,)``; the last dimensions of x and `of` are dense.

    Parameters
    ----------
    x, of
        ``(rows, width)`` and ``(any, width)``.
    row, listed
        Which rows are multiplied ``(listed,)`` int64.
    """
    found = x.new_empty(len(listed))
    if len(listed):
        with torch.cuda.device_of(x):
            _dots[(triton.cdiv(len(listed), _LISTED),)](
                x, of, found, row, listed, len(listed), x.shape[1], x.stride(0), of.stride(0),
                LISTED=_LISTED, INNER=_INNER, SUM=_sum(x),
            )  # fmt: skip
    return found


def listed_sums(weights: Tensor, of: Tensor, starts: Tensor, listed: Tensor) -> Tensor:
    """Return ``Σ weights[i] · of[listed[i]]`` over each row's list, ``(rows, width)``; 0 for an empty list.

    Parameters
    ----------
    weights
        ``(listed,)``.
    of
        ``(any, width)``, the last dimension dense.
    starts
        Where each list begins, and the last one ends, ``(rows + 1,)`` int64.
    listed
        All lists, one after another ``(listed,)`` int64.
    """
    rows, width = len(starts) - 1, of.shape[1]
    found = of.new_empty(rows, width)
    if rows:
        with torch.cuda.device_of(of):
            _sums[(rows, triton.cdiv(width, _OUTER))](
                weights, of, found, starts, listed, width, of.stride(0), found.stride(0),
                LISTED=_LISTED, OUTER=_OUTER, SUM=_sum(of),
            )  # fmt: skip
    return found


def _sum(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
