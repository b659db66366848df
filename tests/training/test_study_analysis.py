"""What follows from a study's records, held against tables whose answers are known beforehand."""

import itertools
import random
import statistics

import pytest

from lorry.training.study import Record, Timing, analyse
from lorry.training.study.analysis import CROSSED, REST, anova

RATES, RANKS, BATCHES = (1e-3, 1e-2, 1e-1), (2, 4, 8), (4, 8)


def record(variant="a", rate=1e-2, rank=8, batch=8, seed=0, status="done", **more) -> Record:
    more = {"score": None if status != "done" else 1.0, "start": 5.0, **more}
    return Record(variant, rank, batch, rate, seed, status, parameters=10, **more)


def grid(score) -> list[Record]:
    axes = itertools.product("ab", RATES, RANKS, BATCHES, (0, 1))
    return [record(v, r, k, b, s, score=score(v, r, k, b, s)) for v, r, k, b, s in axes]


# -- analysis of variance


def test_shares_of_a_balanced_table_are_the_sums_of_squares_that_it_was_made_of():
    rate = dict(zip(RATES, (-3.0, 0.0, 3.0), strict=True))  # mean square 6
    rank = dict(zip(RANKS, (-1.0, 0.0, 1.0), strict=True))  # 2/3
    batch, variant, seed = {4: -0.5, 8: 0.5}, {"a": -1.0, "b": 1.0}, {0: -0.1, 1: 0.1}  # 1/4, 1, 1/100
    tilt = {("a", 1e-3): 2.0, ("a", 1e-1): -2.0, ("b", 1e-3): -2.0, ("b", 1e-1): 2.0}  # 8/3
    records = grid(lambda v, r, k, b, s: rate[r] + rank[k] + batch[b] + variant[v] + tilt.get((v, r), 0.0) + seed[s])
    parts = {"rate": 6.0, "rank": 2 / 3, "batch_size": 0.25, "variant": 1.0, CROSSED: 8 / 3, REST: 0.01}
    shares = analyse(records, "loss", "min").shares
    assert shares == pytest.approx({name: part / sum(parts.values()) for name, part in parts.items()})


def test_what_has_one_value_has_no_share_and_equal_scores_have_none():
    records = [record(rate=r, seed=s, score=r + s) for r in RATES for s in (0, 1, 2)]
    shares = analyse(records, "loss", "min").shares
    assert [name for name, share in shares.items() if share is not None] == ["rate", REST]
    assert set(anova([(r, 1.0) for r in records]).values()) == {None}
    assert set(analyse([], "loss", "min").shares.values()) == {None}


def test_with_one_run_each_the_crossed_share_stays_in_the_rest():
    drawn = random.Random(0)
    records = [record(v, r, score=drawn.random()) for v in "abc" for r in RATES]
    shares = analyse(records, "loss", "min").shares
    assert shares[CROSSED] is None and sum(s for s in shares.values() if s is not None) == pytest.approx(1)


# -- the best rate


def test_the_best_rate_is_that_of_the_best_mean_and_its_spread_is_over_seeds():
    scores = {1e-3: (3.0, 3.2), 1e-2: (1.0, 2.0), 1e-1: (0.5, 3.5)}
    records = [record(rate=r, seed=s, score=v) for r, both in scores.items() for s, v in enumerate(both)]
    (best,) = analyse(records, "loss", "min").standings
    assert (best.rate, best.mean, best.seeds, best.at_edge, best.start) == (1e-2, 1.5, 2, False, 5.0)
    assert best.spread == pytest.approx(statistics.stdev((1.0, 2.0)))
    (other,) = analyse(records, "accuracy", "max").standings
    assert (other.rate, other.at_edge) == (1e-3, True)


