"""The miniatures of the claims on gradients by low-rank factors."""

import math
import statistics

import pytest

from lorry.attention import exact_gradients, fast_gradients
from lorry.claims import Setting, compare, read_records
from lorry.claims.studies import computational_limits as study
from lorry.claims.verdicts import together


def test_the_error_is_of_the_gradients_of_the_factors_and_falls_with_the_degree():
    course = [study.error(0.5, degree, seed=3) for degree in (1, 2, 4, 8)]
    assert course == sorted(course, reverse=True) and course[0] > 1e-4 and course[-1] < 1e-9


def test_the_regression_learns_and_the_guard_speaks():
    losses = study.regression(exact_gradients, 0, 1.0, 60)
    assert losses[-1] < 0.5 * losses[0]
    assert study.regression(fast_gradients, 0, 1.0, 5) == pytest.approx(losses[:5], rel=1e-3)
    assert "max_features" in study._refusal(0, 2)


def test_a_look_gives_findings():
    setting = Setting((0,), 0.02)
    for one in (study.phase_transition, study.scaling, study.training):
        assert one(setting).summary


def test_recorded_verdicts_follow_from_the_figures():
    records = {r.key: r.finding for r in read_records() if r.slug == "computational-limits"}
    four = records["phase-transition"].panels[0].series["degree 4"]
    rises = [min(b[i] / a[i] for a, b in zip(four, four[1:], strict=False)) - 1 for i in range(len(four[0]))]
    decades = [math.log10(b / a) - 6 for a, b in zip(four[0], four[-1], strict=True)]
    assert records["phase-transition"].verdict == together([compare(rises), compare(decades)])
    slopes = records["scaling"].panels[1].series
    assert statistics.fmean(slopes["factors"][0]) < 1.3 < statistics.fmean(slopes["torch"][0])
    course = records["training"].panels[0].series
    pairs = zip(course["factors"][-1], course["exact"][-1], strict=True)
    assert records["training"].verdict == "reproduced" and all(abs(a / b - 1) < 0.01 for a, b in pairs)
