"""The trials of MixLoRA at a glance, and what their records say."""

import pytest
import torch

import lorry
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import mixlora
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.01)
TRIALS = {one.key: one for one in claims("mixlora")}


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Networks without their 600 steps, and one rate."""
    monkeypatch.setattr(mixlora, "base", lambda seed: mixlora.Network())
    monkeypatch.setattr(mixlora, "RATES", (1e-2,))


def test_contenders_and_control():
    finding = run(TRIALS["conflict"], LOOK).finding
    loss, accuracy, single = finding.panels
    assert set(loss.series) == set(accuracy.series) == set(mixlora.CONTENDERS)
    assert set(single.series) == {mixlora.LORA, mixlora.MIXLORA}
    assert all(values[0][0] > 0 for values in loss.series.values())
    assert finding.verdict in VERDICTS and finding.notes[0].startswith("Trained values: LoRA r=18 13,824")


def test_the_matched_lora_is_the_least_with_as_many_values():
    def values(method):
        return lorry.attach(mixlora.Network(), method, targets=mixlora.TARGETS).count()

    one_less = {"method": "lora", "rank": mixlora.MATCHED - 1}
    assert values(one_less) < values(mixlora.mixture()) <= values(mixlora.plain())


def test_tasks_are_in_conflict():
    images = mixlora.digits.task("clean").test
    rows = mixlora.rows(images, range(mixlora.TAGS), 0)
    assert rows.x.shape == (mixlora.TAGS * len(images.x), 64 + mixlora.TAGS)
    answers = rows.y.reshape(mixlora.TAGS, -1)
    assert len({tuple(row.tolist()) for row in answers}) == mixlora.TAGS
    torch.testing.assert_close(rows.x[: len(images.x), :64], images.x)


@pytest.mark.parametrize("key", ["balance", "pooled-balance"])
def test_routers_start_on_two_experts(key):
    (panel,) = run(TRIALS[key], LOOK).finding.panels
    assert panel.x[0] == 0 and len(panel.x) == mixlora.POINTS + 1
    assert all(places[0][0] < 1.5 for places in panel.series.values())
    assert all(0 <= place[0] <= 2.0001 for places in panel.series.values() for place in places)


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "mixlora"}
    assert set(records) == set(TRIALS)
    assert all(r.effort == 1 and len(r.seeds) >= 3 for r in records.values())

    def pairs(panel, one, two):
        return zip(panel.series[one][0], panel.series[two][0], strict=True)

    loss, _, single = records["conflict"].finding.panels
    better = compare([a - b for a, b in pairs(loss, mixlora.LORA, mixlora.MIXLORA)])
    alike = compare([0.02 - abs(a - b) for a, b in pairs(single, mixlora.LORA, mixlora.MIXLORA)])
    assert records["conflict"].finding.verdict == together([better, alike] if better == "reproduced" else [better])

    (panel,) = records["balance"].finding.panels

    def rises(weight):
        course = panel.series[f"weight {weight:g}"]
        return [end - start for start, end in zip(course[0], course[-1], strict=True)]

    parts = [compare(rises(0.01), 0.25), compare(rises(0.1), 0.25), compare([0.1 - rise for rise in rises(0)])]
    assert records["balance"].finding.verdict == together(parts)
