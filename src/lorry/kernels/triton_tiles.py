"""Triton kernels for a dense frozen layer with low-rank updates, one adapter or many, that read the wide tensors as few
times as can be (LoRAFusion, arXiv 2510.00206).

The graph is cut at the thin tensors, the rank units S ``(tokens, rank)`` and their gradient dS: K1 `_project` gives
``S = drop(X) Aᵀ``; K2 `_product` starts each tile of ``X Wᵀ`` from ``scale · S Bᵀ``; K3 `_gradients` reads dY once for
dB and dS; `_outer` gives ``dA = dSᵀ drop(X)``; and K4, which is `_product` again, starts each tile of ``dY W`` from the
masked ``dS A``. Base rows see X, adapters the dropped X, whose mask is found anew from the seed in every kernel.

A tile has tokens of one segment, so any number of adapters share a launch, each with its own rank, scale, dropout and
seed. What belongs to a segment lies in a small table in the memory of the device; factors are read where they lie and
cast as they are read. Every load and store is masked, sums are in float32 (float64 for float64), and a product of
float32 tiles has the precision that PyTorch is set to. Nothing here waits for the device.
"""

from __future__ import annotations

import struct
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.dropout import ROW_STEP, kept_scale, pool, room, seed_key
from lorry.kernels.triton_tuning import INTERPRETED, tuned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorry.kernels.segments import Segment
    from lorry.kernels.tiles import TileTable

# rows of the table of segments
_A: tl.constexpr = tl.constexpr(0)
_B: tl.constexpr = tl.constexpr(1)
_RANK: tl.constexpr = tl.constexpr(2)
_KEY: tl.constexpr = tl.constexpr(3)
_POOL: tl.constexpr = tl.constexpr(4)
_KEEP: tl.constexpr = tl.constexpr(5)
_BEGIN: tl.constexpr = tl.constexpr(6)
_UNITS: tl.constexpr = tl.constexpr(7)
_GRAD_A: tl.constexpr = tl.constexpr(8)
_GRAD_B: tl.constexpr = tl.constexpr(9)

