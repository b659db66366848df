"""The miniatures of SHiRA: equal counts, masks that overlap or do not, and records that follow from their figures."""

import pytest
import torch

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import shira as study
from lorry.claims.studies._three_tasks import fit
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.01)


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {one.key: one.study(LOOK) for one in claims("shira")}


def test_all_contenders_have_as_many_parameters_as_lora(findings):
    trial = study._trial(LOOK)
    assert len({trial.mean(name, "parameters") for name in study.CONTENDERS}) == 1
    assert all(set(panel.series) == set(study.CONTENDERS) for f in findings.values() for panel in f.panels)


def overlap(name: str) -> float:
    _, adapters = fit(study.CONTENDERS[name], 2, 0.1, 0)
    first, second = (one.entries["0"].tensors()["index"] for one in adapters[:2])
    return float(torch.isin(first, second).float().mean())


def test_positions_overlap_as_named():
    assert overlap("wm") == 1 and overlap("wm, apart") == 0
    assert 0 < overlap("rand") < 0.2 and 0 < overlap("snip") < 1


def test_measures_of_orthogonality():
    first, second = torch.zeros(2, 4, 4)
    first[0, 1], second[0, 2] = 3.0, 2.0
    assert study._awor(first, second) == 15 / 16 and study._awom(first, second) == pytest.approx(1)
    assert study._awor(first, second.roll(1, 0)) == 1 and study._awom(first, second.roll(1, 0)) == 0


def test_recorded_verdict_of_fusing_follows_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "shira"}
    alone, added = records["single"].panels[0].series, records["fusing"].panels[0].series

    def gain(name: str, lost: bool) -> list[float]:
        own, lora = ([a - lost * s for a, s in zip(added[n][0], alone[n][0], strict=True)] for n in (name, "LoRA"))
        return [a - b for a, b in zip(own, lora, strict=True)]

    verdicts = [compare(gain(name, lost)) for lost in (True, False) for name in ("wm", "wm, apart")]
    assert records["fusing"].verdict == together(verdicts)
