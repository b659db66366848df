"""The hot operation: a frozen linear layer plus low-rank updates of its rows, forward and backward in one node.

For every segment s of rows, ``y_s = g_s ⊙ (x_s Wᵀ + scale_s · drop(x_s) A_sᵀ B_sᵀ) + b``, the gain g being 1 unless a
method has one (DoRA). Ranks are not padded, rows without an adapter cost nothing, x is kept once, and the mask of
dropout is drawn again from its seed. The definition is `reference`; everything else here is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.kernels.dropout import drop_, dropped_into, keep_bits, kept_scale, masked
from lorry.kernels.products import add_product, product
from lorry.kernels.segments import LowRankPair, Rows, Segment, take
from lorry.kernels.tiled import tileable, tiled_linear
from lorry.kernels.tiles import kept_table
from lorry.kernels.together import Together, together
from lorry.kernels.whole import column_dots, is_whole, whole_linear


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    segments: Sequence[Segment],
    factors: Sequence[LowRankPair],
) -> Tensor:
    """Return the same as `low_rank_linear` by plain, differentiable operations; this is the definition."""
    out = y.clone() if y is not None else F.linear(x, weight)  # type: ignore[arg-type]
    every = torch.arange(len(x), device=x.device)
    for segment, f in zip(segments, factors, strict=True):
        part = take(x, segment.rows).to(out.dtype)
        h = F.linear(masked(part, segment.p, segment.seed) if segment.p > 0 else part, f.a.to(out.dtype))
        scale = segment.factor(h.dtype)
        spread = scale if isinstance(scale, float) else scale.view(-1, *[1] * (h.ndim - 1))
        update = F.linear(h * spread, f.b.to(out.dtype))
        if f.gain is not None:
            update = update * f.gain + (f.gain - 1) * take(out, segment.rows)
        out = out.index_add(0, every if segment.rows is None else every[segment.rows], update)
    return out if bias is None or y is not None else out + bias


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    segments: Sequence[Segment],
    factors: Sequence[LowRankPair],
    plans: dict[Any, Any] | None = None,
) -> Tensor:
    """Return the layer's output with the updates of all segments.

    Parameters
    ----------
    x
        Input ``(rows, ..., in)``.
    weight, bias
        A dense frozen weight ``(out, in)`` and its bias; or None, with `y` given.
    y
        The layer's output, if it was computed elsewhere (quantised storage); it is not changed. Gains need `weight`
        instead.
    segments
        The rows of each adapter; rows with a gain belong to one segment only.
    factors
        What each segment multiplies with.
    plans
        Where the layout of the batch's tokens may be kept for the next layer, on devices with grouped kernels.
    """
    plans = {} if plans is None else plans
    flat = [t for f in factors for t in (f.a, f.b, f.gain)]
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, *flat))
    if weight is not None and tileable(x, weight, segments, factors):
        table = kept_table(plans, len(x), x[0].numel() // x.shape[-1], segments, x.device)
        if table is not None:
            return tiled_linear(x, weight, bias, table, segments, factors)
    if tracked and weight is not None and is_whole(x, weight, segments):
        return whole_linear(x, weight, bias, segments[0], factors[0])
    make = together(x, segments, factors, plans)
    if tracked:
        result: Tensor = _LowRankLinear.apply(x, weight, bias, y, tuple(segments), make, *flat)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, weight, bias, y, segments, make, flat)[0]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    segments: Sequence[Segment],
    make: Together | None,
    flat: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Return the output, the rank units ``(rank, tokens)`` of each segment (or those of all, where they are
    multiplied together), and the output before gains if there are any.
    """
    gains = flat[2::3]
    gained = any(g is not None for g in gains)
    out = F.linear(x, weight, None if gained else bias) if y is None else y.clone()  # type: ignore[arg-type]
    if make is not None:
        tokens = x.to(out.dtype).reshape(-1, x.shape[-1])
        return out, [make(x, segments, flat).forward(out.view(-1, out.shape[-1]), tokens)], None
    kept = []
    for segment, a, b in zip(segments, flat[::3], flat[1::3], strict=True):
        assert a is not None and b is not None
        part = take(x, segment.rows).to(out.dtype)
        if segment.p > 0:
            part = dropped_into(keep_bits(part.shape, segment.p, segment.seed, part), part)
        # rank units lie in rows: every small product then runs along contiguous memory
        h = a.to(out.dtype) @ part.reshape(-1, part.shape[-1]).t()
        kept.append(h)
        _add_update(out, segment, h, b.to(out.dtype))
    if not gained:
        return out, kept, None
    return _apply_gains(out, bias, segments, gains), kept, out


