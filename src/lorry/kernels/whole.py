"""One low-rank update of all rows of a dense frozen layer: the usual case, one adapter that trains.

Next to the products of the layer itself, those with rank 8 are small, and what goes around them counts: every pass over
a tensor as large as the activations, and every call. So the factors are cast once, dropout is one bitwise operation,
the gradient of the input is gathered by the large product instead of added to it, and that of a gain is summed up
without a tensor of its terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.kernels.dropout import drop_, dropped_into, keep_bits, kept_scale
from lorry.kernels.products import add_product, product
from lorry.kernels.segments import LowRankPair, Segment


def is_whole(x: Tensor, weight: Tensor | None, segments: Sequence[Segment]) -> bool:
    """Whether the layer is dense, in the type of its input, and one segment without weights of its own has all
    rows.
    """
    if weight is None or len(segments) != 1 or weight.dtype != x.dtype:
        return False
    return segments[0].rows is None and segments[0].weights is None


def whole_linear(x: Tensor, weight: Tensor, bias: Tensor | None, segment: Segment, factors: LowRankPair) -> Tensor:
    """Return ``g ⊙ (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + b`` with its gradients; see `lorry.kernels.lowrank.reference`."""
    result: Tensor = _WholeLinear.apply(x, weight, bias, segment, factors.a, factors.b, factors.gain)  # type: ignore[no-untyped-call]
    return result


class _WholeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segment: Segment,
        a: Tensor,
        b: Tensor,
        gain: Tensor | None,
    ) -> Tensor:
        ctx.segment, ctx.alpha, ctx.kinds = segment, segment.scale * kept_scale(segment.p), (a.dtype, b.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        out = F.linear(x, weight, bias if gain is None else None)
        part = x if segment.p <= 0 else dropped_into(keep_bits(x.shape, segment.p, segment.seed, x), x)
        # rank units lie in rows: every small product then runs along contiguous memory
        h = product(a, part.reshape(-1, x.shape[-1]).t())
        add_product(out.view(-1, len(weight)), h.t(), b.t(), ctx.alpha)
        if gain is None:
            ctx.save_for_backward(x, weight, a, b, h)
            return out
        ctx.save_for_backward(x, weight, a, b, h, out, gain)
        scaled = out * gain.to(out.dtype)
        return scaled if bias is None else scaled.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, h, *gained = ctx.saved_tensors
        need_x, _, _, _, need_a, need_b, need_gain = ctx.needs_input_grad
        tokens, dy = x.reshape(-1, x.shape[-1]), grad.contiguous().view(-1, len(weight))
        dgain = None
        if gained:
            out, gain = gained
            dgain = column_dots(dy, out.view(dy.shape)).to(gain.dtype) if need_gain else None
            dy = dy * gain.to(dy.dtype)
        db = _upright(product(h, dy), ctx.kinds[1]).mul_(ctx.alpha) if need_b else None
        if not need_x and not need_a:
            return None, None, None, None, None, db, dgain
        dh = product(b.t(), dy.t()).mul_(ctx.alpha)
        if ctx.segment.p <= 0:
            da = product(dh, tokens).to(ctx.kinds[0]) if need_a else None
            dx = None
            if need_x:
                dx = product(dy, weight)
                add_product(dx, dh.t(), a, 1.0)
        else:
            bits = keep_bits(x.shape, ctx.segment.p, ctx.segment.seed, x).view(tokens.shape)
            dx = None
            if need_x:
                dx = drop_(product(dh.t(), a), bits)
                add_product(dx, dy, weight, 1.0)
            da = product(dh, dropped_into(bits, tokens)).to(ctx.kinds[0]) if need_a else None
        return None if dx is None else dx.view(x.shape), None, None, None, da, db, dgain


def _upright(wide: Tensor, kind: torch.dtype) -> Tensor:
    """Return the gradient of B ``(out, rank)`` from its transpose, laid out like B: another layout would be copied
    once more when it is accumulated.
    """
    return wide.t().to(kind, memory_format=torch.contiguous_format).contiguous()


def column_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each column of two tensors ``(tokens, width)``, in float32 or better on the CPU.

    That is the gradient of the weight of a batch normalisation with mean 0 and variance 1, whose kernel reads both
    tensors once and makes none.
    """
    if left.device.type != "cpu" or not left.numel() or not (left.is_contiguous() and right.is_contiguous()):
        return (left * right).sum(0)
    zeros, ones = _constants(left.shape[1], torch.promote_types(left.dtype, torch.float32))
    images = [t.t().unsqueeze(-1).unsqueeze(0) for t in (left, right)]  # channels last: (1, width, tokens, 1)
    found: Tensor = torch.ops.aten.native_batch_norm_backward(
        *images, ones, zeros, ones, zeros, ones, False, 0.0, [False, True, False]
    )[1]
    return found


@lru_cache(maxsize=64)
def _constants(width: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(width, dtype=kind), torch.ones(width, dtype=kind)
