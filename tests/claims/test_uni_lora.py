"""The miniatures of Uni-LoRA: equal counts where the claim says so, and a record that follows from its figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import uni_lora
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uni_lora, "RATES", uni_lora.RATES[1:2])
        return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("uni-lora")}


def test_counts_are_equal_where_they_are_compared(findings):
    counts = findings["equal-count"].notes[0]
    size = uni_lora.SIZE
    assert f"LoRA, rank 1 {size:,}, Uni-LoRA {size:,}, Uni-LoRA, a quarter {size // 4:,}" in counts
    assert findings["projection"].notes[0].count(f"{size:,}") == len(uni_lora.PROJECTIONS) == 5


def test_all_contenders_are_tried_on_both_tasks(findings):
    for finding in findings.values():
        assert [panel.title for panel in finding.panels] == list(uni_lora.TASKS)
        assert all("Uni-LoRA" in panel.series for panel in finding.panels)
        assert set(finding.rates.values()) <= set(uni_lora.RATES)


def test_projection_is_reported_only(findings):
    assert findings["projection"].verdict == "reported"


def test_recorded_verdict_follows_from_the_figures():
    record = next(one for one in read_records() if one.name == "uni-lora/equal-count")
    panels = record.finding.panels
    gains = [
        sum(p.series["Uni-LoRA"][0][seed] - p.series["LoRA, rank 1"][0][seed] for p in panels)
        for seed in range(len(record.seeds))
    ]
    assert record.finding.verdict == together([compare(gains)])
