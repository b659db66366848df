"""The miniatures of the merge baselines: strengths, contenders, and records that follow from their figures."""

import pytest
import torch

import lorry
from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import merging_baselines as study
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "STRENGTHS", (1.0, 2.0))
        patch.setattr(study, "DENSITIES", (0.5, 1.0))
        return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("merging-baselines")}


@pytest.fixture(scope="module")
def pool() -> shared.Pool:
    return shared.trained(0, 6, views=("flip", "shift"))


def test_the_strength_is_the_sum_of_the_weights(pool):
    x = pool.tasks["flip"].test.x[:20]
    lorry.activate(pool.network, {"flip": 0.75, "shift": 0.75})
    wanted = pool.network(x)
    with shared.carried(pool, shared.merged_by(pool, ("task-arithmetic", {}))) as at:
        at(1.5)
        assert torch.allclose(pool.network(x), wanted, atol=1e-4)
    assert set(lorry.adapters(pool.network)) == {"flip", "shift"}


def test_adapters_start_from_one_a_and_the_base_stays(pool):
    fresh = [lorry.attach(shared.base(0), {"method": "lora", "rank": 4}, name=name, seed=0) for name in "ab"]
    for path, entry in fresh[0].entries.items():
        assert torch.equal(entry.tensors()["A"], fresh[1].entries[path].tensors()["A"])
        assert torch.equal(entry.site.matrix(), pool.adapters["flip"].entries[path].site.matrix())
    assert 0 < study._cosine_of_a(pool) <= 1


def test_contenders_meet_at_the_same_strengths(findings):
    best, course = findings["task-arithmetic"].panels
    assert {study.TA, study.FACTORS, "TIES", "DARE", "KnOTS-TIES"} < set(course.series)
    assert set(course.series) < set(best.series) and tuple(course.x) == (1.0, 2.0)
    assert course.series[study.TA][0] == best.series[f"{study.TA}, weights 1/n"][0]
    assert set(findings["knots"].panels[0].series) == set(findings["knots"].panels[1].series)


def test_recorded_verdicts_follow_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "merging-baselines"}
    found = {key: {n: v[0] for n, v in one.panels[0].series.items()} for key, one in records.items()}
    first, second = found["task-arithmetic"], found["knots"]
    gains = [shared.less(first[study.TA], first[name]) for name in ("base", study.FACTORS)]
    assert records["task-arithmetic"].verdict == together([compare(gain) for gain in gains])
    gains = [shared.less(second[f"KnOTS-{name}"], second[name]) for name in ("TIES", "DARE-TIES")]
    assert records["knots"].verdict == together([compare(gain) for gain in gains])
