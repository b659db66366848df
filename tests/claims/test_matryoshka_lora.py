"""The miniatures of MatryoshkaLoRA: what is cut how, what is measured, and a record that follows from its figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import matryoshka_lora as study
from lorry.claims.verdicts import compare, together
from lorry.methods.parts.nested import aurac


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RATES", study.RATES[1:2])
        return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("matryoshka-lora")}


def test_areas_are_those_of_the_curves(findings):
    first, second, areas = findings["hierarchy"].panels
    for name, places in areas.series.items():
        curves = [[values[0] for values in panel.series[name]] for panel in (first, second)]
        expected = sum(aurac(study.RANKS, curve) for curve in curves) / 2
        assert places[0][0] == pytest.approx(expected, abs=1e-6)


def test_both_rules_are_tried_on_what_was_trained_once(findings):
    shown = findings["official-cut"].panels[0].series
    assert set(findings["hierarchy"].panels[0].series) < set(shown)
    assert {"Matryoshka, official cut", "Matryoshka, 1/sqrt(r), official cut"} < set(shown)
    assert {study._method(name, 0).mode for name in study.TRAINED} == {"lora", "dylora", "matryoshka"}


def test_recorded_verdict_follows_from_the_figures():
    record = next(one for one in read_records() if one.name == "matryoshka-lora/hierarchy")
    first, second, areas = record.finding.panels

    def gain(over: str) -> list[float]:
        return [a - b for a, b in zip(areas.series["Matryoshka"][0], areas.series[over][0], strict=True)]

    full = [
        sum(panel.series["Matryoshka"][-1][seed] - panel.series["DyLoRA"][-1][seed] for panel in (first, second))
        for seed in range(len(record.seeds))
    ]
    assert record.finding.verdict == together([compare(g) for g in (gain("LoRA, cut"), gain("DyLoRA"), full)])
