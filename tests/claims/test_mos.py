"""The miniatures of MoS: equal budgets, every step that the paper ablates, and records that follow from figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import mos

LOOK = Setting(seeds=(0,), effort=0.01)


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mos, "RATES", mos.RATES[1:2])
        return {one.key: one.study(LOOK) for one in claims("mos")}


def test_all_but_the_large_lora_have_as_many_parameters_as_lora(findings):
    trial = mos._trials(LOOK)["shift"]
    counts = {name: trial.mean(name, "parameters") for name in mos.CONTENDERS}
    large = counts.pop("LoRA, 8 x")
    assert set(counts.values()) == {large / 8}


def test_every_step_has_a_contender_without_it(findings):
    shown = findings["differentiation"].panels[0].series
    assert {"pure sharing", "+ subsets", "+ dissociation", "+ shards", "+ private"} <= set(shown)
    assert {"private, paired", "private, unsharded"} <= set(shown)
    assert set(findings["equal-budget"].panels[0].series) >= {"LoRA", "LoRA, 8 x", "+ shards", "pure sharing"}
    assert [panel.title for panel in findings["equal-budget"].panels] == list(mos.TASKS)


def test_steps_are_left_out_one_at_a_time():
    full, paired = mos.CONTENDERS["+ private"], mos.CONTENDERS["private, paired"]
    assert full.dissociated and not paired.dissociated
    assert {m.rank for name, m in mos.CONTENDERS.items() if name.startswith(("+", "private"))} == {mos.RANK}


def test_recorded_verdict_follows_from_the_figures():
    record = next(one for one in read_records() if one.name == "mos/equal-budget")
    panels = record.finding.panels

    def gain(name: str, over: str) -> list[float]:
        return [
            sum(p.series[name][0][seed] - p.series[over][0][seed] for p in panels) / len(panels)
            for seed in range(len(record.seeds))
        ]

    assert mos.CONTENDERS[mos.FULL] == mos.MoS(budget=mos.BUDGET, rank=mos.RANK, shards=4, private=1)
    verdict = mos.together([mos.compare(gain(mos.FULL, "LoRA")), mos.compare(gain(mos.FULL, "LoRA, 8 x"), -0.01)])
    assert record.finding.verdict == verdict
