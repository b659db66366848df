"""Attention and its gradients through low-rank factors: almost linear in the length, where logits are small.

Hu et al., "Computational Limits of LoRA Fine-Tuning for Transformer Models" (arXiv 2406.03136): where queries and keys
are small, the probabilities ``F ≈ U Vᵀ`` have few columns, and so has everything that the backward pass needs, so that
no array of length x length is ever made. With ``Q̂ = dO vᵀ`` and ``r_j = Σ_k F_jk Q̂_jk``, the gradient of the logits is
``P = F ⊙ Q̂ - diag(r) F`` (Lemmas 3.1 and 3.2), and ``dq = β P k``, ``dk = β Pᵀ q``, ``dv = Fᵀ dO``.

It is an algorithm for small heads and a measure of a model, and no replacement of a fast exact kernel at usual widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorry.attention.call import AttentionError
from lorry.attention.polynomial import Basis, coefficients, feature_count, features, predicted_degree
from lorry.core.options import check_options, option

#: Tokens whose mutual products are made at once under a causal mask.
_CHUNK = 128


@dataclass(frozen=True)
class Approximation:
    """How probabilities become factors.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    degree: int | None = option(
        None, "Degree of the polynomial; the least that the tolerance needs if not given.", at_least=0
    )
    tolerance: float = option(1e-3, "Relative error of a probability that the degree is chosen by.", above=0)
    basis: Basis = option("taylor", "Polynomial.", choices=("taylor", "chebyshev"))
    center_keys: bool = option(True, "Subtract the mean key, which changes no probability and makes logits smaller.")
    balance: bool = option(True, "Scale queries and keys against each other to the same largest entry.")
    max_features: int = option(4096, "Most columns of the factors; a head that needs more is refused.", at_least=1)

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)


class Gradients(NamedTuple):
    """Gradients of queries, keys and values, each in its shape."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix ``U Vᵀ`` ``(..., length, keys)``, under a causal mask or none, that is never made.

    Attributes
    ----------
    u, v
        ``(..., length, features)`` and ``(..., keys, features)``.
    causal
        Whether only entries with key number up to the query's count.
    """

    u: Tensor
    v: Tensor
    causal: bool = False

    def times(self, m: Tensor) -> Tensor:
        """Return the matrix times m ``(..., keys, width)``."""
        if not self.causal:
            return self.u @ (self.v.mT @ m)
        total = torch.zeros_like(self.v[..., :1, :].mT * m[..., :1, :])
        found = []
        for start in range(0, self.u.shape[-2], _CHUNK):
            here = slice(start, start + _CHUNK)
            u, v, own = self.u[..., here, :], self.v[..., here, :], m[..., here, :]
            found.append((u @ v.mT).tril() @ own + u @ total)
            total = total + v.mT @ own
        return torch.cat(found, dim=-2)

    def transposed_times(self, m: Tensor) -> Tensor:
        """Return the transposed matrix times m ``(..., length, width)``."""
        if not self.causal:
            return self.v @ (self.u.mT @ m)
        total = torch.zeros_like(self.u[..., :1, :].mT * m[..., :1, :])
        found = []
        for start in reversed(range(0, self.u.shape[-2], _CHUNK)):
            here = slice(start, start + _CHUNK)
            u, v, own = self.u[..., here, :], self.v[..., here, :], m[..., here, :]
            found.append((u @ v.mT).tril().mT @ own + v @ total)
            total = total + u.mT @ own
        return torch.cat(found[::-1], dim=-2)

    def weighted_times(self, left: Tensor, right: Tensor, m: Tensor) -> Tensor:
        """Return ``(matrix ⊙ left rightᵀ) m`` without the row-wise Khatri-Rao product.

        Parameters
        ----------
        left, right
            ``(..., length, columns)`` and ``(..., keys, columns)``.
        m
            ``(..., keys, width)``.
        """
        return sum(
            (left[..., b : b + 1] * self.times(right[..., b : b + 1] * m) for b in range(1, left.shape[-1])),
            start=left[..., :1] * self.times(right[..., :1] * m),
        )

    def weighted_transposed_times(self, left: Tensor, right: Tensor, m: Tensor) -> Tensor:
        """Return ``(matrix ⊙ left rightᵀ)ᵀ m``; see `weighted_times`."""
        return sum(
            (right[..., b : b + 1] * self.transposed_times(left[..., b : b + 1] * m) for b in range(1, left.shape[-1])),
            start=right[..., :1] * self.transposed_times(left[..., :1] * m),
        )


