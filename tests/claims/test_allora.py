"""The miniature of ALLoRA: what is compared with what, and verdicts that follow from the figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims
from lorry.claims.studies import allora as study
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {one.key: one.study(Setting(seeds=(0,), effort=0.02)) for one in claims("allora")}


def test_the_verdict_of_better_follows_from_its_figures(findings):
    found = findings["better"]
    reached = {name: places[0] for name, places in found.panels[0].series.items()}
    pairs = [(study.ADAPTIVE, over) for over in ("LoRA", "LoRA, dropout 0.05", "DoRA")]
    pairs.append(("ALLoRA, Adam", "LoRA, Adam"))
    gains = [[a - b for a, b in zip(reached[one], reached[over], strict=True)] for one, over in pairs]
    assert found.verdict == together([compare(gain) for gain in gains])


def test_contenders_differ_in_the_gain_alone():
    first = study.CONTENDERS["LoRA"]
    for name, options in {**study.CONTENDERS, **study.WITH_ADAM}.items():
        changed = {key for key in options if options[key] != first.get(key)}
        assert changed <= {"dynamics", "method", "optimizer"} and (name == "LoRA" or changed)
    assert study.CONTENDERS[study.ADAPTIVE]["dynamics"].eta2 == 4


def test_the_highest_usable_rate():
    reached = dict(zip(study.RATES, (0.3, 0.85, 0.9, 0.9, 0.8, 0.1), strict=True))
    by_rate = {rate: [{"test": value}] for rate, value in reached.items()} | {9.0: [{"test": 1.0}]}
    assert study.usable(by_rate, 0) == (0.3, study.RATES[3])
