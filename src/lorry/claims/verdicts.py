"""Fair comparison: each contender with its own tuned rate, all of them on the same seeds, differences in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

#: One run: rate and seed in, metrics out. ``validation`` (higher is better) chooses the rate; the rest is reported.
Run = Callable[[float, int], Mapping[str, float]]
#: Metrics of each seed.
Rows = Sequence[Mapping[str, float]]
#: By how many rates a grid is widened at most: two powers of ten where rates are three to a power.
WIDEST = 4


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

    Where the best rate lies at an end of the grid, the grid of that contender is widened until it does not, or by
    `WIDEST` rates; see `widened`.

    Parameters
    ----------
    contenders
        Name -> run; each run returns ``validation`` and further metrics (``test``, ...).
    rates
        The same grid for all, ascending.
    seeds
        The same for all.
    """

    def by_seed(run: Run) -> Callable[[float], list[dict[str, float]]]:
        return lambda rate: [dict(run(rate, seed)) for seed in seeds]

    return chosen({name: widened(by_seed(run), rates) for name, run in contenders.items()})


def widened(rows: Callable[[float], Rows], rates: Sequence[float]) -> dict[float, Rows]:
    """Try the rates of a grid, and those beyond it for as long as the best one lies at an end.

    Parameters
    ----------
    rows
        Rate -> metrics of each seed.
    rates
        The grid, ascending. One of a single rate is not widened.

    Returns
    -------
    dict
        Rate -> what `rows` gave; `WIDEST` rates more than the grid has at most.
    """
    found = {rate: rows(rate) for rate in rates}
    while len(found) < len(rates) + WIDEST and (rate := beyond(found)) is not None:
        found[rate] = rows(rate)
    return found


def beyond(by_rate: Mapping[float, Rows]) -> float | None:
    """Return the next rate of a grid whose best rate lies at an end, on that side; None if it lies inside.

    Steps repeat those of the grid: 0.003, 0.01, 0.03 is followed by 0.1, and 0.001 comes before it.
    """
    grid, best = sorted(by_rate), best_rate(by_rate)
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    if best == grid[0]:
        grid.reverse()
    # of three rates the step before the last, of two the only one
    step = grid[-2] / grid[-3] if len(grid) > 2 else grid[-1] / grid[-2]
    return float(f"{grid[-1] * step:.6g}")


def best_rate(by_rate: Mapping[float, Rows]) -> float:
    """Return the rate of the best mean ``validation``; of equal ones, one that is not at an end of the grid."""
    inside = sorted(by_rate)[1:-1]
    return max(by_rate, key=lambda r: (statistics.fmean(row["validation"] for row in by_rate[r]), r in inside))


def chosen(results: Mapping[str, Mapping[float, Rows]]) -> Trial:
    """Keep each contender's best rate by mean ``validation``.

    Parameters
    ----------
    results
        Contender -> rate -> metrics of each seed, for studies that run many at once.
    """
    metrics, best, notes = {}, {}, []
    for name, by_rate in results.items():
        rate = best_rate(by_rate)
        best[name] = rate
        metrics[name] = {key: [row[key] for row in by_rate[rate]] for key in by_rate[rate][0]}
        if len(by_rate) > 1 and rate in (min(by_rate), max(by_rate)):
            notes.append(f"The best rate of {name}, {rate:g}, is at the edge of its grid.")
    return Trial(metrics, best, tuple(notes))


def compare(differences: Sequence[float], margin: float = 0.0) -> str:
    """Judge one statement from paired differences, positive where it holds.

    Returns
    -------
    str
        ``reproduced`` if every seed is above the margin, ``on average`` if only the mean is, else ``not reproduced``.
        The verdict of a claim is made of such judgements by `together`, also where there is but one.
    """
    if min(differences) > margin:
        return "reproduced"
    return "on average" if statistics.fmean(differences) > margin else "not reproduced"


def together(statements: Sequence[str]) -> str:
    """The verdict of a claim from its statements, as `compare` judged them.

    Returns
    -------
    str
        ``reproduced`` if all hold on every seed, ``partly`` if at least one of them does, else ``not reproduced``: a
        mean over seeds that disagree confirms nothing.
    """
    held = [statement == "reproduced" for statement in statements]
    if not any(held):
        return "not reproduced"
    return "reproduced" if all(held) else "partly"
