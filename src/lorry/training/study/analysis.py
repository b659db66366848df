"""What a study's records say: the best rate of each variant, how sensitive it is, and what explains the scores."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .records import DIVERGED, DONE, FAILED, Record, Timing

Way = Literal["min", "max"]
#: A variant with its rank and batch size.
Setup = tuple[str, int | None, int]
#: What a score may depend on; the shares of an analysis are those of these, `CROSSED` and `REST`.
FACTORS = ("rate", "rank", "batch_size", "variant")
#: That variants have different best rates.
CROSSED = "variant x rate"
#: Seeds, and all other combinations.
REST = "rest"
#: What the factors of the analysis of variance are called.
SOURCES = {"rate": "learning rate", "batch_size": "batch size", "variant x rate": "variant × rate", "rest": "the rest"}


@dataclass(frozen=True)
class Standing:
    """What a variant reached at its best rate, for one rank and batch size.

    Attributes
    ----------
    variant, rank, batch_size
        What was trained.
    rate
        The rate of the best mean held-out score; None if no run of the setup ended.
    mean, spread
        Of the reported scores of the seeds at that rate: their mean, and their standard deviation (None for one).
    seeds
        How many runs they are of.
    sensitivity
        How much the score loses a decade from the best rate, mean of both sides as far as the grid goes, between rates
        by the logarithm; positive where it gets worse. None where the grid has no decade.
    below, above
        The same a decade below and above.
    at_edge
        Whether the best rate is the smallest or the largest that was tried.
    start
        Mean held-out score before training.
    parameters
        Numbers that are trained.
    seconds
        Of a step alone; None if it was not taken.
    time_share
        The part of this setup in the time that one step of every setup takes.
    diverged, failed
        Runs that ended so, at any rate.
    """

    variant: str
    rank: int | None
    batch_size: int
    rate: float | None
    mean: float | None
    spread: float | None
    seeds: int
    sensitivity: float | None
    below: float | None
    above: float | None
    at_edge: bool
    start: float | None
    parameters: int | None
    seconds: float | None
    time_share: float | None
    diverged: int
    failed: int


@dataclass(frozen=True)
class SharedRate:
    """The variants at one rate for all of them.

    Attributes
    ----------
    rate
        The rate.
    mean
        Of all scores, of setups and seeds.
    spread
        Standard deviation of the setups' means.
    """

    rate: float
    mean: float
    spread: float


@dataclass(frozen=True)
class Analysis:
    """What follows from the records of a study.

    Attributes
    ----------
    score, better
        What is compared, and which way it is better.
    chosen_by
        Where the reported scores are those of test data, the rates were chosen by held-out data apart.
    standings
        Of each setup, the best first.
    shares
        Source -> its part of the variance of the scores, by an analysis of variance over the rates that all setups
        have; None for what had one value only.
    shared_rates
        What comes of one rate for all setups, by rate.
    best_spread
        Standard deviation of the setups' means, each at its own best rate.
    """

    score: str
    better: Way
    chosen_by: Literal["held-out", "test apart"]
    standings: tuple[Standing, ...]
    shares: Mapping[str, float | None]
    shared_rates: tuple[SharedRate, ...]
    best_spread: float | None

    @property
    def shared(self) -> SharedRate | None:
        """The one rate that is best for all setups together."""
        better = min if self.better == "min" else max
        return better(self.shared_rates, key=lambda s: s.mean, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as plain data."""
        return {**dataclasses.asdict(self), "shared": None if self.shared is None else dataclasses.asdict(self.shared)}


def analyse(
    records: Iterable[Record], score: str, better: Way, times: Iterable[Timing] = (), rates: Sequence[float] = ()
) -> Analysis:
    """Analyse the records of a study; a function of them alone.

    A run that diverged counts as the worst score that any run of the study had, before or after training, so that a
    rate that ruins one seed is not the best of the others. One that failed for another reason is left out.

    Parameters
    ----------
    records
        Of runs that ended.
    score
        Name of the score.
    better
        ``min`` or ``max``.
    times
        Of steps alone.
    rates
        Those over which the variance is analysed, as far as all setups have them; all of them if not given.

    Returns
    -------
    Analysis
        Standings, shares of variance, and spreads at a shared rate and at the best ones.
    """
    found = [record for record in records if record.status != FAILED]
    tested = any(r.status == DONE for r in found) and all(r.test is not None for r in found if r.status == DONE)
    chosen, shown = values(found, better), values(found, better, tested)
    setups = list(dict.fromkeys((r.variant, r.rank, r.batch_size) for r in found))
    seconds = {(t.variant, t.rank, t.batch_size): t.seconds for t in times if t.seconds}
    whole = sum(seconds[s] for s in setups if s in seconds)
    every = list(records)
    standings = []
    for setup in setups:
        own = [(r, c, v) for r, c, v in zip(found, chosen, shown, strict=True) if _setup(r) == setup]
        failed = sum(_setup(r) == setup for r in every) - len(own)
        took = seconds.get(setup)
        standings.append(
            _standing(setup, own, better, took, None if not whole or took is None else took / whole, failed)
        )
    standings.sort(key=lambda s: (s.mean is None, (1 if better == "min" else -1) * (s.mean or 0.0)))
    by_rate = {setup: _means(found, shown, setup) for setup in setups}
    common = sorted(set.intersection(*(set(m) for m in by_rate.values()))) if by_rate else []
    common = [r for r in common if not rates or r in rates]
    shared = tuple(
        SharedRate(
            rate, statistics.fmean(m[rate] for m in by_rate.values()), _spread([m[rate] for m in by_rate.values()])
        )
        for rate in common
    )
    best = [s.mean for s in standings if s.mean is not None]
    rows = [(r, v) for r, v in zip(found, shown, strict=True) if r.rate in common]
    way = "test apart" if tested else "held-out"
    return Analysis(score, better, way, tuple(standings), anova(rows), shared, _spread(best) if best else None)  # type: ignore[arg-type]


