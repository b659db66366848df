"""Samples into as few micro-batches as possible: first-fit decreasing, and two integer programs that do better.

The first program looks for fewer micro-batches than first-fit decreasing needs, the second one leaves one of them as
empty as possible, for what comes next (LoRAFusion, arXiv 2510.00206). Both are solved by HiGHS through scipy. HiGHS
is deterministic, and so is its limit of nodes; what it has when the time runs out depends on the machine, so then
the greedy packing is taken, which does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorry.core.errors import OptionError

from .samples import MicroBatch, Sample, load


@dataclass(frozen=True)
class Limits:
    """How long HiGHS may look for one packing.

    Attributes
    ----------
    seconds
        Of each of the two programs.
    nodes
        Of its search tree.
    """

    seconds: float = 10.0
    nodes: int = 50


def check_lengths(samples: Sequence[Sample], capacity: int, multiple: int) -> None:
    """Refuse samples that no micro-batch can hold.

    Raises
    ------
    OptionError
        The longest sample, rounded up, is above the capacity.
    """
    if not samples:
        return
    longest = max(samples, key=lambda s: s.tokens)
    need = load([longest], multiple)
    if need > capacity:
        raise OptionError(
            f"The longest sample of job '{longest.job}' has {longest.tokens} tokens and takes {need} of a micro-batch, "
            f"but the capacity is {capacity}. Set capacity to at least {need}, or the job's max_length to at most "
            f"{capacity // multiple * multiple}."
        )


def first_fit(samples: Sequence[Sample], capacity: int, multiple: int = 1) -> list[MicroBatch]:
    """Return micro-batches by first-fit decreasing: the longest sample first, each into the first that has room.

    Parameters
    ----------
    samples
        Of one global batch of each of some jobs.
    capacity
        Most tokens of a micro-batch.
    multiple
        Each job's tokens in a micro-batch count as rounded up to this.

    Raises
    ------
    OptionError
        A sample is longer than the capacity.
    """
    check_lengths(samples, capacity, multiple)
    bins: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: (-s.tokens, s)):
        home = next((b for b in bins if load([*b, sample], multiple) <= capacity), None)
        if home is None:
            bins.append([sample])
        else:
            home.append(sample)
    return _tidy(bins, multiple)


def packed(
    samples: Sequence[Sample], capacity: int, multiple: int = 1, limits: Limits | None = None
) -> list[MicroBatch]:
    """Return as few micro-batches as can be found, one of them as empty as can be found; the emptiest comes last.

    Parameters
    ----------
    samples, capacity, multiple
        As of `first_fit`.
    limits
        Of HiGHS; None leaves it out and returns the greedy packing.

    Returns
    -------
    list
        Never more micro-batches than `first_fit` gives; of equal number, never a fuller last one.
    """
    greedy = first_fit(samples, capacity, multiple)
    if limits is None or len(greedy) < 2:
        return greedy
    whole = load(samples, multiple)
    best = greedy
    if -(-whole // capacity) < len(greedy):
        fewer = _Program(samples, capacity, multiple, len(greedy) - 1).fewest(limits)
        best = best if fewer is None else _tidy(fewer, multiple)
    # no packing can leave less for the last than what the others cannot hold
    if len(best) > 1 and load(best[-1], multiple) > max(whole - (len(best) - 1) * capacity, 0):
        emptier = _Program(samples, capacity, multiple, len(best)).emptiest(limits)
        if emptier is not None:
            found = _tidy(emptier, multiple)
            better = len(found), load(found[-1], multiple)
            best = found if better < (len(best), load(best[-1], multiple)) else best
    return best


def _tidy(bins: Sequence[Sequence[Sample]], multiple: int) -> list[MicroBatch]:
    """Return micro-batches in an order of their own, the fullest first."""
    filled = [tuple(sorted(b)) for b in bins if b]
    return sorted(filled, key=lambda b: (-load(b, multiple), b))


class _Program:
    """The packing of samples into a given number of bins as an integer program.

    The variables are, bin after bin: whether each sample lies in it (0 or 1), how many multiples each job has in it,
    and whether it is used at all.
    """

    def __init__(self, samples: Sequence[Sample], capacity: int, multiple: int, bins: int) -> None:
        self.samples = sorted(samples)
        self.capacity, self.multiple, self.bins = capacity, multiple, bins
        self.jobs = sorted({s.job for s in samples})
        self.width = len(samples) + len(self.jobs) + 1

    def fewest(self, limits: Limits) -> list[list[Sample]] | None:
        """Return a packing into as few bins as possible, or None if these are too few or the limits too tight."""
        return self._solve([0.0] * (self.width - 1) + [1.0], limits, every=True)

    def emptiest(self, limits: Limits) -> list[list[Sample]] | None:
        """Return a packing whose last bin has as little as possible; bins are alike, so it may be any."""
        costs = [0.0] * len(self.samples) + [float(self.multiple)] * len(self.jobs) + [0.0]
        return self._solve(costs, limits, every=False)

    def _solve(self, costs: list[float], limits: Limits, every: bool) -> list[list[Sample]] | None:
        import numpy as np
        from scipy.optimize import Bounds, milp

        objective = np.zeros((self.bins, self.width))
        objective[slice(None) if every else -1] = costs
        # whole numbers need not be asked for where a multiple is one token: they are sums of lengths
        whole = [1] * len(self.samples) + [int(self.multiple > 1)] * len(self.jobs) + [1]
        most = [1.0] * len(self.samples) + [float(self.capacity // self.multiple)] * len(self.jobs) + [1.0]
        found = milp(
            objective.ravel(),
            integrality=np.tile(whole, self.bins),
            bounds=Bounds(0.0, np.tile(most, self.bins)),
            constraints=self._constraints(),
            options={"time_limit": limits.seconds, "node_limit": limits.nodes},
        )
        if found.x is None or "time limit" in str(found.message).lower():
            return None
        chosen = found.x.reshape(self.bins, self.width)[:, : len(self.samples)] > 0.5
        return [[s for s, here in zip(self.samples, row, strict=True) if here] for row in chosen]

    def _constraints(self) -> list[Any]:
        import numpy as np
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array

        n = len(self.samples)
        entries: list[tuple[int, int, float]] = []
        bounds: list[tuple[float, float]] = []

        def row(terms: list[tuple[int, int, float]], low: float, high: float) -> None:
            entries.extend((len(bounds), b * self.width + i, value) for b, i, value in terms)
            bounds.append((low, high))

        for i in range(n):
            row([(b, i, 1.0) for b in range(self.bins)], 1.0, 1.0)
        heights = [(n + j, float(self.multiple)) for j in range(len(self.jobs))]
        for b in range(self.bins):
            for (place, height), job in zip(heights, self.jobs, strict=True):
                held = [(b, i, float(s.tokens)) for i, s in enumerate(self.samples) if s.job == job]
                row([*held, (b, place, -height)], -np.inf, 0.0)
            row([*((b, i, v) for i, v in heights), (b, self.width - 1, -float(self.capacity))], -np.inf, 0.0)
            if b:
                row([(b, self.width - 1, 1.0), (b - 1, self.width - 1, -1.0)], -np.inf, 0.0)
        rows, columns, values = zip(*entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(bounds), self.bins * self.width)).tocsr()
        low, high = zip(*bounds, strict=True)
        return [LinearConstraint(matrix, low, high)]
