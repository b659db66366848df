"""Batches of many adapters with few tokens each: one batched product for all adapters of a rank instead of one for
each.

In decoding a row is one token, and a product for each adapter would be a matrix times a vector behind a call's
overhead. The stacked factors are worth keeping as long as the composition of the batch lasts, since every further
token uses them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorry.kernels.segments import LowRankPair, Segment

#: Tokens of an adapter up to which a batched product costs less than a call for each adapter.
_FEW_TOKENS = 8
#: Adapters from which it does.
_MANY = 4


class Prepared(Protocol):
    """The updates of a batch at one site, made ready before."""

    def serves(self, x: Tensor) -> bool:
        """Whether they are for an input like this."""

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add them to the layer's output in place, and return it."""


@dataclass(frozen=True)
class Stacked:
    """LowRankPair of a batch, ready for batched products.

    Attributes
    ----------
    groups
        For each rank and number of rows: the rows (None for all, in order), A ``(adapters, rank, in)`` and the scaled
        Bᵀ ``(adapters, rank, out)``, in the type in which they are multiplied.
    rows
        Length of the batch.
    adapters
        Number of segments.
    """

    groups: tuple[tuple[Tensor | None, Tensor, Tensor], ...]
    rows: int
    adapters: int

    def serves(self, x: Tensor) -> bool:
        """Whether the batched products are the better way for an input of this shape."""
        return len(x) == self.rows and _few(x, self.adapters)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the updates of all segments to `out` in place."""
        return add_stacked(out, x, self)


def worth_stacking(x: Tensor, segments: Sequence[Segment], factors: Sequence[LowRankPair]) -> bool:
    """Whether the segments are many and short, without dropout and gains."""
    if len(segments) < _MANY or x.ndim < 2 or not _few(x, len(segments)):
        return False
    return all(s.p == 0 and f.gain is None for s, f in zip(segments, factors, strict=True))


def _few(x: Tensor, adapters: int) -> bool:
    return x.numel() <= _FEW_TOKENS * adapters * x.shape[-1]


def add_stacked(out: Tensor, x: Tensor, stacked: Stacked) -> Tensor:
    """Add the updates of all segments to `out` in place."""
    for index, a, b in stacked.groups:
        part = x if index is None else x.index_select(0, index)
        tokens = part.to(a.dtype).reshape(len(a), -1, part.shape[-1])
        h = torch.bmm(tokens, a.mT)
        if index is None and out.dtype == b.dtype and out.is_contiguous():
            out.view(len(a), -1, out.shape[-1]).baddbmm_(h, b)
            continue
        update = torch.bmm(h, b).view(len(part), *out.shape[1:])
        if index is None:
            out.add_(update)
        else:
            out.index_add_(0, index, update.to(out.dtype))
    return out


def stack(x: Tensor, segments: Sequence[Segment], factors: Sequence[LowRankPair], dtype: torch.dtype) -> Stacked:
    """Stack the factors of segments of one rank and one number of rows; rows with weights of their own count singly.

    On the CPU they are kept in float32 where `dtype` is narrower: batched products of a token each are several times
    faster so, and the update is rounded once.
    """
    if x.device.type == "cpu" and dtype.itemsize < 4:
        dtype = torch.float32
    every = torch.arange(len(x), device=x.device)
    grouped: dict[tuple[int, int], list[tuple[Tensor, LowRankPair, float]]] = {}
    for segment, f in zip(segments, factors, strict=True):
        rows = every if segment.rows is None else every[segment.rows]
        factor = segment.factor(torch.float64)
        if isinstance(factor, float):
            grouped.setdefault((len(f.a), len(rows)), []).append((rows, f, factor))
            continue
        for row, scale in zip(rows.split(1), factor.tolist(), strict=True):
            grouped.setdefault((len(f.a), 1), []).append((row, f, scale))
    groups = []
    for parts in grouped.values():
        rows = torch.cat([r for r, _, _ in parts])
        whole = len(rows) == len(x) and torch.equal(rows, every)
        a = torch.stack([f.a for _, f, _ in parts]).to(dtype)
        b = torch.stack([f.b.t() for _, f, _ in parts]).to(dtype)
        scales = torch.tensor([scale for _, _, scale in parts], dtype=torch.float64)
        groups.append((None if whole else rows, a, b.mul_(scales.to(x.device, dtype).view(-1, 1, 1))))
    return Stacked(tuple(groups), len(x), len(segments))