def values(records: Sequence[Record], better: Way, test: bool = False) -> list[float]:
    """Return the score of each run, that of one that diverged too; see `analyse`."""
    seen = [v for r in records for v in (r.score, r.start, r.test if test else None) if v is not None]
    worst = (max if better == "min" else min)(seen, default=math.nan)
    scores = ((r.test if test else r.score) if r.status == DONE else worst for r in records)
    return [worst if s is None else s for s in scores]


def means(records: Iterable[Record], better: Way) -> dict[Setup, dict[float, float]]:
    """Return the mean held-out score of each rate of each setup; runs that failed are left out."""
    found = [record for record in records if record.status != FAILED]
    scores = values(found, better)
    return {s: _means(found, scores, s) for s in dict.fromkeys(map(_setup, found))}


def anova(rows: Sequence[tuple[Record, float]]) -> dict[str, float | None]:
    """Return the part of each source in the sum of squares of scores (type II), which add up to one.

    Sources with one value are None, and so is `CROSSED` where not both of its factors vary, or where there are too few
    runs to tell it from the rest. All are None where the scores do not differ.
    """
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    none = dict.fromkeys((*FACTORS, CROSSED, REST), None)
    table = pandas.DataFrame([{**{f: str(getattr(r, f)) for f in FACTORS}, "score": v} for r, v in rows])
    if table.empty or len(table) < 3 or table["score"].var() <= 0:
        return dict(none)
    varied = [f for f in FACTORS if table[f].nunique() > 1]
    terms = [f"C({f})" for f in varied]
    if {"rate", "variant"} <= set(varied) and len(table) > _degrees(table, varied, crossed=True):
        terms.append("C(variant):C(rate)")
    if not terms or len(table) <= _degrees(table, varied):
        return dict(none)
    found = anova_lm(ols(f"score ~ {' + '.join(terms)}", table).fit(), typ=2)["sum_sq"]
    total = float(found.sum())
    names = {f"C({f})": f for f in FACTORS} | {"C(variant):C(rate)": CROSSED, "Residual": REST}
    return none | {names[term]: float(value) / total for term, value in found.items()}


def _degrees(table: Any, varied: Sequence[str], crossed: bool = False) -> int:
    """How many numbers the model of an analysis of variance has."""
    counts = {f: int(table[f].nunique()) for f in varied}
    more = (counts["rate"] - 1) * (counts["variant"] - 1) if crossed else 0
    return 1 + sum(count - 1 for count in counts.values()) + more


def _setup(record: Record) -> Setup:
    return record.variant, record.rank, record.batch_size


def _means(records: Sequence[Record], scores: Sequence[float], setup: Setup) -> dict[float, float]:
    by_rate: dict[float, list[float]] = {}
    for record, score in zip(records, scores, strict=True):
        if _setup(record) == setup:
            by_rate.setdefault(record.rate, []).append(score)
    return {rate: statistics.fmean(found) for rate, found in sorted(by_rate.items())}


def _spread(found: Sequence[float]) -> float:
    return statistics.stdev(found) if len(found) > 1 else 0.0


def _standing(
    setup: Setup,
    own: Sequence[tuple[Record, float, float]],
    better: Way,
    seconds: float | None,
    share: float | None,
    failed: int,
) -> Standing:
    records = [r for r, _, _ in own]
    by_rate = _means(records, [c for _, c, _ in own], setup)
    shown = _means(records, [v for _, _, v in own], setup)
    ended = {r.rate for r in records if r.status == DONE}
    rate = (min if better == "min" else max)(
        (r for r in by_rate if r in ended), key=lambda r: by_rate[r], default=None
    )  # fmt: skip
    at_best = [v for r, _, v in own if r.rate == rate]
    starts = [r.start for r in records if r.start is not None]
    below = above = None
    if rate is not None:
        sign = 1.0 if better == "max" else -1.0
        below, above = (_lost(shown, rate, rate * factor, sign) for factor in (0.1, 10.0))
    sides = [lost for lost in (below, above) if lost is not None]
    return Standing(
        *setup,
        rate=rate,
        mean=statistics.fmean(at_best) if rate is not None else None,
        spread=statistics.stdev(at_best) if rate is not None and len(at_best) > 1 else None,
        seeds=len(at_best),
        sensitivity=statistics.fmean(sides) if sides else None,
        below=below,
        above=above,
        at_edge=rate in (min(by_rate), max(by_rate)),
        start=statistics.fmean(starts) if starts else None,
        parameters=next((r.parameters for r in records if r.parameters is not None), None),
        seconds=seconds,
        time_share=share,
        diverged=sum(r.status == DIVERGED for r in records),
        failed=failed,
    )


def _lost(by_rate: Mapping[float, float], best: float, off: float, sign: float) -> float | None:
    """Return how much worse the score at a rate is than the best, between rates of the grid by their logarithms."""
    import numpy

    grid = sorted(by_rate)
    if not grid[0] * (1 - 1e-6) <= off <= grid[-1] * (1 + 1e-6):
        return None
    at = numpy.interp(math.log(off), [math.log(r) for r in grid], [by_rate[r] for r in grid])
    return sign * (by_rate[best] - float(at))
