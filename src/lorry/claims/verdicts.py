"""Fair comparison: each contender with its own tuned rate, all of them on the same seeds, differences in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

#: One run: rate and seed in, metrics out. ``validation`` (higher is better) chooses the rate; the rest is reported.
Run = Callable[[float, int], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """What tuned contenders reached.

    Attributes
    ----------
    metrics
        Contender -> metric -> value of each seed, at the contender's best rate.
    rates
        Contender -> that rate.
    notes
        Contenders whose best rate lies at the edge of the grid.
    """

    metrics: Mapping[str, Mapping[str, list[float]]]
    rates: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, metric: str = "test") -> dict[str, list[list[float]]]:
        """Series for a `Panel` without an axis."""
        return {name: [values[metric]] for name, values in self.metrics.items()}

    def mean(self, contender: str, metric: str = "test") -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.metrics[contender][metric])

    def gain(self, contender: str, over: str, metric: str = "test") -> list[float]:
        """Difference to another contender, seed by seed."""
        pair = zip(self.metrics[contender][metric], self.metrics[over][metric], strict=True)
        return [a - b for a, b in pair]


def tune(contenders: Mapping[str, Run], rates: Sequence[float], seeds: Sequence[int]) -> Trial:
    """Run every contender at every rate with every seed, and keep its best rate by mean ``validation``.

    Parameters
    ----------
    contenders
        Name -> run; each run returns ``validation`` and further metrics (``test``, ...).
    rates
        The same grid for all, ascending.
    seeds
        The same for all.
    """
    results = {
        name: {rate: [dict(run(rate, seed)) for seed in seeds] for rate in rates} for name, run in contenders.items()
    }
    return chosen(results)


def chosen(results: Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]]) -> Trial:
    """Keep each contender's best rate by mean ``validation``.

    Parameters
    ----------
    results
        Contender -> rate -> metrics of each seed, for studies that run many at once.
    """
    metrics, best, notes = {}, {}, []
    for name, by_rate in results.items():
        rate = max(by_rate, key=lambda r: statistics.fmean(row["validation"] for row in by_rate[r]))
        best[name] = rate
        metrics[name] = {key: [row[key] for row in by_rate[rate]] for key in by_rate[rate][0]}
        if len(by_rate) > 1 and rate in (min(by_rate), max(by_rate)):
            notes.append(f"The best rate of {name}, {rate:g}, is at the edge of its grid.")
    return Trial(metrics, best, tuple(notes))


def compare(differences: Sequence[float], margin: float = 0.0) -> str:
    """Judge a claimed gain from paired differences, positive where the claim holds.

    Returns
    -------
    str
        ``reproduced`` if every seed is above the margin, ``partly`` if only the mean is, else ``not reproduced``.
    """
    if min(differences) > margin:
        return "reproduced"
    return "partly" if statistics.fmean(differences) > margin else "not reproduced"


def together(verdicts: Sequence[str]) -> str:
    """The verdict of a claim with several statements: reproduced or not if all are, else partly."""
    return verdicts[0] if len(set(verdicts)) == 1 else "partly"
