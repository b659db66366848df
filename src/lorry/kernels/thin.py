"""Products with a thin factor, in the order that runs along contiguous memory.

Autograd computes the gradient of B ``(out, rank)`` as ``gradᵀ h`` and that of h as ``grad B``. Libraries take four to
six times as long for these as for the same products the other way round, ``hᵀ grad`` and ``Bᵀ gradᵀ``, in which the few
rank units are rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.kernels.products import autocasts, product


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x weightᵀ`` for x ``(..., in)`` and a weight ``(out, in)`` of which one side is much the smaller."""
    if torch.compiler.is_compiling() or autocasts(x):
        return F.linear(x, weight)
    result: Tensor = _ThinLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class _ThinLinear(torch.autograd.Function):
    """Nothing in either pass is done in place, so second derivatives are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))
        dx = _times(grad, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            tokens = x.reshape(-1, x.shape[-1])
            down = len(weight) <= x.shape[-1]
            dweight = product(grad.t(), tokens) if down else product(tokens.t(), grad).t().contiguous()
        return dx, dweight


def _times(tokens: Tensor, right: Tensor) -> Tensor:
    """Return ``tokens right``, with the side of `right` that is small in the rows."""
    if right.shape[0] >= right.shape[1]:
        return product(right.t(), tokens.t()).t().contiguous()
    return product(tokens, right)
