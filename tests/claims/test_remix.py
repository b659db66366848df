"""The trials of ReMix at a glance, and what their records say."""

import pytest
import torch

from lorry.claims import synthetic
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import remix
from lorry.claims.verdicts import compare, together

TRIALS = {one.key: one for one in claims("remix")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One rate and few rows: what is checked here does not depend on how well anything is learned."""
    monkeypatch.setattr(remix, "RATES", remix.RATES[:1])
    monkeypatch.setattr(synthetic, "HELD", 100)
    monkeypatch.setattr(remix, "ROUTER_RATES", remix.ROUTER_RATES[:1])


def test_contenders_of_joint_training():
    found = run(TRIALS["joint"], Setting(seeds=(0,), effort=0.005)).finding
    single, pairs = found.panels
    assert {"ReMix", "ReMix, random router kept", "softmax of the best 2", "LoRA r=8"} <= set(single.series)
    assert set(pairs.series) < set(single.series)
    assert found.verdict in VERDICTS and "ReMix 2304, " in found.notes[0] and "LoRA r=8 512." in found.notes[0]


def test_remix_keeps_its_effective_experts_at_any_effort():
    found = run(TRIALS["effective-experts"], Setting(seeds=(0,), effort=0.05)).finding
    (panel,) = found.panels
    assert all(values == [pytest.approx(4)] for values in panel.series["ReMix"])
    soft = panel.series["softmax of the best 4"]
    assert 3.8 < soft[0][0] <= 4 and soft[-1][0] < soft[0][0]


def test_only_the_router_learns_from_draws():
    found = run(TRIALS["draws"], Setting(seeds=(0,), effort=0.01)).finding
    for panel in found.panels:
        assert panel.x == (2, 4, 16) and set(panel.series) == {"with baseline", "without"}
    what, a, b, pairs = remix.router_teacher(0)
    assert len({tuple(pair) for pair in pairs.tolist()}) == remix.GROUPS
    x, groups, y = what.draw(5, torch.Generator().manual_seed(0))
    for row in range(5):
        parts = [slice(4 * j, 4 * j + 4) for j in pairs[groups[row]].tolist()]
        update = sum(b[:, part] @ (a[part] @ x[row]) for part in parts) / 4
        torch.testing.assert_close(y[row], what.weight @ x[row] + update, atol=1e-4, rtol=1e-4)


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "remix"}
    assert set(records) == set(TRIALS)
    series = records["effective-experts"].finding.panels[0].series
    kept = [1e-3 - abs(value - 4) for values in series["ReMix"] for value in values]
    fell = [2.5 - value for value in series["softmax of the best 4"][-1]]
    assert records["effective-experts"].finding.verdict == together([compare(kept), compare(fell)])
