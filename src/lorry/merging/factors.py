"""Canonical factors and what can be computed from them without ever building the dense update.

A stack of factors of total rank R is summed, compressed, measured and compared through two thin QR factorisations and
an R x R core; the cost is O((out + in) R² + R³) and the memory O((out + in) R).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Singular values below this fraction of the largest one count as rounding of float64 arithmetic.
NUMERICAL_ZERO = 1e-13
#: Dense matrices whose smaller side is at most this are decomposed exactly, larger ones by a seeded subspace iteration.
EXACT_SIDE = 768
#: Where all diagonal entries of R are above this fraction of the largest, a factor has full rank beyond doubt.
_FULL = 1e-6


@dataclass(frozen=True)
class Factors:
    """An update ``ΔW = B A`` with the scale folded in.

    Attributes
    ----------
    a
        ``(rank, in)``, float64.
    b
        ``(out, rank)``, float64.
    inside
        ``(k, rank)`` and ``(rank, k)``, if the factors were made in the bases of a `Joint`: then
        ``b = qb @ inside[0]`` and ``a = inside[1] @ qa.T``, and whatever is measured is measured there.
    """

    a: Tensor
    b: Tensor
    inside: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """Number of rank units, which the matrix rank may be below."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.b.shape[0], self.a.shape[1]

    def times(self, factor: float) -> Factors:
        """Return the update times a number; it goes into B, A stays as it is."""
        return Factors(self.a, self.b * factor)

    def dense(self) -> Tensor:
        """Return ``B A`` as ``(out, in)``."""
        return self.b @ self.a

    def norm(self) -> float:
        """Return the Frobenius norm of ``B A``."""
        return float(torch.linalg.matrix_norm(_core(self)))

    def padded(self, rank: int) -> Factors:
        """Return the same update with rank units of zeros appended."""
        if rank == self.rank:
            return self
        a = torch.cat([self.a, self.a.new_zeros(rank - self.rank, self.a.shape[1])])
        return Factors(a, torch.cat([self.b, self.b.new_zeros(self.b.shape[0], rank - self.rank)], dim=1))

    def balanced(self) -> Factors:
        """Return the same update with ``‖A‖ = ‖B‖``; a zero update stays as it is."""
        na, nb = float(self.a.norm()), float(self.b.norm())
        if na == 0 or nb == 0:
            return self
        ratio = (nb / na) ** 0.5
        return Factors(self.a * ratio, self.b / ratio)


def zero(shape: tuple[int, int], rank: int = 1) -> Factors:
    """Return a zero update of the given shape."""
    return Factors(torch.zeros(rank, shape[1], dtype=torch.float64), torch.zeros(shape[0], rank, dtype=torch.float64))


