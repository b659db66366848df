"""The trials of EPT at a glance, and what their records say."""

import pytest
import torch

from lorry.claims import synthetic
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import ept
from lorry.claims.verdicts import compare, together

TRIALS = {one.key: one for one in claims("ept")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One rate and few rows: what is checked here does not depend on how well anything is learned."""
    monkeypatch.setattr(ept, "RATES", ept.RATES[:1])
    monkeypatch.setattr(synthetic, "HELD", 100)


def test_contenders_on_both_teachers():
    found = run(TRIALS["pyramid"], Setting(seeds=(0,), effort=0.007)).finding
    kronecker, plain = found.panels
    assert set(kronecker.series) == {"pyramid", "all 2", "all 4", "all 6", "all 8"}
    assert set(plain.series) < set(kronecker.series)
    assert found.verdict in VERDICTS
    assert all(error[0][0] > 0 for panel in found.panels for error in panel.series.values())


@pytest.mark.parametrize("structured", [True, False])
def test_teachers_have_updates_of_one_norm_and_the_stated_form(structured):
    what = ept.teacher(0, structured)
    eye = torch.eye(ept.WIDTH)
    for group, size in enumerate(ept.SIZES):
        update = what.update(eye, torch.full((ept.WIDTH,), group)).T
        assert float(update.norm()) == pytest.approx(ept.WIDTH**0.5, rel=1e-4)
        expected = min(ept.RANK * size, ept.WIDTH) if structured else 8
        assert int(torch.linalg.matrix_rank(update)) == expected


def test_counts_are_the_published_ones():
    found = run(TRIALS["values"], Setting()).finding
    assert ept.count({"method": "ept", "rank": 8, "contrastive": 0.0}, (768, 768)) == (6384 + 8 * 768, 8 * 768)
    factors = found.panels[0].series
    assert factors["experts alone"][0][0] == pytest.approx(98304 / 6384)
    assert all(w[0] < a[0] for a, w in zip(factors["experts alone"], factors["with routers"], strict=True))


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "ept"}
    assert set(records) == set(TRIALS)
    leads = []
    for panel in records["pyramid"].finding.panels:
        own = panel.series["pyramid"][0]
        others = [values[0] for name, values in panel.series.items() if name != "pyramid"]
        leads.append([min(errors) - e for e, *errors in zip(own, *others, strict=True)])
    assert records["pyramid"].finding.verdict == together([compare(leads[0]), compare(leads[1], margin=-0.01)])
