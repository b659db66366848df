"""The miniature of LoRA-GGPO: rows with wrong labels, what sharpness and a bump are, verdicts from the figures."""

import pytest
import torch

import lorry
from lorry.claims import digits
from lorry.claims.ledger import Finding, Setting, claims
from lorry.claims.studies import _digit_jobs as jobs
from lorry.claims.studies import lora_ggpo as study
from lorry.claims.verdicts import compare, together


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RATES", study.RATES[:1])
        return {one.key: one.study(Setting(seeds=(0,), effort=0.05)) for one in claims("lora-ggpo")}


def test_verdicts_follow_from_the_figures(findings):
    found = findings["flatter"]
    curves = found.panels[0].series
    places = [study.RANKS.index(rank) for rank in study.HIGH]
    gains = [[a - b for a, b in zip(curves["LoRA"][i], curves["GGPO"][i], strict=True)] for i in places]
    assert found.verdict == together([compare(gain) for gain in gains])
    over_steps = findings["double-descent"].panels[1]
    assert len(over_steps.x) == study.LOOKS + 1


def test_a_fifth_of_the_labels_is_wrong():
    rows, train = study.noisy_rows(3), digits.task("rotate").train
    right = {tuple(x.tolist()): int(y) for x, y in zip(train.x, train.y, strict=True)}
    wrong = sum(right[tuple(x.tolist())] != int(y) for x, y in zip(rows.x, rows.y, strict=True))
    assert len(rows.y) == study.ROWS and wrong == round(study.WRONG * study.ROWS)


@pytest.mark.parametrize(("course", "height"), [((3, 2, 1), 0), ((3, 1, 2, 0.5, 1), 1), ((1,), 0)])
def test_a_bump_is_the_largest_rise_above_the_least_before(course, height):
    assert study.bump(course) == height


def test_sharpness_is_that_of_the_weight_with_its_update():
    (network, other), rows = (digits.base(0), digits.base(0)), study.noisy_rows(0)
    adapter, nothing = (lorry.attach(one, "lora", targets=["0", "2"], seed=0) for one in (network, other))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        lorry.activate(network, None)
        plain = jobs.loss(network, rows)
        before = study.sharpness(other, nothing, rows)
        for site, delta in adapter.deltas():
            other.get_submodule(site.path).weight += delta
    found = study.sharpness(network, adapter, rows)
    assert found == pytest.approx(study.sharpness(other, nothing, rows), rel=1e-4) and found != before
    assert jobs.loss(network, rows) == plain
