"""The trial of Block-LoRA at a glance, and what its record says."""

import pytest
import torch

from lorry.claims import digits
from lorry.claims.ledger import VERDICTS, Setting, claims, read_records, run
from lorry.claims.studies import block_lora
from lorry.claims.verdicts import compare, together

(TRIAL,) = claims("block-lora")


def test_contenders_and_counts(monkeypatch):
    monkeypatch.setattr(block_lora, "RATES", block_lora.RATES[:1])
    found = run(TRIAL, Setting(seeds=(0,), effort=0.03)).finding
    (panel,) = found.panels
    assert set(panel.series) == {"zero shots", *block_lora.CONTENDERS} and panel.x == (1, 4, 16)
    assert found.verdict in VERDICTS
    sites, width = 6, block_lora.WIDTH
    assert f"LoRA r=4 {sites * 8 * width}, LoRA r=2, B at 2 x rate {sites * 4 * width}, " in found.notes[0]
    assert f"Block-LoRA {sites * 6 * width}, Block-LoRA along the input {sites * 6 * width}." in found.notes[0]


def test_blocks_are_lora_of_half_the_rank_with_twice_the_rate():
    """Exactly so in arithmetic; any gain over that LoRA would be a fault of the method or of the trial."""
    data = block_lora.few(digits.task("flip").train, 4, 0)
    logits = []
    for name in ("Block-LoRA", block_lora.FASTER):
        model = block_lora.base(0, 2)
        block_lora.adapt(model, block_lora.CONTENDERS[name], data, 10, 1e-2, 0)
        with torch.no_grad():
            logits.append(model(data.x))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        assert (logits[0] - block_lora.base(0, 2)(data.x)).abs().max() > 0.1


@pytest.mark.parametrize("shots", [1, 16])
def test_shots_are_of_every_class_and_nested(shots):
    data = digits.task("flip").train
    found = block_lora.few(data, shots, 0)
    assert torch.equal(found.y.bincount(), torch.full((10,), shots))
    largest = {tuple(row) for row in block_lora.few(data, 16, 0).x.tolist()}
    assert {tuple(row) for row in found.x.tolist()} <= largest


def test_verdict_follows_from_the_record():
    (record,) = [r for r in read_records() if r.slug == "block-lora"]
    series = record.finding.panels[0].series

    def mean(name):
        return [sum(values) / len(values) for values in zip(*series[name], strict=True)]

    def gain(other):
        return [a - b for a, b in zip(mean("Block-LoRA"), mean(other), strict=True)]

    expected = together([compare(gain("zero shots")), compare(gain("LoRA r=4"), margin=-0.02)])
    assert record.finding.verdict == expected