def probability_factors(
    q: Tensor,
    k: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    seen: Tensor | None = None,
    how: Approximation | None = None,
) -> Factors:
    """Return factors of the attention probabilities, whose rows sum to 1.

    Parameters
    ----------
    q, k
        ``(..., length, width)`` and ``(..., keys, width)``.
    scaling
        Factor of the logits; ``1/√width`` if not given.
    causal
        Whether query i sees keys 0 to i only.
    seen
        Boolean, broadcasts to ``(..., keys)``: keys that are no padding; None for all.
    how
        The approximation.

    Raises
    ------
    AttentionError
        The logits are so large that the factors would have more than `max_features` columns; at a degree that was
        asked for, a row of the approximation has no positive sum; or a causal mask over other keys than queries.
    """
    how = how or Approximation()
    if causal and q.shape[-2] != k.shape[-2]:
        raise AttentionError(
            f"A causal mask is over as many queries as keys here, found {q.shape[-2]} and {k.shape[-2]}; use exact "
            "attention with a cache."
        )
    q, k, radius = _small(q, k, q.shape[-1] ** -0.5 if scaling is None else scaling, seen, how)
    degree = how.degree
    if degree is None:
        degree = predicted_degree(radius, how.tolerance, how.basis)
    count = feature_count(q.shape[-1], degree)
    if count > how.max_features:
        raise AttentionError(
            f"Logits up to {radius:.3g} in heads of width {q.shape[-1]} need a polynomial of degree {degree} with "
            f"{count:,} features at a tolerance of {how.tolerance:g}, more than max_features={how.max_features:,}. Use "
            "exact attention here, or give a larger tolerance, a degree, or max_features."
        )
    powers = coefficients(degree, how.basis, radius)
    u, v = features(q, powers, signed=True), features(k, powers)
    if seen is not None:
        v = v * seen.unsqueeze(-1)
    sums = Factors(u, v, causal).times(torch.ones_like(v[..., :1]))
    blind = sums == 0  # a query that sees nothing gets nothing
    if bool((sums < 0).any()):
        raise AttentionError(
            f"The polynomial of degree {degree} is negative at logits up to {radius:.3g}, so its rows are no "
            "probabilities. Give a larger (for Taylor an even) degree, or none, which chooses one."
        )
    return Factors(u / sums.masked_fill(blind, 1.0), v, causal)


def _small(
    q: Tensor, k: Tensor, scaling: float, seen: Tensor | None, how: Approximation
) -> tuple[Tensor, Tensor, float]:
    """Return queries and keys with the scaling in them, made small, and a bound of their products."""
    q, k = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
    if how.center_keys:
        if seen is None:
            mean = k.mean(-2, keepdim=True)
        else:
            there = seen.to(k).unsqueeze(-1)
            mean = (k * there).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
        k = k - mean
    if seen is not None:
        k = k * seen.unsqueeze(-1)
    half = math.sqrt(abs(scaling))
    q, k = q * math.copysign(half, scaling), k * half
    if how.balance:
        large = [t.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30) for t in (q, k)]
        by = (large[1] / large[0]).sqrt()
        q, k = q * by, k / by
    # the largest product itself would take time quadratic in the length
    norms = [torch.linalg.vector_norm(t, dim=-1).amax(-1) for t in (q, k)]
    return q, k, float((norms[0] * norms[1]).max())


def fast_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    seen: Tensor | None = None,
    how: Approximation | None = None,
) -> Gradients:
    """Return the gradients of softmax attention in time linear in the length, by chained low-rank factors.

    Parameters
    ----------
    q, k, v
        ``(..., length, width)``, ``(..., keys, width)``, ``(..., keys, width of v)``.
    gradient
        Of the loss with respect to the output, ``(..., length, width of v)``.
    scaling, causal, seen, how
        As in `probability_factors`.

    Raises
    ------
    AttentionError
        As in `probability_factors`.
    """
    f = probability_factors(q, k, scaling=scaling, causal=causal, seen=seen, how=how)
    wide = f.u.dtype
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    qw, kw, vw, dout = (t.detach().to(wide) for t in (q, k, v, gradient))
    # r_j = Σ_k F_jk Q̂_jk is the product of the output's row with that of its gradient
    r = (dout * f.times(vw)).sum(-1, keepdim=True)
    dq = f.weighted_times(dout, vw, kw) - r * f.times(kw)
    dk = f.weighted_transposed_times(dout, vw, qw) - f.transposed_times(r * qw)
    return Gradients((scale * dq).to(q.dtype), (scale * dk).to(k.dtype), f.transposed_times(dout).to(v.dtype))


def exact_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    seen: Tensor | None = None,
) -> Gradients:
    """Return the gradients of softmax attention in closed form, in time and memory quadratic in the length.

    Parameters
    ----------
    q, k, v, gradient, scaling, causal, seen
        As in `fast_gradients`.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    logits = scale * (q @ k.mT)
    hidden = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)
    if seen is not None:
        hidden = hidden | ~seen.unsqueeze(-2)
    f = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    q_hat = gradient @ v.mT
    p = f * (q_hat - (f * q_hat).sum(-1, keepdim=True))
    return Gradients(scale * (p @ k), scale * (p.mT @ q), f.mT @ gradient)


def factor_gradients(x: Tensor, a: Tensor, b: Tensor, scale: float, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B of a projection ``x (W + scale · B A)ᵀ`` from that of its output.

    Parameters
    ----------
    x
        Inputs of the projection, ``(..., length, in)``.
    a, b
        ``(rank, in)`` and ``(out, rank)``.
    scale
        Factor of their product.
    gradient
        Of the projection's output, ``(..., length, out)``: what `fast_gradients` gives of q, k or v, heads side by
        side.
    """
    x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
    return scale * (b.mT @ gradient.mT) @ x, scale * gradient.mT @ (x @ a.mT)


def fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    seen: Tensor | None = None,
    how: Approximation | None = None,
) -> Tensor:
    """Return softmax attention ``(..., length, width of v)`` by factors, with `fast_gradients` as its backward pass.

    Parameters
    ----------
    q, k, v, scaling, causal, seen, how
        As in `fast_gradients`.

    Raises
    ------
    AttentionError
        As in `probability_factors`; in the forward pass.
    """
    facts = {"scaling": scaling, "causal": causal, "seen": seen, "how": how}
    found: Tensor = _Fast.apply(q, k, v, facts)  # type: ignore[no-untyped-call]
    return found


class _Fast(torch.autograd.Function):
    """Attention by factors, which are made again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, facts: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.facts = facts
        f = probability_factors(q, k, **facts)
        return f.times(v.to(f.u.dtype)).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        return (*fast_gradients(q, k, v, gradients[0], **ctx.facts), None)
