"""Triton kernels for batches whose rows use different adapters: ranks unpadded, factors read where they lie.

Three kernels serve forward and backward: `_shrink` (tokens times a thin matrix), `_expand` (its counterpart, added in
place) and `_outer` (gradients of the factors, a segment at a time). Each segment's factors are reached by address, so
nothing is stacked or copied; float32 factors are cast as they are read. Dropout reads its window of the pool of
`lorry.kernels.dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _INNER, _OUTER = 16, 64, 64


@dataclass(frozen=True)
class RowPlan:
    """Which tokens belong to which segment; worked out once for a batch and used by every layer.

    Attributes
    ----------
    token
        Indices of the flattened tokens, sorted by segment, ``(sorted,)``.
    start
        Where each segment begins in `token`, ``(segments + 1,)``.
    block_segment, block_start
        Segment and first sorted position of each block of tokens.
    scale
        Factor of each sorted token, float32.
    """

    token: Tensor
    start: Tensor
    block_segment: Tensor
    block_start: Tensor
    scale: Tensor

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self.start) - 1


def plan_rows(rows: Sequence[Tensor], scales: Sequence[float | Tensor], tokens: int, device: torch.device) -> RowPlan:
    """Lay out segments given by the row indices of each, for rows of `tokens` tokens each."""
    token: list[Tensor] = []
    scale: list[Tensor] = []
    start, blocks, firsts = [0], list[int](), list[int]()
    for number, (index, factor) in enumerate(zip(rows, scales, strict=True)):
        flat = (index.cpu()[:, None] * tokens + torch.arange(tokens)).reshape(-1)
        spread = torch.full((len(index),), factor) if isinstance(factor, float) else factor.cpu().float()
        token.append(flat)
        scale.append(spread.repeat_interleave(tokens))
        blocks += [number] * -(-len(flat) // _TOKENS)
        firsts += range(start[-1], start[-1] + len(flat), _TOKENS)
        start.append(start[-1] + len(flat))
    where = [torch.cat(token), torch.tensor(start), torch.tensor(blocks), torch.tensor(firsts)]
    order, begin, segment, first = (t.to(device, torch.int32) for t in where)
    return RowPlan(order, begin, segment, first, torch.cat(scale).to(device, torch.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]
    factors, ranks, token, start, block_segment, block_start, rank_step, width_step,
    TOKENS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Return where this program's block of tokens lies, which of its positions are real, and their segment's factor."""
    block = tl.program_id(0)
    segment = tl.load(block_segment + block)
    rows = tl.load(block_start + block) + tl.arange(0, TOKENS)
    live = rows < tl.load(start + segment + 1)
    at = tl.load(token + rows, mask=live, other=0)
    rank = tl.load(ranks + segment)
    factor = tl.load(factors + segment).to(tl.pointer_type(KIND))
    # a factor is stored with its own rank as stride where rank is the last dimension
    step_r = tl.where(rank_step == 0, 1, rank_step)
    step_k = tl.where(width_step == 0, rank, width_step)
    return rows, live, at, rank, factor, step_r, step_k


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x, h, factors, ranks, token, start, block_segment, block_start, scale, pool, window, keep,
    width, x_stride, h_stride, rank_step, width_step,
    TOKENS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr,
    DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``h[t, r] = Σ_k drop(x[token t, k]) · factor[r, k]`` for one block of tokens of one segment."""
    rows, live, at, rank, factor, step_r, step_k = _block(
        factors, ranks, token, start, block_segment, block_start, rank_step, width_step, TOKENS, KIND
    )
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    shift = tl.load(window + rows, mask=live, other=0) if DROP else at
    for k0 in range(0, width, INNER):
        k = k0 + tl.arange(0, INNER)
        inside = k < width
        part = tl.load(x + at[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            kept = tl.load(pool + shift[:, None] + k[None, :], mask=live[:, None] & inside[None, :], other=0)
            part = tl.where(kept != 0, part, 0.0)
        column = tl.load(
            factor + r[None, :] * step_r + k[:, None] * step_k, mask=(r[None, :] < rank) & inside[:, None], other=0.0
        )
        total += tl.dot(part, column.to(part.dtype), allow_tf32=False)
    if SCALED:
        total = total * tl.load(scale + rows, mask=live, other=0.0)[:, None]
    total = total * keep
    tl.store(h + rows[:, None] * h_stride + r[None, :], total, mask=live[:, None] & (r[None, :] < rank))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    y, h, factors, ranks, token, start, block_segment, block_start, scale, pool, window, keep,
    width, y_stride, h_stride, rank_step, width_step,
    TOKENS: tl.constexpr, RANK: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr,
    DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``y[token t, n] += Σ_r h[t, r] · factor[n, r]`` for one block of tokens and one of columns."""
    rows, live, at, rank, factor, step_r, step_n = _block(
        factors, ranks, token, start, block_segment, block_start, rank_step, width_step, TOKENS, KIND
    )
    r = tl.arange(0, RANK)
    n = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    inside = n < width
    units = tl.load(h + rows[:, None] * h_stride + r[None, :], mask=live[:, None] & (r[None, :] < rank), other=0.0)
    if SCALED:
        units = units * tl.load(scale + rows, mask=live, other=0.0)[:, None]
    columns = tl.load(
        factor + r[:, None] * step_r + n[None, :] * step_n, mask=(r[:, None] < rank) & inside[None, :], other=0.0
    )
    update = tl.dot(units, columns.to(tl.float32), allow_tf32=False) * keep
    if DROP:
        shift = tl.load(window + rows, mask=live, other=0)
        kept = tl.load(pool + shift[:, None] + n[None, :], mask=live[:, None] & inside[None, :], other=0)
        update = tl.where(kept != 0, update, 0.0)
    where = y + at[:, None] * y_stride + n[None, :]
    here = live[:, None] & inside[None, :]
    tl.store(where, tl.load(where, mask=here, other=0.0) + update.to(y.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _outer(  # type: ignore[no-untyped-def]
    left, right, results, ranks, token, start, scale, pool, window, keep,
    width, left_stride, right_stride, rank_step, width_step,
    TOKENS: tl.constexpr, RANK: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr,
    DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``result[r, n] = Σ_t left[t, r] · drop(right[token t, n])`` for one segment and one block of columns."""
    segment = tl.program_id(0)
    rank = tl.load(ranks + segment)
    r = tl.arange(0, RANK)
    n = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    inside = n < width
    last = tl.load(start + segment + 1)
    total = tl.zeros((RANK, OUTER), dtype=tl.float32)
    for first in range(tl.load(start + segment), last, TOKENS):
        rows = first + tl.arange(0, TOKENS)
        live = rows < last
        at = tl.load(token + rows, mask=live, other=0)
        units = tl.load(
            left + rows[None, :] * left_stride + r[:, None], mask=live[None, :] & (r[:, None] < rank), other=0.0
        )
        if SCALED:
            units = units * tl.load(scale + rows, mask=live, other=0.0)[None, :]
        part = tl.load(right + at[:, None] * right_stride + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            shift = tl.load(window + rows, mask=live, other=0)
            kept = tl.load(pool + shift[:, None] + n[None, :], mask=live[:, None] & inside[None, :], other=0)
            part = tl.where(kept != 0, part, 0.0)
        total += tl.dot(units, part.to(tl.float32), allow_tf32=False)
    result = tl.load(results + segment).to(tl.pointer_type(KIND))
    step_r = tl.where(rank_step == 0, 1, rank_step)
    step_n = tl.where(width_step == 0, rank, width_step)
    here = (r[:, None] < rank) & inside[None, :]
    tl.store(result + r[:, None] * step_r + n[None, :] * step_n, (total * keep).to(KIND), mask=here)


_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Windows:
    """Dropout of the input: the pool of keep flags, each sorted token's offset into it, and 1/(1-p)."""

    pool: Tensor
    offset: Tensor
    factor: float


class GroupedRows:
    """The factors of a batch's segments at one layer, and the products with them.

    Parameters
    ----------
    plan
        Tokens of each segment.
    a, b
        A ``(rank, in)`` and B ``(out, rank)`` of each segment, contiguous, all of one type.
    windows
        Dropout of the input, or None.
    """

    def __init__(self, plan: RowPlan, a: Sequence[Tensor], b: Sequence[Tensor], windows: Windows | None = None) -> None:
        self.plan, self.a, self.b, self.windows = plan, list(a), list(b), windows
        device = plan.token.device
        addresses = torch.tensor([[t.data_ptr() for t in self.a], [t.data_ptr() for t in self.b]], dtype=torch.int64)
        self._addresses = addresses.to(device, non_blocking=True)
        self._ranks = torch.tensor([len(t) for t in self.a], dtype=torch.int32).to(device, non_blocking=True)
        self._most = max(len(t) for t in self.a)
        self._block = max(triton.next_power_of_2(self._most), 16)

    def _fixed(self) -> tuple[Any, ...]:
        p, w = self.plan, self.windows
        flags = (p.token, p.token, 1.0) if w is None else (w.pool, w.offset, w.factor)
        return p.token, p.start, p.block_segment, p.block_start, p.scale, *flags

    def _down(self, x: Tensor, which: int, *, drop: bool, scaled: bool) -> Tensor:
        """Return tokens times A (0) or Bᵀ (1) as ``(sorted tokens, largest rank)`` in float32."""
        width, plan = x.shape[-1], self.plan
        h = torch.zeros(len(plan.token), self._most, device=x.device, dtype=torch.float32)
        steps = (width, 1) if which == 0 else (0, 0)
        fixed = self._fixed() if drop else (*self._fixed()[:5], plan.token, plan.token, 1.0)
        _shrink[(len(plan.block_start),)](
            x, h, self._addresses[which], self._ranks, *fixed, width, x.stride(0), h.stride(0), *steps,
            TOKENS=_TOKENS, RANK=self._block, INNER=_INNER, KIND=_KINDS[self.a[0].dtype],
            DROP=drop and self.windows is not None, SCALED=scaled,
        )  # fmt: skip
        return h

    def _up(self, y: Tensor, h: Tensor, which: int, *, drop: bool, scaled: bool) -> None:
        """Add h times Bᵀ (1) or A (0) to the segments' tokens of y, in place."""
        width, plan = y.shape[-1], self.plan
        steps = (width, 1) if which == 0 else (0, 0)
        fixed = self._fixed() if drop else (*self._fixed()[:5], plan.token, plan.token, 1.0)
        _expand[(len(plan.block_start), triton.cdiv(width, _OUTER))](
            y, h, self._addresses[which], self._ranks, *fixed, width, y.stride(0), h.stride(0), *steps,
            TOKENS=_TOKENS, RANK=self._block, OUTER=_OUTER, KIND=_KINDS[self.a[0].dtype],
            DROP=drop and self.windows is not None, SCALED=scaled,
        )  # fmt: skip

    def _gradients(self, left: Tensor, right: Tensor, which: int, *, drop: bool, scaled: bool) -> list[Tensor]:
        results = [torch.empty_like(t) for t in (self.a if which == 0 else self.b)]
        addresses = torch.tensor([t.data_ptr() for t in results], dtype=torch.int64).to(right.device)
        width, plan = right.shape[-1], self.plan
        steps = (width, 1) if which == 0 else (0, 0)
        token, start, _, _, scale, *windows = self._fixed()
        flags = windows if drop else (plan.token, plan.token, 1.0)
        _outer[(plan.segments, triton.cdiv(width, _OUTER))](
            left, right, addresses, self._ranks, token, start, scale, *flags, width,
            left.stride(0), right.stride(0), *steps,
            TOKENS=_TOKENS, RANK=self._block, OUTER=_OUTER, KIND=_KINDS[results[0].dtype],
            DROP=drop and self.windows is not None, SCALED=scaled,
        )  # fmt: skip
        return results

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Add every segment's update to ``out (tokens, out)`` in place; return the rank units for `backward`."""
        with torch.cuda.device_of(x):
            h = self._down(x, 0, drop=True, scaled=False)
            self._up(out, h, 1, drop=False, scaled=True)
        return h

    def backward(self, dx: Tensor | None, dy: Tensor, x: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add the update's share to ``dx`` in place, and return the gradients of all A and all B."""
        with torch.cuda.device_of(x):
            dh = self._down(dy, 1, drop=False, scaled=True)
            if dx is not None:
                self._up(dx, dh, 0, drop=True, scaled=False)
            da = self._gradients(dh, x, 0, drop=True, scaled=False)
            return da, self._gradients(h, dy, 1, drop=False, scaled=True)
