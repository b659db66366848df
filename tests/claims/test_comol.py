"""The trials of CoMoL at a glance, and what their records say."""

import pytest

from lorry.claims import synthetic
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import comol

LOOK = Setting(seeds=(0,), effort=0.004)
TRIALS = {one.key: one for one in claims("comol")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One rate and few rows: what is checked here does not depend on how well anything is learned."""
    monkeypatch.setattr(comol, "RATES", comol.RATES[:1])
    monkeypatch.setattr(synthetic, "HELD", 100)


@pytest.mark.parametrize("key", ["shared-subspace", "separate-subspaces"])
def test_contenders_of_the_teachers(key):
    found = run(TRIALS[key], LOOK).finding
    (panel,) = found.panels
    assert {"LoRA r=4", "mixture of 4 LoRAs"} <= set(panel.series) == set(found.rates)
    assert any(name.startswith("CoMoL") for name in panel.series)
    assert all(len(places) == 1 and len(places[0]) == 1 and places[0][0] > 0 for places in panel.series.values())
    assert found.verdict in VERDICTS and found.notes[0].startswith("Trained values: LoRA r=4 256")


def test_comol_has_values_between_two_loras():
    def values(method):
        return comol.learn(method, comol.shared_teacher, 1, 1e-2, 0)["values"]

    own = values(comol.comol())
    assert own == 2 * 4 * 32 + 4 * 16 + 4 * 4
    assert values(comol.lora(5)) < own < values(comol.lora(6)) < values(comol.mixture())


def test_cost_by_the_number_of_cores(monkeypatch):
    monkeypatch.setattr(comol, "WIDE", 256)
    monkeypatch.setattr(comol, "TOKENS", 16)
    found = run(TRIALS["many-cores"], LOOK).finding
    values, times = found.panels
    assert values.x == times.x == comol.COUNTS
    base = 2 * 8 * 256
    assert values.series["CoMoL"][-1][0] == pytest.approx((base + 64 * (8 * 8 + 8)) / base)
    assert values.series["mixture of whole LoRAs"][-1][0] > 64
    assert all(time[0] > 0 for time in times.series["CoMoL"])


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "comol"}
    assert set(records) == set(TRIALS)
    assert all(r.effort == 1 and len(r.seeds) >= 3 for r in records.values())
    series = records["separate-subspaces"].finding.panels[0].series
    behind = [a > b for a, b in zip(series["CoMoL r=4"][0], series["mixture of 4 LoRAs"][0], strict=True)]
    assert (records["separate-subspaces"].finding.verdict == "reproduced") == all(behind)
