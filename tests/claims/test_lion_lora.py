"""The miniature of LiON-LoRA's norm consistency: sizes, errors, and a record that follows from its figures."""

import statistics

import pytest
import torch

import lorry
from lorry.claims.ledger import Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import lion_lora as study
from lorry.claims.verdicts import Trial, compare, together


def test_contenders_and_both_errors(monkeypatch):
    monkeypatch.setattr(shared, "STRENGTHS", (1.0, 2.0))
    (one,) = claims("lion-lora")
    found = one.study(Setting(seeds=(0,), effort=0.01))
    for panel in found.panels:
        assert set(panel.series) == set(study.CONTENDERS)
        assert all(0 <= value <= 1 for places in panel.series.values() for value in places[0])


@pytest.fixture(scope="module")
def pools():
    """A strongly and a weakly trained adapter, on networks of the same weights; the second's is not the first's."""
    return shared.trained(0, 10, views=("flip",)), shared.trained(0, 2, views=("shift",))


def test_the_merge_gives_both_one_size_and_the_sum_does_not(pools):
    strong, weak = pools
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
    assert found[study.BOTH] == pytest.approx(0.4)


def trial_of(**errors):
    """A trial whose contenders have these errors on the weaker and on the stronger view, by seed."""
    rows = {
        name: {
            study.WEAK: weak,
            study.STRONG: strong,
            study.BOTH: [*map(statistics.fmean, zip(weak, strong, strict=True))],
        }
        for name, (weak, strong) in errors.items()
    }
    return Trial({study.SUM: rows.pop("plain"), **rows})


def test_the_weaker_view_is_not_protected_by_dropping_the_stronger_adapter():
    trial = trial_of(
        plain=([0.5, 0.5], [0.1, 0.1]),
        dropped=([0.2, 0.2], [0.7, 0.7]),
        given_up=([0.6, 0.6], [0.0, 0.0]),
        good=([0.3, 0.4], [0.2, 0.1]),
        on_one_seed=([0.2, 0.55], [0.1, 0.1]),
    )
    judged = {name: compare(study.protects(trial, name)) for name in trial.metrics if name != study.SUM}
    assert judged == {
        "dropped": "not reproduced",
        "given_up": "not reproduced",
        "good": "reproduced",
        "on_one_seed": "on average",
    }


def test_one_adapter_alone_is_a_contender(pools):
    strong, weak = pools
    pool = shared.Pool(strong.network, {}, {**strong.adapters, **weak.adapters}, 0)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for name, own, view in ((study.WEAK_ALONE, weak, "shift"), (study.STRONG_ALONE, strong, "flip")):
        with shared.carried(pool, study._fused(pool, name, "shift")) as at:
            at(1.0)
            found = pool.network(x)
        lorry.activate(own.network, view)
        torch.testing.assert_close(found, own.network(x), rtol=1e-4, atol=1e-4)
        lorry.activate(own.network, None)


def test_recorded_verdict_follows_from_the_figures_and_dropping_one_adapter_would_not_pass():
    (record,) = [one for one in read_records() if one.slug == "lion-lora"]
    first, second = record.finding.panels
    trial = trial_of(
        **{"plain" if n == study.SUM else n: (first.series[n][0], second.series[n][0]) for n in first.series}
    )
    verdict = {name: together([compare(study.protects(trial, name))]) for name in study.CONTENDERS if name != study.SUM}
    assert record.finding.verdict == verdict[study.EVEN]
    assert verdict[study.WEAK_ALONE] == verdict[study.STRONG_ALONE] == "not reproduced"
