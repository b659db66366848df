"""The miniatures of DO-Merging: sizes of the updates, the search, and records that follow from their figures."""

import statistics

import pytest

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import do_merging as study
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "STRENGTHS", (1.0, 2.0))
        return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("do-merging")}


def test_contenders_at_every_spread(findings):
    panel = findings["decouple"].panels[0]
    assert set(panel.series) == set(study.WAYS) and tuple(panel.x) == study.SPREADS
    assert {study.APART, study.TA, study.EQUAL} < set(panel.series)
    steps, moved = findings["orthogonalise"].panels
    assert tuple(steps.x) == study.SEARCH and tuple(moved.x) == study.SEARCH[1:]
    assert all(value[0] > 0 for places in moved.series.values() for value in places)


def test_spread_rates_make_updates_of_unequal_size():
    even, uneven = (study.variation(study.unequal(0, spread, 6)) for spread in (1, 9))
    assert uneven > 2 * even


def test_multiplied_updates_are_those_of_equal_rates():
    pool, first = study.multiplied(0, 6), study.unequal(0, 1, 6)
    for view, factor in zip(shared.VIEWS, (0.5, 2 ** (-1 / 3), 2 ** (1 / 3), 2), strict=True):
        for (_, delta), (_, own) in zip(pool.adapters[view].deltas(), first.adapters[view].deltas(), strict=True):
            assert (delta - factor * own).abs().max() < 1e-6


def test_the_search_moves_the_factors_and_may_be_capped():
    pool = study.unequal(0, 1, 6)
    still, moved, capped = (
        study.facts(shared.merged_by(pool, ("do-merging", options))) for options in ({"steps": 0}, {}, {"cap": 0.02})
    )
    assert still == (0.0, 1.0)
    assert moved[0] > capped[0] and moved[1] < capped[1] < 1
    assert capped[0] <= 0.02 + 1e-9


def test_recorded_verdicts_follow_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "do-merging"}
    apart, ta = (judged(records["decouple"].panels[0], name) for name in (study.APART, study.TA))
    second = records["decouple"].panels[1].series
    gains = [shared.less(apart, ta), shared.less(second[study.APART][0], second[study.TA][0])]
    assert records["decouple"].verdict == together([compare(gain) for gain in gains])
    steps = records["orthogonalise"].panels[0]
    gains = [shared.less(places[-1], places[0]) for places in steps.series.values()]
    assert records["orthogonalise"].verdict == together([compare(gain) for gain in gains])


def judged(panel, name):
    places = [panel.series[name][study.SPREADS.index(s)] for s in study.JUDGED]
    return [statistics.fmean(row) for row in zip(*places, strict=True)]
