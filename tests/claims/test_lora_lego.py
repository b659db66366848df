"""The miniatures of LoRA-LEGO: contenders, ranks, and records that follow from their figures."""

import statistics

import pytest

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import lora_lego as study
from lorry.claims.verdicts import compare, together

OTHERS = (study.FACTORS, "task arithmetic", "TIES", "output ensemble")


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "STRENGTHS", (1.0, 2.0))
        return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("lora-lego")}


def test_contenders_at_every_rank(findings):
    for panel in findings["reweighting"].panels:
        assert set(panel.series) == {*study.ABLATION, study.FACTORS} and tuple(panel.x) == study.RANKS
        assert len({tuple(values) for values in panel.series[study.FACTORS]}) == 1  # its rank is always 4
    best, equal, _ = findings["against-others"].panels
    assert {"LEGO", *OTHERS} < set(best.series)
    assert equal.series["LEGO"][-1] == best.series["LEGO"][0]


def test_the_output_reweighting_is_a_scale_alone():
    pool = shared.trained(0, 6, views=("flip", "shift"))
    both, units = (
        shared.merged_by(pool, ("lora-lego", {"rank": 6, **study.ABLATION[name]}))
        for name in (study.LEGO, "units only")
    )
    for path in both.sites:
        assert (both.delta(path) - (4 / 6) ** 0.5 * units.delta(path)).abs().max() < 1e-6


def test_a_cut_adapter_has_the_rank_asked_for(findings):
    pool = shared.trained(0, 6, views=("flip",), rank=8)
    for method in ("lora-lego", "svd"):
        merged = shared.merged_by(pool, (method, {"rank": 2}))
        assert all(merged.rank(path) == 2 for path in merged.sites)
    assert findings["pruning"].verdict == "reported"
    assert {"LEGO", "SVD", "base"} < set(findings["pruning"].panels[0].series)


def test_recorded_verdicts_follow_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "lora-lego"}
    verdicts = []
    for panel in records["reweighting"].panels:
        lego, none, factors = (judged(panel, name) for name in (study.LEGO, study.NONE, study.FACTORS))
        verdicts += [compare(shared.less(lego, none)), compare(shared.less(lego, factors))]
    assert records["reweighting"].verdict == together(verdicts)
    series = records["against-others"].panels[0].series
    gains = [shared.less(series["LEGO"][0], series[name][0]) for name in OTHERS]
    assert records["against-others"].verdict == together([compare(gain) for gain in gains])


def judged(panel, name):
    places = [panel.series[name][study.RANKS.index(k)] for k in study.JUDGED]
    return [statistics.fmean(row) for row in zip(*places, strict=True)]
