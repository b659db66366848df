"""The miniature of FFA-LoRA: federations with and without noise, verdicts from the figures."""

import pytest

from lorry.claims.ledger import Finding, Setting, claims
from lorry.claims.studies import ffa_lora as study
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    pytest.importorskip("opacus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RATES", study.RATES[1:2])
        return {one.key: one.study(Setting(seeds=(0,), effort=0.1)) for one in claims("ffa-lora")}


def test_the_verdict_of_noise_follows_from_its_figures(findings):
    free, private = ({n: v[0] for n, v in panel.series.items()} for panel in findings["noise"].panels)
    ahead, before = ([a - b for a, b in zip(p["FFA-LoRA"], p["LoRA"], strict=True)] for p in (private, free))
    slower = [a - b for a, b in zip(ahead, before, strict=True)]
    assert findings["noise"].verdict == together([compare(slower), compare(ahead)])


def test_a_federation_repeats_itself_and_noise_changes_it():
    pytest.importorskip("opacus")
    first, again = (study.federate("A", 8.0, 1, 0.1, 0) for _ in range(2))
    assert first == again != study.federate("A", 0.0, 1, 0.1, 0)


def test_the_highest_usable_rate():
    reached = dict(zip(study.RATES, (0.5, 0.9, 0.85, 0.2, 0.0), strict=True))
    assert study.usable({rate: [{"test": value}] for rate, value in reached.items()}, 0) == study.RATES[2]