def _apply_gains(u: Tensor, bias: Tensor | None, segments: Sequence[Segment], gains: Sequence[Tensor | None]) -> Tensor:
    """Return ``g ⊙ u + b`` in the rows that have a gain, ``u + b`` in the others."""
    out = u
    for segment, gain in zip(segments, gains, strict=True):
        if gain is None:
            continue
        gain = gain.to(u.dtype)
        if segment.rows is None:
            out = u * gain
            continue
        out = u.clone() if out is u else out
        if isinstance(segment.rows, slice):
            out[segment.rows].mul_(gain)
        else:
            out.index_copy_(0, segment.rows, take(u, segment.rows) * gain)
    return out if bias is None else out.add_(bias)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        segments: tuple[Segment, ...],
        make: Together | None,
        *flat: Tensor | None,
    ) -> Tensor:
        out, kept, before = _forward(x, weight, bias, y, segments, make, flat)
        ctx.segments, ctx.make, ctx.has_base = segments, make, y is not None
        ctx.save_for_backward(x, weight, before, *flat, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, before, *rest = ctx.saved_tensors
        count = 3 * len(ctx.segments)
        flat, kept = rest[:count], rest[count:]
        grad = grad.contiguous()
        grad, gain_grads = _through_gains(grad, before, ctx.segments, flat[2::3])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if ctx.has_base else product(grad, weight)
        grads: list[Tensor | None] = []
        if ctx.make is not None:
            tokens, dy = x.to(grad.dtype).reshape(-1, x.shape[-1]), grad.view(-1, grad.shape[-1])
            into = None if dx is None else dx.view(-1, x.shape[-1])
            das, dbs = ctx.make(x, ctx.segments, flat).backward(into, dy, tokens, kept[0])
            grads = [t for da, db in zip(das, dbs, strict=True) for t in (da, db, None)]
        else:
            for index, segment in enumerate(ctx.segments):
                needed = ctx.needs_input_grad[6 + 3 * index : 8 + 3 * index]
                a, b = flat[3 * index], flat[3 * index + 1]
                grads += [*_segment_backward(needed, segment, x, grad, dx, a, b, kept[index]), gain_grads[index]]
        passed = grad if ctx.has_base and ctx.needs_input_grad[3] else None
        return (dx, None, None, passed, None, None, *grads)


def _through_gains(
    grad: Tensor, before: Tensor | None, segments: Sequence[Segment], gains: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradient before the gains, and the gains' own gradients."""
    results: list[Tensor | None] = [None] * len(gains)
    if before is None:
        return grad, results
    scaled = grad
    for index, (segment, gain) in enumerate(zip(segments, gains, strict=True)):
        if gain is None:
            continue
        dy = take(grad, segment.rows).reshape(-1, grad.shape[-1])
        results[index] = column_dots(dy, take(before, segment.rows).reshape(dy.shape)).to(gain.dtype)
        factor = gain.to(grad.dtype)
        if segment.rows is None:
            scaled = grad * factor
            continue
        scaled = grad.clone() if scaled is grad else scaled
        scaled[segment.rows] = take(grad, segment.rows) * factor
    return scaled, results


def _flat_scale(segment: Segment, tokens: int, like: Tensor) -> Tensor | float:
    """Return the segment's scale, spread over tokens if each row has its own, with the factor of dropout."""
    scale = segment.factor(like.dtype)
    spread = scale if isinstance(scale, float) else scale.repeat_interleave(tokens // len(scale))
    return spread * kept_scale(segment.p)


def _add_update(out: Tensor, segment: Segment, h: Tensor, b: Tensor) -> None:
    """Add the segment's update to its rows of `out`, in place."""
    scale = _flat_scale(segment, h.shape[1], h)
    alpha = scale if isinstance(scale, float) else 1.0
    if isinstance(scale, Tensor):
        h = h * scale
    if segment.rows is None or isinstance(segment.rows, slice):
        add_product(take(out, segment.rows).view(-1, out.shape[-1]), h.t(), b.t(), alpha)
        return
    update = product(h.t(), b.t()).view(len(segment.rows), *out.shape[1:])
    out.index_add_(0, segment.rows, update, alpha=alpha)


def _segment_backward(
    needed: tuple[bool, bool],
    segment: Segment,
    x: Tensor,
    grad: Tensor,
    dx: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B, and add the segment's share to `dx` in place."""
    dy = take(grad, segment.rows).reshape(-1, grad.shape[-1])
    scale = _flat_scale(segment, len(dy), dy)
    db = product(h * scale, dy).t().to(b.dtype) if needed[1] else None
    dh = product(b.to(dy.dtype).t(), dy.t()) * scale
    part = take(x, segment.rows).to(dy.dtype)
    bits = keep_bits(part.shape, segment.p, segment.seed, part) if segment.p > 0 else None
    if dx is not None:
        _add_input_gradient(dx, segment.rows, dh, a.to(dh.dtype), bits)
    da = None
    if needed[0]:
        part = part if bits is None else dropped_into(bits, part)
        da = product(dh, part.reshape(-1, x.shape[-1])).to(a.dtype)
    return da, db


def _add_input_gradient(dx: Tensor, rows: Rows, dh: Tensor, a: Tensor, bits: Tensor | None) -> None:
    whole = rows is None or isinstance(rows, slice)
    target = take(dx, rows) if whole else None
    if target is not None and bits is None and dx.dtype == dh.dtype:
        add_product(target.view(-1, dx.shape[-1]), dh.t(), a, 1.0)
        return
    update = product(dh.t(), a).view(-1, *dx.shape[1:])
    if bits is not None:
        drop_(update, bits)
    if target is not None:
        target.add_(update)
    else:
        assert isinstance(rows, Tensor)
        dx.index_add_(0, rows, update.to(dx.dtype))
