"""The trials of SMoRA at a glance, and what their records say."""

import pytest
import torch

import lorry
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import smora
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.004)
TRIALS = {one.key: one for one in claims("smora")}


@pytest.fixture(autouse=True)
def quick_base(monkeypatch):
    """What the trials say at this effort does not depend on how well the base knows the digits."""
    monkeypatch.setattr(smora.digits, "base", smora.digits.new_network)
    monkeypatch.setattr(smora, "RATES", smora.RATES[:1])
    smora.learn.cache_clear()
    yield
    smora.learn.cache_clear()


def test_contenders_and_counts_of_finer_experts():
    found = run(TRIALS["finer-experts"], LOOK).finding
    (panel,) = found.panels
    assert list(panel.series) == ["LoRA r=8", "LoRA r=32", "LoRA r=46", *(f"SMoRA c={size}" for size in (8, 4, 2, 1))]
    assert found.verdict in VERDICTS
    inner, outer = 64 + 128 + 128, 3 * 128
    assert f"LoRA r=32 {32 * (inner + outer)}, " in found.notes[0]
    assert f"SMoRA c=4 {32 * (inner + outer) + 8 * inner}, " in found.notes[0]


def test_the_matched_lora_is_the_largest_with_no_more_values():
    def values(method):
        network = smora.digits.new_network(hidden=smora.HIDDEN)
        return lorry.attach(network, method, targets=smora.TARGETS).count()

    assert values(smora.lora(smora.EQUAL)) <= values(smora.smora(1)) < values(smora.lora(smora.EQUAL + 1))


def test_balance_reports_loads():
    found = run(TRIALS["balance"], LOOK).finding
    loads, accuracy = found.panels
    assert set(loads.series) == set(accuracy.series) and len(loads.series) == 5
    assert all(places[0][0] > 0 for places in loads.series.values())


def test_tasks_are_in_conflict():
    data = smora.mixture(0)
    assert len(data.train.x) == 5000 and len(data.test.x) == 5 * 400
    labels = data.train.y.view(5, -1)
    assert all(not torch.equal(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :])


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "smora"}
    assert set(records) == set(TRIALS)
    series = records["finer-experts"].finding.panels[0].series
    gains = [
        [a - b for a, b in zip(series["SMoRA c=1"][0], series[other][0], strict=True)]
        for other in ("LoRA r=46", "SMoRA c=4")
    ]
    assert records["finer-experts"].finding.verdict == together([compare(one) for one in gains])
