"""The miniature of LiON-LoRA's norm consistency: sizes, errors, and a record that follows from its figures."""

import pytest

from lorry.claims.ledger import Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import lion_lora as study
from lorry.claims.verdicts import compare


def test_contenders_and_both_errors(monkeypatch):
    monkeypatch.setattr(shared, "STRENGTHS", (1.0, 2.0))
    (one,) = claims("lion-lora")
    found = one.study(Setting(seeds=(0,), effort=0.01))
    for panel in found.panels:
        assert set(panel.series) == set(study.WAYS)
        assert all(0 <= value <= 1 for places in panel.series.values() for value in places[0])


def test_the_merge_gives_both_one_size_and_the_sum_does_not():
    strong, weak = shared.trained(0, 10, views=("flip",)), shared.trained(0, 2, views=("shift",))
    assert study.norm(strong, "flip") > 2 * study.norm(weak, "shift")
    pool = shared.Pool(strong.network, {}, {**strong.adapters, **weak.adapters}, 0)
    merged = shared.merged_by(pool, study.WAYS[study.EVEN])
    for site in merged.receipt.sites:
        sizes = [
            ratio * float(pool.adapters[name].entries[site.path].delta().norm())
            for name, ratio in site.facts["ratios"].items()
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_errors_are_told_apart():
    row = {"validation": 0.5, "test": 0.6, "test flip": 0.9, "test shift": 0.3}
    found = study._errors(row, "shift")
    assert found[study.WEAK] == pytest.approx(0.7) and found[study.STRONG] == pytest.approx(0.1)


def test_recorded_verdict_follows_from_the_figures():
    (record,) = [one for one in read_records() if one.slug == "lion-lora"]
    series = record.finding.panels[0].series
    assert record.finding.verdict == compare(shared.less(series[study.SUM][0], series[study.EVEN][0]))
