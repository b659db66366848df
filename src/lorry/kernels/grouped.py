"""The fused operation for batches of several adapters on a GPU: a frozen linear layer, and grouped kernels for all
segments.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.kernels.dropout import kept_scale, windows
from lorry.kernels.segments import Factors, Segment

if TYPE_CHECKING:
    from lorry.kernels.triton_rows import GroupedRows, RowPlan


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def groupable(x: Tensor, segments: Sequence[Segment], factors: Sequence[Factors]) -> bool:
    """Whether the grouped kernels carry these segments: on a GPU (or in Triton's interpreter), no gains, one type, one
    dropout.
    """
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or not _triton():
        return False
    kinds = {(f.a.dtype, f.b.dtype) for f in factors}
    return (
        len(kinds) == 1
        and len({*kinds.pop()}) == 1
        and all(f.gain is None and f.a.shape[0] <= 128 for f in factors)
        and len({s.p for s in segments}) == 1
    )


def grouped_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    segments: Sequence[Segment],
    factors: Sequence[Factors],
    plan: RowPlan,
) -> Tensor:
    """Do what `lorry.kernels.lowrank.low_rank_linear` does, by grouped kernels."""
    flat = [t for f in factors for t in (f.a, f.b)]
    result: Tensor = _GroupedLinear.apply(x, weight, bias, y, plan, tuple(segments), *flat)  # type: ignore[no-untyped-call]
    return result


def batch_plan(x: Tensor, segments: Sequence[Segment], plans: dict[Any, Any]) -> RowPlan | None:
    """Return the layout of the batch's tokens, which layers of one batch share; None if a row is in several segments.

    Blocks of different segments run at the same time, so they must not add to the same rows.
    """
    from lorry.kernels.triton_rows import plan_rows

    tokens = x[0].numel() // x.shape[-1]
    scales = tuple(s.scale if isinstance(s.scale, float) else id(s.scale) for s in segments)
    places = tuple((s.rows.start, s.rows.stop) if isinstance(s.rows, slice) else id(s.rows) for s in segments)
    key = (len(x), tokens, scales, places)
    if key not in plans:
        every = torch.arange(len(x))
        rows = [every if s.rows is None else every[s.rows] if isinstance(s.rows, slice) else s.rows for s in segments]
        together = torch.cat([r.cpu() for r in rows])
        disjoint = len(together.unique()) == len(together)
        plan = plan_rows(rows, [s.scale for s in segments], tokens, x.device) if disjoint else None
        # the segments are kept too, so that no other tensor takes the place of a scale under the same id
        plans[key] = (plan, tuple(segments))
    found: RowPlan | None = plans[key][0]
    return found


def _grouped(x: Tensor, plan: RowPlan, segments: Sequence[Segment], flat: Sequence[Tensor]) -> GroupedRows:
    from lorry.kernels.triton_rows import GroupedRows, Windows

    a, b = [t.detach().contiguous() for t in flat[::2]], [t.detach().contiguous() for t in flat[1::2]]
    p = segments[0].p
    if p == 0:
        return GroupedRows(plan, a, b)
    pool, offsets = windows(x.shape, p, [(s.rows, s.seed) for s in segments], x.device)
    return GroupedRows(plan, a, b, Windows(pool, offsets, kept_scale(p)))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        plan: RowPlan,
        segments: tuple[Segment, ...],
        *flat: Tensor,
    ) -> Tensor:
        out = F.linear(x, weight, bias) if y is None else y.clone()  # type: ignore[arg-type]
        rows = x.to(out.dtype).reshape(-1, x.shape[-1])
        h = _grouped(x, plan, segments, flat).forward(out.view(-1, out.shape[-1]), rows)
        ctx.plan, ctx.segments, ctx.has_base = plan, segments, y is not None
        ctx.save_for_backward(x, weight, h, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, h, *flat = ctx.saved_tensors
        grad = grad.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if ctx.has_base else (grad @ weight).contiguous()
        rows = x.to(grad.dtype).reshape(-1, x.shape[-1])
        into = None if dx is None else dx.view(-1, x.shape[-1])
        da, db = _grouped(x, ctx.plan, ctx.segments, flat).backward(into, grad.view(-1, grad.shape[-1]), rows, h)
        grads = [t for pair in zip(da, db, strict=True) for t in pair]
        passed = grad if ctx.has_base and ctx.needs_input_grad[3] else None
        return (dx, None, None, passed, None, None, *grads)