_STEP: tl.constexpr = tl.constexpr(ROW_STEP)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(tiles, token, pid, sub, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile's segment, the sorted places of `ROWS` of its tokens, which of them are real, and the tokens."""
    segment = tl.load(tiles + 3 * pid)
    rows = tl.load(tiles + 3 * pid + 1) + sub * ROWS + tl.arange(0, ROWS)
    live = rows < tl.load(tiles + 3 * pid + 2)
    return segment, rows, live, tl.load(token + rows, mask=live, other=0).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _factor(table, count, segment, which, KIND: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a segment's rank, the rank as a stride (`SAME`, where all have one), and where one of its factors lies."""
    rank = tl.load(table + _RANK * count + segment).to(tl.int32)
    factor = tl.load(table + which * count + segment).to(tl.pointer_type(KIND))
    if ALIGNED:
        factor = tl.multiple_of(factor, 16)
    step = rank
    if SAME > 0:
        step = SAME
    return rank, step, factor


@triton.jit
def _flags(table, count, segment, rows, positions, room):  # type: ignore[no-untyped-def]
    """Return the pool of keep flags, where each token's window in it begins (see `lorry.kernels.dropout`), whether its
    segment drops, and the factor of what is kept.
    """
    local = rows - tl.load(table + _BEGIN * count + segment).to(tl.int32)
    bits = (local // positions).to(tl.uint32) * _STEP + (local % positions).to(tl.uint32)
    bits = bits ^ tl.load(table + _KEY * count + segment).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    address = tl.load(table + _POOL * count + segment)
    keep = tl.load(table + _KEEP * count + segment).to(tl.float64, bitcast=True)
    shift = (bits.to(tl.int64) % room).to(tl.int32)
    return address.to(tl.pointer_type(tl.uint8)), shift, (rows * 0 + address) != 0, keep


@tuned("project")
@triton.jit  # type: ignore[untyped-decorator]
def _project(  # type: ignore[no-untyped-def]
    x, units, scale, table, tiles, token, count, which, width, x_stride, positions, room,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr,
    MATH: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr,
    TURNED: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``units[t, r] = scale · Σ_k drop(x[t, k]) · factor[r, k]``; with `TURNED`, the factor is stored as ``[k, r]``."""
    subs: tl.constexpr = HEIGHT // ROWS
    segment, rows, live, at = _tile(tiles, token, tl.program_id(0) // subs, tl.program_id(0) % subs, ROWS)
    rank, step, factor = _factor(table, count, segment, which, KIND, SAME, ALIGNED)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    if DROP:
        flags, window, drops, keep = _flags(table, count, segment, rows, positions, room)
    total = tl.zeros((ROWS, RANK), dtype=SUM)
    for k0 in range(0, tl.where(tl.program_id(1) * RANK < rank, width, 0), INNER):
        k = k0 + tl.arange(0, INNER)
        here = live[:, None] & (k < width)[None, :]
        part = tl.load(x + at[:, None] * x_stride + k[None, :], mask=here, other=0.0)
        if DROP:
            kept = tl.load(flags + (window[:, None] + k[None, :]), mask=here & drops[:, None], other=1)
            part = tl.where(kept != 0, part, 0.0)
        there = (k < width)[:, None] & (r < rank)[None, :]
        if TURNED:
            thin = tl.load(factor + k[:, None].to(tl.int64) * step + r[None, :], mask=there, other=0.0)
        else:
            thin = tl.load(factor + r[None, :].to(tl.int64) * width + k[:, None], mask=there, other=0.0)
        thin = thin.to(x.dtype.element_ty).to(MATH)
        total = tl.dot(part.to(MATH), thin, total, input_precision=PRECISION, out_dtype=SUM)
    if DROP:
        total = total * keep.to(SUM)
    if SCALED:
        total = total * tl.load(scale + rows, mask=live, other=0.0).to(SUM)[:, None]
    local = rows - tl.load(table + _BEGIN * count + segment).to(tl.int32)
    where = units + tl.load(table + _UNITS * count + segment) + local[:, None].to(tl.int64) * step + r[None, :]
    tl.store(where, total, mask=live[:, None] & (r < rank)[None, :])


@tuned("product")
@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    y, x, weight, bias, units, scale, table, tiles, token, count, which, height_in_tiles, inner, outer,
    y_stride, x_stride, inner_stride, outer_stride, positions, room,
    HEIGHT: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
    KIND: tl.constexpr, MATH: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    ALIGNED: tl.constexpr, TURNED: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``y[t, n] = scale · mask(Σ_r units[t, r] · factor[r, n]) + Σ_k x[t, k] · weight[k, n] + bias[n]``.

    Tiles are taken in groups, so that those which run together share what they read of x and of the weight.
    """
    in_group = GROUP * tl.cdiv(outer, OUTER)
    first = tl.program_id(0) // in_group * GROUP
    tall = tl.minimum(height_in_tiles - first, GROUP)
    segment, rows, live, at = _tile(tiles, token, first + tl.program_id(0) % in_group % tall, 0, HEIGHT)
    rank, step, factor = _factor(table, count, segment, which, KIND, SAME, ALIGNED)
    n = tl.program_id(0) % in_group // tall * OUTER + tl.arange(0, OUTER)
    inside = n < outer
    here = live[:, None] & inside[None, :]
    total = tl.zeros((HEIGHT, OUTER), dtype=SUM)
    local = rows - tl.load(table + _BEGIN * count + segment).to(tl.int32)
    thin_rows = units + tl.load(table + _UNITS * count + segment) + local.to(tl.int64) * step
    for r0 in tl.range(0, rank, RANK, num_stages=1):
        r = r0 + tl.arange(0, RANK)
        left = tl.load(thin_rows[:, None] + r[None, :], mask=live[:, None] & (r < rank)[None, :], other=0.0)
        there = (r < rank)[:, None] & inside[None, :]
        if TURNED:
            thin = tl.load(factor + n[None, :].to(tl.int64) * step + r[:, None], mask=there, other=0.0)
        else:
            thin = tl.load(factor + r[:, None].to(tl.int64) * outer + n[None, :], mask=there, other=0.0)
        left, thin = left.to(x.dtype.element_ty).to(MATH), thin.to(x.dtype.element_ty).to(MATH)
        total = tl.dot(left, thin, total, input_precision=PRECISION, out_dtype=SUM)
    if DROP:
        flags, window, drops, keep = _flags(table, count, segment, rows, positions, room)
        kept = tl.load(flags + (window[:, None] + n[None, :]), mask=here & drops[:, None], other=1)
        total = tl.where(kept != 0, total * keep.to(SUM), 0.0)
    if SCALED:
        total = total * tl.load(scale + rows, mask=live, other=0.0).to(SUM)[:, None]
    # one wide address for a tile and narrow steps within it: addresses of their own would fill the registers
    right = weight + (tl.program_id(0) % in_group // tall * OUTER).to(tl.int64) * outer_stride
    steps = tl.arange(0, INNER)[:, None] * inner_stride + tl.arange(0, OUTER)[None, :] * outer_stride
    for k0 in range(0, inner, INNER):
        k = k0 + tl.arange(0, INNER)
        part = tl.load(x + at[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < inner)[None, :], other=0.0)
        wide = tl.load(right + steps, mask=(k < inner)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(part.to(MATH), wide.to(MATH), total, input_precision=PRECISION, out_dtype=SUM)
        right += INNER * inner_stride
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(SUM)[None, :]
    tl.store(y + at[:, None] * y_stride + n[None, :], total, mask=here)


@tuned("gradients")
@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    dy, units, grad_units, grad_b, scale, table, tiles, token, count, outer, dy_stride,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr,
    KIND: tl.constexpr, MATH: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Read dY once: ``grad_units[t, r] += scale Σ_n dy[t, n] · B[n, r]``, ``grad_b[n, r] += scale Σ_t dy[t, n] ·
    units[t, r]``, both begun with zeros.
    """
    subs: tl.constexpr = HEIGHT // ROWS
    segment, rows, live, at = _tile(tiles, token, tl.program_id(0) // subs, tl.program_id(0) % subs, ROWS)
    rank, step, b = _factor(table, count, segment, _B, KIND, SAME, ALIGNED)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    local = rows - tl.load(table + _BEGIN * count + segment).to(tl.int32)
    place = tl.load(table + _UNITS * count + segment) + local[:, None].to(tl.int64) * step + r[None, :]
    thin = live[:, None] & (r < rank)[None, :]
    factor = tl.load(scale + rows, mask=live, other=0.0).to(SUM)[:, None]
    left = tl.load(units + place, mask=thin, other=0.0).to(SUM) * factor
    left = left.to(dy.dtype.element_ty).to(MATH)
    into = grad_b + tl.load(table + _GRAD_B * count + segment)
    total = tl.zeros((ROWS, RANK), dtype=SUM)
    first = tl.program_id(1) * BLOCKS * OUTER
    last = tl.where(tl.program_id(2) * RANK < rank, tl.minimum(first + BLOCKS * OUTER, outer), first)
    for n0 in range(first, last, OUTER):
        n = n0 + tl.arange(0, OUTER)
        part = tl.load(
            dy + at[:, None] * dy_stride + n[None, :], mask=live[:, None] & (n < outer)[None, :], other=0.0
        ).to(MATH)
        there = (n < outer)[:, None] & (r < rank)[None, :]
        cell = n[:, None].to(tl.int64) * step + r[None, :]
        column = tl.load(b + cell, mask=there, other=0.0).to(dy.dtype.element_ty).to(MATH)
        total = tl.dot(part, column, total, input_precision=PRECISION, out_dtype=SUM)
        grad = tl.dot(tl.trans(part), left, input_precision=PRECISION, out_dtype=SUM)
        tl.atomic_add(into + cell, grad, mask=there, sem="relaxed")
    tl.atomic_add(grad_units + place, total * factor, mask=thin, sem="relaxed")


@tuned("outer")
@triton.jit  # type: ignore[untyped-decorator]
def _outer(  # type: ignore[no-untyped-def]
    units, x, grads, scale, table, spans, token, count, which, width, x_stride, positions, room,
    ROWS: tl.constexpr, OUTER: tl.constexpr, RANK: tl.constexpr, MATH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, SAME: tl.constexpr, TURNED: tl.constexpr, DROP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``grads[r, k] += Σ_t scale · units[t, r] · drop(x[t, k])``, begun with zeros, over the tokens of one span."""
    segment = tl.load(spans + 3 * tl.program_id(0))
    first = tl.load(spans + 3 * tl.program_id(0) + 1)
    rank = tl.load(table + _RANK * count + segment).to(tl.int32)
    step = rank
    if SAME > 0:
        step = SAME
    begin = tl.load(table + _BEGIN * count + segment).to(tl.int32)
    base = units + tl.load(table + _UNITS * count + segment)
    k = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, OUTER), dtype=SUM)
    last = tl.load(spans + 3 * tl.program_id(0) + 2)
    for t0 in range(first, tl.where(tl.program_id(2) * RANK < rank, last, first), ROWS):
        rows = t0 + tl.arange(0, ROWS)
        live = rows < last
        at = tl.load(token + rows, mask=live, other=0).to(tl.int64)
        place = base + (rows - begin)[None, :].to(tl.int64) * step + r[:, None]
        thin = tl.load(place, mask=live[None, :] & (r < rank)[:, None], other=0.0)
        if SCALED:
            thin = thin.to(SUM) * tl.load(scale + rows, mask=live, other=0.0).to(SUM)[None, :]
        here = live[:, None] & (k < width)[None, :]
        part = tl.load(x + at[:, None] * x_stride + k[None, :], mask=here, other=0.0)
        if DROP:
            flags, window, drops, keep = _flags(table, count, segment, rows, positions, room)
            kept = tl.load(flags + (window[:, None] + k[None, :]), mask=here & drops[:, None], other=1)
            part = tl.where(kept != 0, part, 0.0)
        thin = thin.to(x.dtype.element_ty).to(MATH)
        total = tl.dot(thin, part.to(MATH), total, input_precision=PRECISION, out_dtype=SUM)
    if DROP:
        total = total * tl.load(table + _KEEP * count + segment).to(tl.float64, bitcast=True).to(SUM)
    there = (r < rank)[:, None] & (k < width)[None, :]
    if TURNED:
        cell = k[None, :].to(tl.int64) * step + r[:, None]
    else:
        cell = r[:, None].to(tl.int64) * width + k[None, :]
    tl.atomic_add(grads + tl.load(table + which * count + segment) + cell, total, mask=there, sem="relaxed")


_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
#: Rank units of a block: a product takes 16 at least, and a block with more costs registers.
_LEAST_RANK, _MOST_RANK = 16, 32
#: Tokens whose share of the gradient of A one program sums up.
_SPAN = 1024


class TiledProducts:
    """The products of one layer for a batch, forward and backward.

    Parameters
    ----------
    table
        How the tokens lie.
    x
        The layer's input, ``(rows, ..., in)``.
    weight, bias
        Frozen, ``(out, in)`` in the type of x and ``(out,)`` or None.
    segments
        As in the table.
    a, b
        A ``(rank, in)`` and B ``(out, rank)`` of each segment, all of one type.
    """

    def __init__(
        self,
        table: TileTable,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segments: Sequence[Segment],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
    ) -> None:
        self.table, self.weight, self.bias = table, weight, bias
        # unit strides along the width; the copies, if any, live as long as the kernels that are sent with them
        self.x = x.reshape(-1, x.shape[-1]).contiguous()
        self.a, self.b = [t.detach().contiguous() for t in a], [t.detach().contiguous() for t in b]
        self.drops = any(s.p > 0 for s in segments)
        ranks = [len(t) for t in self.a]
        begin, each = table.begin, range(len(segments))
        self.starts = {
            "units": list(accumulate(((begin[i + 1] - begin[i]) * ranks[i] for i in each), initial=0)),
            "a": list(accumulate((t.numel() for t in self.a), initial=0)),
            "b": list(accumulate((t.numel() for t in self.b), initial=0)),
        }
        self._pools = {s.p: pool(s.p, x.device) for s in segments if s.p > 0}
        columns = [
            [
                self.a[i].data_ptr(), self.b[i].data_ptr(), ranks[i], seed_key(segments[i].seed),
                self._pools[segments[i].p].data_ptr() if segments[i].p > 0 else 0, _bits(kept_scale(segments[i].p)),
                begin[i], *(self.starts[name][i] for name in ("units", "a", "b")),
            ]
            for i in each
        ]  # fmt: skip
        columns.append([0, 0, 0, 0, 0, _bits(1.0), begin[-1], 0, 0, 0])  # tokens without an adapter
        rows = torch.tensor(columns, dtype=torch.int64).t().contiguous()
        self._rows, self._count = rows.to(x.device, non_blocking=True), len(columns)
        most = max(ranks, default=0)
        block = _LEAST_RANK if most <= _LEAST_RANK else _MOST_RANK
        self._rank_blocks = triton.cdiv(most, block)
        exact = x.dtype == torch.float64
        self._fixed = {
            "RANK": block,
            # the interpreter multiplies the bits of half precision as if they were numbers
            "MATH": tl.float32 if INTERPRETED and not exact else _TYPES[x.dtype],
            "SUM": tl.float64 if exact else tl.float32,
            "PRECISION": "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "SAME": most if len(set(ranks)) == 1 else 0,
        }
        self._sum = torch.float64 if exact else torch.float32
        self._factors = {
            "KIND": _TYPES[self.a[0].dtype] if self.a else tl.float32,
            "ALIGNED": all(t.data_ptr() % 16 == 0 for t in (*self.a, *self.b)),
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output ``(tokens, out)``, and the rank units of all segments, flat, for `backward`."""
        units = torch.empty(self.starts["units"][-1], dtype=self.x.dtype, device=self.x.device)
        out = self.x.new_empty(len(self.x), len(self.weight))
        strides = (self.weight.stride(1), self.weight.stride(0))
        with torch.cuda.device_of(self.x):
            self._project(units, self.x, _A.value, turned=False, drop=self.drops, scaled=False)
            self._product(out, self.x, strides, units, _B.value, drop=False, scaled=True, bias=self.bias)
        return out, units

    def backward(
        self, dy: Tensor, units: Tensor, *, need_x: bool, need_a: bool, need_b: bool
    ) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
        """Return the gradients of x ``(tokens, in)``, of all A and of all B, as far as they are needed.

        Parameters
        ----------
        dy
            Gradient of the output, ``(tokens, out)``, with unit stride along the width.
        units
            What `forward` returned.
        need_x, need_a, need_b
            What is needed.
        """
        grad_a = dx = None
        with torch.cuda.device_of(self.x):
            grad_units, grad_b = self._through_b(dy, units, need_units=need_x or need_a, need_b=need_b)
            if need_a:
                grad_a = self._zeros("a")
                self._outer(grad_a, grad_units, self.x, _GRAD_A.value, turned=False, drop=self.drops, scaled=False)
            if need_x:
                dx, strides = torch.empty_like(self.x), self.weight.stride()
                self._product(dx, dy, strides, grad_units, _A.value, drop=self.drops, scaled=False, bias=None)
        return dx, self._split("a", grad_a), self._split("b", grad_b)

    def _through_b(self, dy: Tensor, units: Tensor, *, need_units: bool, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the rank units and of all B, flat.

        Where both are needed dy is read once and its tiles' shares are added in the order in which they come; where
        PyTorch is asked for deterministic algorithms, twice and in order.
        """
        grad_units = torch.zeros(self.starts["units"][-1], dtype=self._sum, device=dy.device)
        grad_b = self._zeros("b") if need_b else None
        if need_units and grad_b is not None and not torch.are_deterministic_algorithms_enabled():
            tiles, height = self.table.tiles(), self.table.height
            width = len(self.weight)
            _gradients[
                lambda size: (
                    len(tiles) * (height // size["ROWS"]),
                    triton.cdiv(width, size["OUTER"] * size["BLOCKS"]),
                    self._rank_blocks,
                )
            ](
                dy, units, grad_units, grad_b, self.table.scale, self._rows, tiles, self.table.token, self._count,
                width, dy.stride(0), HEIGHT=height, **self._fixed, **self._factors,
            )  # fmt: skip
            return grad_units, grad_b
        if need_units:
            self._project(grad_units, dy, _B.value, turned=True, drop=False, scaled=True)
        if grad_b is not None:
            self._outer(grad_b, units, dy, _GRAD_B.value, turned=True, drop=False, scaled=True)
        return grad_units, grad_b

    def _project(self, units: Tensor, x: Tensor, which: int, *, turned: bool, drop: bool, scaled: bool) -> None:
        tiles, height = self.table.tiles(), self.table.height
        if not len(tiles):
            return
        _project[lambda size: (len(tiles) * (height // size["ROWS"]), self._rank_blocks)](
            x, units, self.table.scale, self._rows, tiles, self.table.token, self._count, which, x.shape[-1],
            x.stride(0), self.table.positions, max(room(x.shape[-1]), 1), HEIGHT=height, TURNED=turned, DROP=drop,
            SCALED=scaled, **self._fixed, **self._factors,
        )  # fmt: skip

    def _product(
        self, y: Tensor, x: Tensor, strides: tuple[int, ...], units: Tensor, which: int,
        *, drop: bool, scaled: bool, bias: Tensor | None,
    ) -> None:  # fmt: skip
        tiles, outer = self.table.tiles(bare=True), y.shape[-1]
        _product[lambda size: (len(tiles) * triton.cdiv(outer, size["OUTER"]),)](
            y, x, self.weight, x if bias is None else bias, units, self.table.scale, self._rows, tiles,
            self.table.token, self._count, which, len(tiles), x.shape[-1], outer, y.stride(0), x.stride(0), *strides,
            self.table.positions, max(room(outer), 1), HEIGHT=self.table.height, TURNED=which == _B.value, DROP=drop,
            SCALED=scaled, BIAS=bias is not None, **self._fixed, **self._factors,
        )  # fmt: skip

    def _outer(
        self, grads: Tensor, units: Tensor, x: Tensor, which: int, *, turned: bool, drop: bool, scaled: bool
    ) -> None:
        spans = self.table.tiles(0 if torch.are_deterministic_algorithms_enabled() else _SPAN)
        if not len(spans):
            return
        _outer[lambda size: (len(spans), triton.cdiv(x.shape[-1], size["OUTER"]), self._rank_blocks)](
            units, x, grads, self.table.scale, self._rows, spans, self.table.token, self._count, which, x.shape[-1],
            x.stride(0), self.table.positions, max(room(x.shape[-1]), 1), TURNED=turned, DROP=drop, SCALED=scaled,
            **self._fixed,
        )  # fmt: skip

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros(self.starts[name][-1], dtype=self._sum, device=self.x.device)

    def _split(self, name: str, flat: Tensor | None) -> list[Tensor] | None:
        """Return the gradient of each factor, in the factor's type, from those of all."""
        if flat is None:
            return None
        factors, starts = (self.a if name == "a" else self.b), self.starts[name]
        parts = [flat[first:last] for first, last in pairwise(starts)]
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, factors, strict=True)]


def choices() -> dict[str, dict[str, str]]:
    """Return the sizes of tiles that were found best so far: for each kernel, by what they hold for."""
    kernels = {"project": _project, "product": _product, "gradients": _gradients, "outer": _outer}
    return {name: {str(key): str(found) for key, found in each.cache.items()} for name, each in kernels.items()}


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found
