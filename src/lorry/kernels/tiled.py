"""The hot operation on a GPU for a dense layer: tile by tile, the update inside the layer's own product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorry.kernels.dropout import room
from lorry.kernels.grouped import has_kernels
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.tiles import TileTable

if TYPE_CHECKING:
    from lorry.kernels.triton_tiles import TiledProducts

_HALF = (torch.float16, torch.bfloat16)
_TYPES = (*_HALF, torch.float32, torch.float64)


def tileable(x: Tensor, weight: Tensor | None, segments: Sequence[Segment], factors: Sequence[LowRankPair]) -> bool:
    """Whether the kernels carry this layer: on a GPU (or in Triton's interpreter), dense in the type of x, no gains,
    factors of one type.

    On a GPU products of exact float32 or float64 are left to its library: without tensor cores, tiles of this size do
    not fit its registers.
    """
    if weight is None or not factors or not has_kernels(x) or not x.numel():
        return False
    if x.is_cuda and x.dtype not in _HALF and not (x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32):
        return False
    kinds = {t.dtype for f in factors for t in (f.a, f.b)}
    return (
        len(kinds) == 1
        and kinds <= {*_TYPES}
        and weight.dtype == x.dtype in _TYPES
        and all(f.gain is None for f in factors)
        and (room(x.shape[-1]) > 0 or all(s.p <= 0 for s in segments))
    )


def tiled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: TileTable,
    segments: Sequence[Segment],
    factors: Sequence[LowRankPair],
) -> Tensor:
    """Return what `lorry.kernels.lowrank.reference` does, with its gradients.

    Parameters
    ----------
    x
        Input ``(rows, ..., in)``.
    weight, bias
        The dense frozen weight ``(out, in)`` and its bias.
    table
        How the tokens of x lie; see `lorry.kernels.tiles.tile_table`.
    segments, factors
        The rows of each adapter, and what they multiply with.
    """
    flat = [t for f in factors for t in (f.a, f.b)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *flat)):
        result: Tensor = _TiledLinear.apply(x, weight, bias, table, tuple(segments), *flat)  # type: ignore[no-untyped-call]
        return result
    with torch.cuda.device_of(x):
        out = _products(x, weight, bias, table, segments, flat).forward()[0]
    return out.view(*x.shape[:-1], len(weight))


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: TileTable,
    segments: Sequence[Segment],
    flat: Sequence[Tensor],
) -> TiledProducts:
    from lorry.kernels.triton_tiles import TiledProducts

    return TiledProducts(table, x, weight, bias, segments, flat[::2], flat[1::2])


class _TiledLinear(torch.autograd.Function):
    """Kept for the backward pass: x, the weight, the factors, and the rank units, which are thin."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: TileTable,
        segments: tuple[Segment, ...],
        *flat: Tensor,
    ) -> Tensor:
        with torch.cuda.device_of(x):  # Triton starts its kernels on the current device
            out, units = _products(x, weight, bias, table, segments, flat).forward()
        ctx.table, ctx.segments = table, segments
        ctx.save_for_backward(x, weight, units, *flat)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, units, *flat = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dy = grad.reshape(-1, grad.shape[-1]).contiguous()
        with torch.cuda.device_of(x):
            # made anew: what is saved may have been moved away and brought back elsewhere
            products = _products(x, weight, None, ctx.table, ctx.segments, flat)
            dx, das, dbs = products.backward(dy, units, need_x=need_x, need_a=any(need[::2]), need_b=any(need[1::2]))
        grads = [
            part[i // 2] if needed and part is not None else None
            for i, (needed, part) in enumerate(zip(need, (das, dbs) * len(ctx.segments), strict=True))
        ]
        return (None if dx is None else dx.view(x.shape), None, None, None, None, *grads)
