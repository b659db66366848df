"""A linear layer whose weight differs from a frozen one at a few fixed positions, or is zero elsewhere, forward and
backward, without a dense gradient.

Positions are flat indices into ``(rows, columns)``, ascending and unique. `reference` is the definition.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch says once in each process that compressed sparse tensors are in beta; the operations used here are tested
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def reference(x: Tensor, values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the same as `sparse_linear` by plain, differentiable operations."""
    return F.linear(x, scatter(values.to(x.dtype), index, shape[0] * shape[1]).view(shape))


def sparse_linear(x: Tensor, values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return ``x Sᵀ`` for S of `shape` with `values` at the positions `index`.

    In float32 and float64 products run over the stored positions alone; other types have no such products and go
    through a dense S, and in the backward pass a dense gradient, which live in this one operation only.
    """
    if torch.compiler.is_compiling():  # compilers do not know compressed tensors
        return reference(x, values, index, shape)
    result: Tensor = _SparseLinear.apply(x, values, index, shape)  # type: ignore[no-untyped-call]
    return result


def changed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """Return ``x (W + S)ᵀ + bias`` for a frozen W ``(out, in)`` and S with `values` at the positions `index`.

    The sum is built for one product at a time and not kept: that passes over the weight once, which is a fraction of
    the product that a separate ``x Sᵀ`` would cost on anything but a handful of tokens.
    """
    result: Tensor = _ChangedLinear.apply(x, weight, bias, values, index)  # type: ignore[no-untyped-call]
    return result


def scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return a vector of `size` zeros with `values` at `index`."""
    return values.new_zeros(size).index_copy(0, index.long(), values)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.shape = shape
        return _times(x, _matrix(values.to(x.dtype), index, ctx.shape), transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, index = ctx.saved_tensors
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = _times(grad, _matrix(values.to(grad.dtype), index, ctx.shape), transposed=False)
        if ctx.needs_input_grad[1]:
            dv = _at_positions(grad, x, index, ctx.shape).to(values.dtype)
        return dx, dv, None, None


class _ChangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, values, index)
        return F.linear(x, _changed(weight, values, index), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight, values, index = ctx.saved_tensors
        dx = grad @ _changed(weight, values, index) if ctx.needs_input_grad[0] else None
        dv = None
        if ctx.needs_input_grad[3]:
            dv = _at_positions(grad, x, index, (weight.shape[0], weight.shape[1])).to(values.dtype)
        return dx, None, None, dv, None


def _changed(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Return ``W + S``."""
    return weight.flatten().index_add(0, index, values.to(weight.dtype)).view_as(weight)


def _at_positions(grad: Tensor, x: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the entries of ``gradᵀ x`` at `index`."""
    left, right = grad.reshape(-1, shape[0]).t(), x.reshape(-1, shape[1])
    if not _compressed(grad):
        return (left @ right).flatten().index_select(0, index)
    pattern = _matrix(torch.zeros_like(index, dtype=grad.dtype), index, shape)
    # rows of both sides contiguous: each entry is a product of one of either
    result: Tensor = torch.sparse.sampled_addmm(pattern, left.contiguous(), right, beta=0.0).values()
    return result


def _compressed(like: Tensor) -> bool:
    return like.dtype in (torch.float32, torch.float64)


def _matrix(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    if not _compressed(values):
        return scatter(values, index, rows * columns).view(shape)
    starts = torch.searchsorted(
        index, torch.arange(rows + 1, device=index.device, dtype=index.dtype) * columns, out_int32=True
    )
    return torch.sparse_csr_tensor(starts, (index % columns).to(torch.int32), values, shape, check_invariants=False)


def _times(x: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    """Return ``x Mᵀ`` or ``x M``."""
    if matrix.layout is torch.strided:
        return F.linear(x, matrix) if transposed else x @ matrix
    flat = x.reshape(-1, x.shape[-1]).t()
    product = (matrix @ flat if transposed else matrix.mT @ flat).t()
    return product.reshape(*x.shape[:-1], product.shape[-1])
