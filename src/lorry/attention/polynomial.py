"""The exponential of an inner product as an inner product of polynomial features.

With ``p(x) = Σ_t c_t x^t`` near ``exp`` and one feature ``√(|c_t| t! / Πu!) · Π x_i^{u_i}`` for each monomial u of at
most degree g, ``⟨φ(q), φ(k)⟩ = p(⟨q, k⟩)``: C(width + g, g) features (Alman and Song 2023; used by Hu et al., arXiv
2406.03136, Lemma 3.4).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lorry.attention.call import AttentionError

Basis = Literal["taylor", "chebyshev"]
#: Beyond this no head is small enough.
MOST_DEGREE = 400
#: From this degree on float32 loses too much.
_WIDE_FROM = 6


def feature_count(width: int, degree: int) -> int:
    """Return C(width + degree, degree), the number of monomials of at most that degree in `width` variables."""
    return math.comb(width + degree, degree)


def predicted_degree(radius: float, tolerance: float = 1e-3, basis: Basis = "taylor") -> int:
    """Return the smallest degree at which the polynomial is near exp on ``[-radius, radius]``.

    Near means: its error is at most ``tolerance * exp(-radius)``, so that no probability is wrong by more than about
    that part of itself. Taylor's error is bounded by ``e^R R^(g+1) / (g+1)!``, Chebyshev's by the tail of its series.
    A degree of Taylor's is even, since the polynomial is then positive.

    Parameters
    ----------
    radius
        Largest size of a logit.
    tolerance
        Relative error.
    basis
        ``taylor`` or ``chebyshev``.

    Raises
    ------
    AttentionError
        The radius is not finite, or no degree up to 400 is enough.
    """
    if not math.isfinite(radius) or tolerance <= 0:
        raise AttentionError(f"A degree needs a finite radius and a tolerance above 0, found {radius} and {tolerance}.")
    if radius == 0:
        return 0
    wanted = math.log(tolerance) - radius
    step = 2 if basis == "taylor" else 1
    for degree in range(0, MOST_DEGREE + 1, step):
        if _log_error(radius, degree, basis) <= wanted:
            return degree
    raise AttentionError(
        f"Logits up to {radius:.3g} need a polynomial of a degree above {MOST_DEGREE} at a tolerance of {tolerance:g}; "
        "use exact attention here."
    )


def _log_error(radius: float, degree: int, basis: Basis) -> float:
    """Return the logarithm of a bound of the polynomial's error."""
    if basis == "taylor":
        return radius + (degree + 1) * math.log(radius) - math.lgamma(degree + 2)
    # exp(R x) = I_0(R) + 2 Σ I_n(R) T_n(x), and I_n(R) is at most (R/2)^n / n! · exp(R²/4 / (n+1))
    terms = [
        n * math.log(radius / 2) - math.lgamma(n + 1) + radius**2 / (4 * (n + 1))
        for n in range(degree + 1, degree + 40 + int(2 * radius))
    ]
    largest = max(terms)
    return math.log(2) + largest + math.log(sum(math.exp(term - largest) for term in terms))


def coefficients(degree: int, basis: Basis = "taylor", radius: float = 1.0) -> list[float]:
    """Return the coefficients of ``1, x, x², ...``: of Taylor's polynomial at 0, or of Chebyshev's on the radius."""
    if basis == "taylor":
        return [1 / math.factorial(power) for power in range(degree + 1)]
    reach = max(radius, 1e-3)
    count = degree + 1
    angles = [math.pi * (j + 0.5) / count for j in range(count)]
    series = [
        (1 if n == 0 else 2) / count * sum(math.exp(reach * math.cos(a)) * math.cos(n * a) for a in angles)
        for n in range(count)
    ]
    total = [0.0] * count
    before, now = [1.0], [0.0, 1.0]
    for n, weight in enumerate(series):
        current = before if n == 0 else now
        for power, value in enumerate(current):
            total[power] += weight * value / reach**power
        if n:
            after = [0.0] + [2 * value for value in now]
            for power, value in enumerate(before):
                after[power] -= value
            before, now = now, after
    return total


def features(x: Tensor, powers: list[float], *, signed: bool = False) -> Tensor:
    """Return the features of vectors.

    Parameters
    ----------
    x
        ``(..., length, width)``.
    powers
        Coefficients c_0 to c_g of the polynomial (`coefficients`).
    signed
        Whether this side takes the signs of negative coefficients; one of the two does.

    Returns
    -------
    Tensor
        ``(..., length, C(width + g, g))`` in float32 or better, in float64 from degree 6 on.
    """
    degree = len(powers) - 1
    x = x.to(torch.promote_types(x.dtype, torch.float64 if degree >= _WIDE_FROM else torch.float32))
    width = x.shape[-1]
    block = torch.ones_like(x[..., :1])
    blocks = [block]
    # the monomials of a degree in the order of their last variable: those up to a variable lie in front
    ends = [1] * width
    for _ in range(degree):
        parts = [block[..., : ends[i]] * x[..., i : i + 1] for i in range(width)]
        ends = torch.tensor(ends).cumsum(0).tolist()
        block = torch.cat(parts, dim=-1)
        blocks.append(block)
    weights = []
    for power, counts in enumerate(_multinomials(width, degree)):
        c = powers[power]
        weights += [math.copysign(math.sqrt(abs(c) * m), c if signed else 1.0) for m in counts]
    return torch.cat(blocks, dim=-1) * x.new_tensor(weights)


@lru_cache(maxsize=32)
def _multinomials(width: int, degree: int) -> list[list[int]]:
    """Return t! / Πu! for each monomial of each degree t, in the order of `features`."""
    # of each monomial: its last variable's exponent and its multinomial coefficient
    found = [[1]]
    block: list[tuple[int, int]] = [(0, 1)]
    ends = [1] * width
    lasts = [-1]
    for power in range(1, degree + 1):
        after: list[tuple[int, int]] = []
        now: list[int] = []
        for i in range(width):
            for (exponent, multiple), last in zip(block[: ends[i]], lasts[: ends[i]], strict=True):
                same = exponent + 1 if last == i else 1
                after.append((same, multiple * power // same))
                now.append(i)
        ends = torch.tensor(ends).cumsum(0).tolist()
        block, lasts = after, now
        found.append([multiple for _, multiple in block])
    return found
