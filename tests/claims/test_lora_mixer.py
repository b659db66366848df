"""The trials of LoRA-Mixer at a glance, and what their records say."""

import statistics

import pytest
import torch

from lorry import pocket
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import lora_mixer
from lorry.claims.studies.lora_mixer import AVERAGE, BALANCED, LINES, ORACLE, RSL
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.01)
TRIALS = {one.key: one for one in claims("lora-mixer")}


@pytest.fixture(scope="module")
def findings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_mixer, "RATES", (1e-2,))
        patch.setattr(lora_mixer, "SKILLS", ("middle", "star"))
        patch.setattr(lora_mixer, "ROWS", 2)
        lora_mixer.trials.cache_clear()
        yield {key: run(one, LOOK).finding for key, one in TRIALS.items()}
    lora_mixer.trials.cache_clear()


def test_contenders(findings):
    (words,) = findings["routed"].panels
    assert {RSL, AVERAGE, ORACLE} <= set(words.series) and words.x == LINES
    match, known, flat = findings["specialise"].panels
    assert set(match.series) == set(known.series) == set(flat.series) == set(lora_mixer.LOSSES)
    assert all(0 <= values[0] <= 1 for places in match.series.values() for values in places)
    assert all(finding.verdict in VERDICTS for finding in findings.values())


def test_only_routers_are_trained(findings):
    # eight routers of two experts on a width of 128
    assert findings["routed"].notes[0] == f"The routers have {8 * 2 * 128:,} values."


def test_one_pass_judges_as_greedy_decoding_does():
    model, tokenizer = pocket.load()
    bench = lora_mixer.Bench(model, tokenizer, 0)
    lines = pocket.examples("title", "test", 12, 1) + pocket.examples("even", "test", 12, 1)
    share = lora_mixer.right(bench, lines)
    assert 0 < share < 1
    assert share == pytest.approx(pocket.exact_match(model, tokenizer, lines))


def test_information_of_known_lists():
    a = torch.arange(4).repeat(5)
    assert lora_mixer.information(a, a, 4) == pytest.approx(2)
    assert lora_mixer.information(a, torch.zeros_like(a), 4) == pytest.approx(0)
    assert lora_mixer.information(a, a % 2, 4) == pytest.approx(1)


def test_verdicts_follow_from_the_records():
    records = {r.key: r for r in read_records() if r.slug == "lora-mixer"}
    assert set(records) == set(TRIALS)
    assert all(r.effort == 1 and len(r.seeds) >= 3 for r in records.values())
    (words,) = records["routed"].finding.panels

    def leads(panel, one, two):
        return [
            [a - b for a, b in zip(*pair, strict=True)]
            for pair in zip(panel.series[one], panel.series[two], strict=True)
        ]

    over = [compare(sum(leads(words, RSL, other), [])) for other in (AVERAGE, ORACLE)]
    assert records["routed"].finding.verdict == together(over)
    match, known, _ = records["specialise"].finding.panels
    few, *more = leads(match, RSL, BALANCED)
    fewer = [min(a, a - max(later)) for a, *later in zip(few, *more, strict=True)]
    knows = [statistics.fmean(row) for row in zip(*leads(known, RSL, BALANCED), strict=True)]
    assert records["specialise"].finding.verdict == together([compare(few), compare(fewer), compare(knows)])
