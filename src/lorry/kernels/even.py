"""Segments that share a batch evenly (one rank, as many rows each, in order): one batched product for all of them.

A fleet of like jobs trains so. Each of its products is small, and the calls around them cost more than their
arithmetic: at width 512, 32 tokens a job, eight products of their own take several times what one batched product does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels.dropout import drop_, dropped_into, keep_bits, kept_scale
from lorry.kernels.products import emulated
from lorry.kernels.segments import LowRankPair, Segment


def shares_evenly(x: Tensor, segments: Sequence[Segment], factors: Sequence[LowRankPair]) -> bool:
    """Whether the segments are equal slices that fill the batch in order, with factors of one shape and type and no
    gain.
    """
    if len(segments) < 2 or len(x) % len(segments) or emulated(x):
        return False
    size = len(x) // len(segments)
    slices = [slice(i * size, (i + 1) * size) for i in range(len(segments))]
    alike = {(f.a.shape, f.b.shape, f.a.dtype, f.b.dtype) for f in factors}
    return [s.rows for s in segments] == slices and len(alike) == 1 and all(f.gain is None for f in factors)


class EvenRows:
    """The factors of a batch's segments at one layer, and the products with them.

    Parameters
    ----------
    x
        The layer's input, ``(rows, ..., in)``.
    segments
        Equal slices of the rows.
    flat
        A ``(rank, in)``, B ``(out, rank)`` and None (no gain) of each segment in a row.
    """

    def __init__(self, x: Tensor, segments: Sequence[Segment], flat: Sequence[Tensor | None]) -> None:
        self.a, self.b = (torch.stack([t for t in flat[i::3] if t is not None]) for i in (0, 1))
        self.shape, self.segments = x.shape, segments
        self.scale = _scales(segments, x)

    def _each(self, tokens: Tensor) -> Tensor:
        """Return ``(tokens, width)`` as ``(segments, tokens of each, width)``."""
        return tokens.view(len(self.segments), -1, tokens.shape[-1])

    def _bits(self, like: Tensor) -> Tensor | None:
        """Return the keep flags of dropout for every segment, in one piece."""
        if not any(s.p for s in self.segments):
            return None
        part = (self.shape[0] // len(self.segments), *self.shape[1:])
        return torch.stack([keep_bits(part, s.p, s.seed, like).view(-1, part[-1]) for s in self.segments])

    def _scaled(self, h: Tensor) -> Tensor:
        return h * (self.scale if isinstance(self.scale, float) else self.scale.to(h.dtype))

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Add every segment's update to ``out (tokens, out)`` in place; return the scaled rank units for `backward`."""
        part, bits = self._each(x), self._bits(x)
        part = part if bits is None else dropped_into(bits, part)
        h = self._scaled(torch.bmm(self.a.to(x.dtype), part.mT))
        self._each(out).baddbmm_(h.mT, self.b.mT.to(h.dtype))
        return h

    def backward(self, dx: Tensor | None, dy: Tensor, x: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add the update's share to ``dx`` in place, and return the gradients of all A and all B."""
        rows, part, bits = self._each(dy), self._each(x), self._bits(x)
        db = torch.bmm(h, rows).mT.contiguous()  # this way round runs along contiguous memory
        dh = self._scaled(torch.bmm(self.b.mT.to(dy.dtype), rows.mT))
        a = self.a.to(dy.dtype)
        if dx is not None and bits is None and dx.dtype == dh.dtype:
            self._each(dx).baddbmm_(dh.mT, a)
        elif dx is not None:
            update = torch.bmm(dh.mT, a)
            self._each(dx).add_(update if bits is None else drop_(update, bits))
        da = torch.bmm(dh, part if bits is None else dropped_into(bits, part))
        return list(da.to(self.a.dtype)), list(db.to(self.b.dtype))


def _scales(segments: Sequence[Segment], x: Tensor) -> float | Tensor:
    """Return the factor of the rank units ``(segments, rank, tokens)``: a number, or one for each segment or token."""
    kept = [kept_scale(s.p) for s in segments]
    if all(s.weights is None for s in segments):
        numbers = [s.scale * k for s, k in zip(segments, kept, strict=True)]
        if len(set(numbers)) == 1:
            return numbers[0]
        return torch.tensor(numbers, dtype=torch.float64).to(x.device).view(-1, 1, 1)
    rows, tokens = len(x) // len(segments), x[0].numel() // x.shape[-1]
    factors = [torch.as_tensor(s.factor(torch.float64), dtype=torch.float64, device=x.device) for s in segments]
    each = torch.stack([f.expand(rows) * k for f, k in zip(factors, kept, strict=True)])
    return each.repeat_interleave(tokens, 1).unsqueeze(1)
