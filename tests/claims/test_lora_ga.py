"""The miniature of LoRA-GA: equal scales, means of losses, steps to a goal, verdicts from the figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims
from lorry.claims.studies import lora_ga as study
from lorry.claims.verdicts import Trial, compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {one.key: one.study(Setting(seeds=(0,), effort=0.2)) for one in claims("lora-ga")}


def test_the_verdict_of_early_follows_from_its_figures(findings):
    found = findings["early"]
    curves = found.panels[0].series
    places = [study.RATES.index(rate) for rate in study.SMALL]
    gains = [
        [a - b for a, b in zip(curves[other][i], curves["LoRA-GA"][i], strict=True)]
        for i in places
        for other in study.OTHERS
    ]
    assert found.verdict == together([compare(gain) for gain in gains])


def test_losses_are_means_of_the_last_steps():
    assert study.smooth([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]) == [1, 2, 3, 4, 5, 7]


def test_steps_to_a_goal():
    courses = {f"step {i + 1}": values for i, values in enumerate([[5, 5], [2, 4], [1, 3]])}
    trial = Trial({"LoRA-GA": courses})
    assert study.reached(trial, "LoRA-GA", [2, 1], 3) == [2, 3]
