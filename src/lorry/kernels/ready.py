"""One frozen adapter on all rows of a dense layer, for a few tokens at a time: decoding.

A token is a vector, and what the update costs next to the layer's own product is calls, not arithmetic. So for one
token both thin products are products of a matrix and a vector, the second added in place; factors that are kept in
float32 beside a layer in half precision are used as they are (casting them would cost more than the products, and
half-precision products of one token are slow); and what a gain is multiplied with is worked out once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens up to which the factors are multiplied in their own type; beyond, one cast of them is the lesser cost.
_FEW = 16


class ReadyLinear:
    """A frozen layer with one low-rank update, ready for calls without a gradient.

    ``y = g ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + b``, as `lorry.kernels.lowrank.reference` defines it.

    Parameters
    ----------
    weight, bias
        The layer's dense weight ``(out, in)`` and its bias ``(out,)`` or None.
    a, b
        The factors A ``(rank, in)`` and B ``(out, rank)``, in the type of the weight or a wider one. Without a gain
        they are used where they lie, so that changes in place are seen.
    scale
        Factor of the update.
    gain
        A factor of each output channel ``(out,)``, of base and update together. It is kept, and so is
        ``g ⊙ scale · B``: ask `fresh` whether they still hold.
    sources
        What the gain was worked out from besides weight, A and B (a magnitude).
    """

    __slots__ = ("_a", "_b", "_bias", "_gain", "_kept", "_most", "_scale", "_shift", "_up", "_weight")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        gain: Tensor | None = None,
        sources: Sequence[Tensor] = (),
    ) -> None:
        self._weight, self._bias, self._a, self._b, self._scale = weight, bias, a.detach(), b.detach(), scale
        self._gain = self._up = self._shift = None
        own = (weight, bias, a, b, *sources)
        if gain is not None:
            exact = torch.promote_types(torch.promote_types(gain.dtype, b.dtype), torch.float32)
            self._gain = gain.detach().to(exact)
            self._up = (b.detach().to(exact) * scale).mul_(self._gain.unsqueeze(-1))
            self._shift = None if bias is None else bias.detach().to(exact)
            self._a = self._a.to(exact)
        wide = self._a.dtype.itemsize >= weight.dtype.itemsize and (gain is not None or b.dtype == a.dtype)
        self._most = _FEW * weight.shape[1] if wide else -1
        # without a gain nothing is copied, so a change in place is no matter
        self._kept = tuple((t, None if gain is None else _version(t), None if t is None else t.dtype) for t in own)

    def fresh(self, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *sources: Tensor) -> bool:
        """Tell whether this still is the layer with these tensors: the same ones and, where something was worked out
        from them, not changed in place since. Tensors made in inference mode count no changes, so what was worked
        out from them is never fresh.
        """
        now, kept = (weight, bias, a, b, *sources), self._kept
        if len(now) != len(kept):
            return False
        for tensor, (before, version, kind) in zip(now, kept, strict=True):  # asked at every call, so no generator
            if tensor is not before or (version is not None and (version < 0 or _version(tensor) != version)):
                return False
            if tensor is not None and tensor.dtype is not kind:  # a parameter that is cast stays the same tensor
                return False
        return True

    def serves(self, x: Tensor) -> bool:
        """Tell whether this is the way for an input: few tokens on the CPU, in the weight's type, factors in one that
        is no narrower.
        """
        return x.numel() <= self._most and x.is_cpu and x.dtype is self._weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output ``(..., out)`` for an input ``(..., in)``; no gradient goes through."""
        if self._gain is not None:
            return self._gained(x)
        y, a = F.linear(x, self._weight, self._bias), self._a
        width, kind = x.shape[-1], a.dtype
        if x.numel() == width:
            # addmv takes vectors of one type alone; `to` returns what has the type already
            h = torch.mv(a, x.reshape(width).to(kind))
            if y.dtype == kind:
                y.view(-1).addmv_(self._b, h, alpha=self._scale)
            else:
                y.view(-1).add_(torch.mv(self._b, h), alpha=self._scale)
            return y
        h = torch.mm(x.reshape(-1, width).to(kind), a.t())
        flat = y.view(-1, y.shape[-1])
        if y.dtype == kind:
            flat.addmm_(h, self._b.t(), alpha=self._scale)
        else:
            flat.add_(torch.mm(h, self._b.t()), alpha=self._scale)
        return y

    def _gained(self, x: Tensor) -> Tensor:
        gain, up, shift = self._gain, self._up, self._shift
        assert gain is not None and up is not None
        base, width, kind = F.linear(x, self._weight), x.shape[-1], gain.dtype
        if x.numel() == width:
            if shift is None and base.dtype is kind:  # most decoding; no further tensor is made
                h = torch.mv(self._a, x.reshape(width))
                base.mul_(gain).view(-1).addmv_(up, h)
                return base
            h = torch.mv(self._a, x.reshape(width).to(kind))
            update = torch.mv(up, h) if shift is None else torch.addmv(shift, up, h)
            y = torch.addcmul(update, base.view(-1), gain)
        else:
            h = torch.mm(x.reshape(-1, width).to(kind), self._a.t())
            update = torch.mm(h, up.t()) if shift is None else torch.addmm(shift, h, up.t())
            y = torch.addcmul(update, base.view(-1, base.shape[-1]), gain)
        return y.to(x.dtype).view(base.shape)


def _version(tensor: Tensor | None) -> int:
    """Return how often a tensor was changed in place: 0 for none, -1 where nobody counts."""
    return 0 if tensor is None else -1 if tensor.is_inference() else tensor._version
