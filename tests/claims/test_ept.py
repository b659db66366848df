"""The trials of EPT at a glance, and what their records say."""

import functools

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
    assert set(kronecker.series) == set(ept.CONTENDERS) >= {"pyramid", "all 2", "all 4", "all 6", "all 8", ept.BARE}
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
    counts = ept.count({"method": "ept", "rank": 8}, (768, 768))
    router, tasks = 8 * 768, 8 * 768 / ept.DEPTH
    assert counts == {"all": 6384 + router + tasks, "router": router, "tasks": tasks}
    factors = found.panels[0].series
    assert factors["experts alone"][0][0] == pytest.approx(98304 / 6384)
    for alone, routed, whole in zip(*factors.values(), strict=True):
        assert alone[0] > routed[0] > whole[0]


def test_embeddings_learn_their_tasks_and_tell_rows_without_a_label():
    assert {name for name, method in ept.CONTENDERS.items() if not method["contrastive"]} == {ept.BARE}
    assert all(ept.CONTENDERS[name]["gate"] == "token+task" for name in ept.KERNELS)

    def told(name, steps):
        made = functools.partial(ept.teacher, structured=True)
        return ept.learn(ept.CONTENDERS[name], made, steps, 8e-2, 0)["told"]

    first, last = (told("pyramid", steps) for steps in (1, 40))
    assert first < last and last > 0.95
    assert told(ept.BARE, 1) == 0


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "ept"}
    assert set(records) == set(TRIALS)
    leads = []
    for panel in records["pyramid"].finding.panels:
        own = panel.series["pyramid"][0]
        others = [values[0] for name, values in panel.series.items() if name.startswith("all ")]
        leads.append([min(errors) - e for e, *errors in zip(own, *others, strict=True)])
    assert records["pyramid"].finding.verdict == together([compare(leads[0]), compare(leads[1], margin=-0.01)])