def stack(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Return the weighted sum exactly, its rank being the sum of ranks; weights go into B."""
    weights = [1.0] * len(parts) if weights is None else weights
    a = torch.cat([p.a for p in parts])
    return Factors(a, torch.cat([p.b * w for p, w in zip(parts, weights, strict=True)], dim=1))


@dataclass(frozen=True)
class Decomposition:
    """``B A = U diag(S) Vᵀ`` with U ``(out, k)``, S ``(k,)`` descending, Vᵀ ``(k, in)``; k may be 0.

    ``inside`` holds U and Vᵀ in the bases of the `Joint` that they were found in, if any.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    inside: tuple[Tensor, Tensor] | None = None

    def truncated(self, rank: int) -> Factors:
        """Return the best approximation of at most `rank` in the Frobenius norm, √S on each side."""
        k = max(min(rank, self.s.shape[0]), 1)
        if self.s.shape[0] == 0:
            return zero((self.u.shape[0], self.vt.shape[1]))
        root = self.s[:k].sqrt()
        small = None
        if self.inside is not None:
            small = (self.inside[0][:, :k] * root, root.unsqueeze(1) * self.inside[1][:k])
        return Factors(root.unsqueeze(1) * self.vt[:k], self.u[:, :k] * root, small)


def _core(f: Factors) -> Tensor:
    """Return a small matrix with the singular values of ``B A``."""
    rb = torch.linalg.qr(f.b, mode="r").R
    ra = torch.linalg.qr(f.a.mT, mode="r").R
    core: Tensor = rb @ ra.mT
    return core


def decompose(f: Factors) -> Decomposition:
    """Return the singular value decomposition of ``B A`` by thin QR and the R x R core, numerical zeros left out."""
    qb, rb = torch.linalg.qr(f.b)
    qa, ra = torch.linalg.qr(f.a.mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    k = _significant(s, float(rb.norm() * ra.norm()))
    return Decomposition(qb @ u[:, :k], s[:k], vt[:k] @ qa.mT)


@dataclass(frozen=True)
class Joint:
    """Several updates in common orthonormal bases: ``ΔW_t = Qb Rb_t Ra_tᵀ Qaᵀ``, so that they are small matrices.

    Attributes
    ----------
    qb, qa
        ``(out, k)`` and ``(in, k)``, k at most the sum R of the ranks.
    rb, ra
        For each update ``(k, rank)``.
    """

    qb: Tensor
    qa: Tensor
    rb: tuple[Tensor, ...]
    ra: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> Joint:
        """Work out both bases by one thin QR each."""
        ranks = [p.rank for p in parts]
        qb, rb = torch.linalg.qr(torch.cat([p.b for p in parts], dim=1))
        qa, ra = torch.linalg.qr(torch.cat([p.a for p in parts]).mT)
        return cls(qb, qa, rb.split(ranks, dim=1), ra.split(ranks, dim=1))

    def core(self, weights: Sequence[float]) -> Tensor:
        """Return the small matrix of ``Σ w ΔW``."""
        left = torch.cat([r * w for r, w in zip(self.rb, weights, strict=True)], dim=1)
        return left @ torch.cat(self.ra, dim=1).mT

    def parts(self) -> list[Factors]:
        """Return each update as factors of its small matrix; norms, inner products and angles are those of the
        update.
        """
        return [Factors(ra.mT, rb) for ra, rb in zip(self.ra, self.rb, strict=True)]

    def decompose(self, weights: Sequence[float], rank: int | None = None) -> Decomposition:
        """Return the decomposition of ``Σ w ΔW``: all singular values but numerical zeros, vectors up to `rank`."""
        u, s, vt = torch.linalg.svd(self.core(weights), full_matrices=False)
        sizes = [float(b.norm() * a.norm()) * abs(w) for b, a, w in zip(self.rb, self.ra, weights, strict=True)]
        k = _significant(s, sum(sizes))
        n = k if rank is None else min(rank, k)
        return Decomposition(self.qb @ u[:, :n], s[:k], vt[:n] @ self.qa.mT, (u[:, :n], vt[:n]))

    def distance(self, f: Factors, weights: Sequence[float]) -> float:
        """Return ``‖B A - Σ w ΔW‖`` without cancellation: what lies in the bases is compared there, the rest is
        added. Factors that were made in the bases lie in them altogether.
        """
        if f.inside is not None:
            return float((f.inside[0] @ f.inside[1] - self.core(weights)).norm())
        cb, ca = self.qb.mT @ f.b, f.a @ self.qa
        inside = cb @ ca - self.core(weights)
        beside = Factors(f.a - ca @ self.qa.mT, cb)
        above = Factors(f.a, f.b - self.qb @ cb)
        return math.sqrt(float(inside.square().sum()) + gram_norm(beside) ** 2 + gram_norm(above) ** 2)


def gram_norm(f: Factors) -> float:
    """Return ``‖B A‖`` from two small Gram matrices: cheaper than `Factors.norm`, blind below 1e-8 of ``‖B‖ ‖A‖``."""
    return math.sqrt(max(inner(f, f), 0.0))


def decompose_dense(matrix: Tensor, rank: int, seed: int = 0) -> Decomposition:
    """Return the leading `rank` singular triples of a dense matrix ``(out, in)`` in float64.

    Small matrices are decomposed exactly. Larger ones by a subspace iteration with oversampling (Halko et al.,
    arXiv 0909.4061, algorithm 4.4, six iterations), whose start is drawn from `seed`.
    """
    matrix = matrix.double()
    least = min(matrix.shape)
    if least <= EXACT_SIDE or rank * 2 + 16 >= least:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(matrix.shape[1], rank + 16, generator=generator, dtype=torch.float64)
        for _ in range(6):
            q = torch.linalg.qr(matrix @ q).Q
            q = torch.linalg.qr(matrix.mT @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
        small, s, vt = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
        u = q @ small
    k = min(_significant(s), rank)
    return Decomposition(u[:, :k], s[:k], vt[:k])


def _significant(s: Tensor, size: float = 0.0) -> int:
    """Return how many singular values are more than rounding, given the size of what was summed (it may have
    cancelled).
    """
    floor = max(NUMERICAL_ZERO * float(s[0]), 1e-15 * size) if s.numel() else 0.0
    return int((s > floor).sum())


def inner(f: Factors, g: Factors) -> float:
    """Return ``⟨B₁A₁, B₂A₂⟩`` in the Frobenius sense from two small Gram matrices."""
    return float(((f.b.mT @ g.b) * (f.a @ g.a.mT)).sum())


def gram(parts: Sequence[Factors]) -> Tensor:
    """Return the matrix of inner products of the updates ``(n, n)``; the order of a pair does not matter."""
    n = len(parts)
    values = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i, n):
            values[i, j] = values[j, i] = inner(parts[i], parts[j])
    return values


def cosines(values: Tensor) -> Tensor:
    """Return the cosines that a Gram matrix holds; 0 where an update is zero."""
    norms = values.diagonal().clamp_min(0).sqrt()
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    return torch.where(
        scale > 0, values / scale.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(values)
    ).clamp(-1, 1)


def rounding_norm(f: Factors, g: Factors) -> float:
    """Return ``‖B₁A₁ - B₂A₂‖`` for factors that are nearly equal one by one, as ``dB A₁ + B₂ dA``."""
    a = torch.cat([f.a, f.a - g.a])
    return gram_norm(Factors(a, torch.cat([f.b - g.b, g.b], dim=1)))


def spans(parts: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
    """Return `bases` of several updates of few dimensions; one QR of each factor is enough where all have full rank."""
    found = []
    for part in parts:
        rank = part.rank
        if rank > min(part.shape):
            found.append(bases(part))
            continue
        (qb, rb), (qa, ra) = torch.linalg.qr(part.b), torch.linalg.qr(part.a.mT)
        sizes = torch.stack([rb.diagonal(), ra.diagonal()]).abs()
        found.append((qb, qa) if bool((sizes.amin(1) > _FULL * sizes.amax(1)).all()) else bases(part))
    return found


def bases(f: Factors) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of what the update writes to ``(out, k)`` and of what it reads ``(in, k)``."""
    d = decompose(f)
    return d.u, d.vt.mT


def overlap(first: Tensor, second: Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two subspaces: 0 orthogonal, 1 one within the
    other.
    """
    k = min(first.shape[1], second.shape[1])
    return float((first.mT @ second).square().sum()) / k if k else 0.0
