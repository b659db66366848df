"""The miniatures of FlyLoRA: starts, measures, and records that follow from their figures."""

import pytest
import torch

from lorry.claims.ledger import Finding, Setting, claims, read_records
from lorry.claims.studies import flylora as study
from lorry.claims.studies._three_tasks import always, fit, tasks
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.01)


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {one.key: one.study(LOOK) for one in claims("flylora")}


def test_starts_are_apart_unless_shared():
    for same in (False, True):
        _, adapters = fit(always(study.CONTENDERS["FlyLoRA"]), 2, 0.1, 0, same)
        first, second = (study._factors(one.entries["0"])[0] for one in adapters[:2])
        assert torch.equal(first, second) is same


def test_tasks_differ_in_their_images_only():
    left, right = tasks()["left"].test, tasks()["right"].test
    assert torch.equal(left.y, right.y) and not torch.equal(left.x, right.x)
    assert torch.equal(left.x.unflatten(1, (8, 8)).roll(2, -1).flatten(1), right.x)


def test_what_is_lost_is_single_less_merged(findings):
    trial = study._trial(LOOK)
    for values in trial.metrics.values():
        for how in ("added", "averaged"):
            assert values[f"drop {how}"][0] == pytest.approx(values["single"][0] - values[how][0])
    assert set(findings["merging"].panels[0].series) == set(study.CONTENDERS)


def test_one_merged_adapter_does_what_the_three_do_at_once(findings):
    """At weights 1/3, for LoRA and for FlyLoRA; without the choice of units it is another function."""
    averaged, _, one = findings["merging"].panels
    for name in study.CONTENDERS:
        assert one.series[name][0][0] == pytest.approx(averaged.series[name][0][0], abs=0.01)
    assert {"FlyLoRA, no choice", "FlyLoRA, by magnitude, no choice"} < set(one.series)


def test_coupling_is_full_where_every_unit_fires(findings):
    series = findings["decoupling"].panels[0].series["FlyLoRA"]
    assert series[-1] == [1.0] and all(0 < value[0] < 1 for value in series[:-1])


def test_projections_overlap_less_in_wider_layers(findings):
    first, *_, last = findings["orthogonality"].panels[1].series["FlyLoRA"]
    assert last[0] < first[0] / 2


def test_recorded_verdict_of_merging_follows_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "flylora"}
    alone = records["single"].panels[0].series
    verdicts = []
    for panel in records["merging"].panels[:2]:
        lost = {n: [a - b for a, b in zip(alone[n][0], panel.series[n][0], strict=True)] for n in panel.series}
        verdicts += [compare([a - b for a, b in zip(lost[n], lost["FlyLoRA"], strict=True)]) for n in study.LORAS]
    assert records["merging"].verdict == together(verdicts)