@pytest.mark.parametrize(("way", "sign"), [("min", 1), ("max", -1)])
def test_sensitivity_is_what_a_decade_costs(way, sign):
    curve = {1e-4: 5.0, 1e-3: 3.0, 1e-2: 1.0, 1e-1: 4.0}
    records = [record(rate=r, score=sign * v) for r, v in curve.items()]
    (best,) = analyse(records, "score", way).standings
    assert (best.below, best.above, best.sensitivity) == pytest.approx((2.0, 3.0, 2.5))
    (cut,) = analyse([r for r in records if r.rate < 0.1], "score", way).standings
    assert cut.above is None and cut.sensitivity == pytest.approx(2.0)
    (short,) = analyse([r for r in records if r.rate in (1e-2, 1e-1)], "score", way).standings
    assert short.below is None and short.above == pytest.approx(3.0)


def test_between_rates_of_the_grid_scores_are_read_by_the_logarithm():
    records = [record(rate=r, score=v) for r, v in ((1e-4, 4.0), (1e-2, 2.0), (10**-1.5, 1.0))]
    (best,) = analyse(records, "loss", "min").standings
    assert best.below == pytest.approx(2.5 - 1.0)  # a quarter of the way from 1e-2 to 1e-4


def test_test_scores_are_shown_at_the_rate_that_held_out_scores_choose():
    records = [record(rate=r, score=s, test=t) for r, s, t in ((1e-3, 1.0, 7.0), (1e-2, 2.0, 3.0))]
    found = analyse(records, "loss", "min")
    assert (found.standings[0].rate, found.standings[0].mean, found.chosen_by) == (1e-3, 7.0, "test apart")
    assert analyse([records[0], record(score=2.0)], "loss", "min").chosen_by == "held-out"


# -- runs without an end


def test_a_run_that_diverged_counts_as_the_worst_and_one_that_failed_not_at_all():
    records = [record(rate=1e-2, seed=s, score=2.0) for s in (0, 1)]
    records += [record(rate=1e-1, seed=0, score=0.1), record(rate=1e-1, seed=1, status="diverged")]
    records += [record(rate=1e-3, seed=s, score=1.0 + s) for s in (0,)] + [record(rate=1e-3, seed=1, status="failed")]
    found = analyse(records, "loss", "min")
    (best,) = found.standings
    assert best.rate == 1e-3 and best.mean == 1.0 and (best.diverged, best.failed) == (1, 1)
    assert {s.rate: s.mean for s in found.shared_rates}[1e-1] == pytest.approx((0.1 + 5.0) / 2)  # the start was worst


def test_a_variant_of_which_nothing_ended_comes_last_without_a_rate():
    records = [record("a", rate=r, score=1.0) for r in RATES]
    records += [record("b", rate=r, status="diverged") for r in RATES]
    best, lost = analyse(records, "loss", "min").standings
    assert (best.variant, lost.variant, lost.rate, lost.mean, lost.diverged) == ("a", "b", None, None, 3)


# -- variants together


def test_spreads_at_one_rate_and_at_the_best_ones():
    curves = {"a": (1.0, 4.0, 9.0), "b": (3.0, 1.0, 9.0), "c": (3.0, 2.5, 1.0)}
    records = [record(v, r, score=s) for v, scores in curves.items() for r, s in zip(RATES, scores, strict=True)]
    found = analyse(records, "loss", "min")
    assert found.best_spread == 0 and found.shared.rate == 1e-3
    assert found.shared.spread == pytest.approx(statistics.stdev((1.0, 3.0, 3.0)))
    wider = analyse([*records, record("a", 1.0, score=0.5)], "loss", "min", rates=RATES)
    assert [s.rate for s in wider.shared_rates] == list(RATES) and wider.shares["rate"] == found.shares["rate"]


def test_time_is_told_for_each_setup_and_as_its_part():
    records = [record(v, r) for v in "ab" for r in RATES]
    found = analyse(records, "loss", "min", [Timing("a", 8, 8, 0.01), Timing("b", 8, 8, 0.03), Timing("b", 4, 8, 9.0)])
    assert {s.variant: (s.seconds, s.time_share) for s in found.standings} == {"a": (0.01, 0.25), "b": (0.03, 0.75)}
