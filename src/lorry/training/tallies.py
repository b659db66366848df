"""Evaluation sums that several objectives share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Means:
    """Sums of several quantities over one number of examples.

    Attributes
    ----------
    count
        Examples.
    sums
        By name of the metric.
    """

    count: float = 0
    sums: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **values: Tensor) -> Means:
        """Return the sums of values that are given for each example, ``(n,)`` each."""
        sums = {name: float(value.double().sum()) for name, value in values.items()}
        return cls(len(next(iter(values.values()))), sums)

    def __add__(self, other: Means) -> Means:
        """Return both together."""
        names = dict.fromkeys((*self.sums, *other.sums))
        return Means(self.count + other.count, {n: self.sums.get(n, 0.0) + other.sums.get(n, 0.0) for n in names})

    def metrics(self) -> dict[str, float]:
        """Return the mean of each quantity, NaN where there was no example, and ``count``."""
        means = {name: value / self.count if self.count else math.nan for name, value in self.sums.items()}
        return {**means, "count": self.count}


@dataclass(frozen=True, eq=False)
class Values:
    """All predictions and all wanted values, for metrics that are no mean over examples.

    Attributes
    ----------
    loss
        Summed.
    found, wanted
        ``(n,)`` each.
    """

    loss: float
    found: Tensor
    wanted: Tensor

    def __add__(self, other: Values) -> Values:
        """Return both together."""
        return Values(
            self.loss + other.loss, torch.cat([self.found, other.found]), torch.cat([self.wanted, other.wanted])
        )

    def metrics(self) -> dict[str, float]:
        """Return ``loss``, ``r2``, ``spearman``, ``mae`` and ``count``; NaN where a correlation is not defined."""
        count = len(self.wanted)
        error = self.found - self.wanted
        spread = float((self.wanted - self.wanted.mean()).square().sum()) if count else 0.0
        return {
            "loss": self.loss / count if count else math.nan,
            "r2": 1 - float(error.square().sum()) / spread if spread else math.nan,
            "spearman": correlation(ranks(self.found), ranks(self.wanted)),
            "mae": float(error.abs().mean()) if count else math.nan,
            "count": count,
        }


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, equal ones sharing the mean of theirs; ``(n,)`` in float64."""
    _, index, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[index]


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation; NaN where one of the two does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else math.nan
