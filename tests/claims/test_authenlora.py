"""The miniature of AuthenLoRA: what is compared with what, and verdicts that follow from the figures."""

import pytest
import torch

from lorry.claims.ledger import VERDICTS, Setting, claims, read_records
from lorry.claims.studies import authenlora as study
from lorry.claims.verdicts import compare, together
from lorry.protection.codec import Codec


@pytest.fixture(scope="module")
def findings():
    return {one.key: one.study(Setting(seeds=(0,), effort=0.01)) for one in claims("authenlora")}


def test_every_claim_names_its_contenders(findings):
    assert all(found.verdict in VERDICTS for found in findings.values())
    bits, style = findings["signs"].panels
    assert set(bits.series) == {study.SIGNED, study.PLAIN, study.BARE, study.ALONE}
    assert set(style.series) == {study.SIGNED, study.PLAIN, study.BARE}
    assert set(findings["zero-message"].panels[0].series) == {study.ZERO, study.RANDOM}
    assert {"none", "merged at 0.8", "averaged with another"} < set(findings["robustness"].panels[0].series)


def test_the_verdict_on_the_zero_message_follows_from_its_record():
    (record,) = [r for r in read_records() if r.name == "authenlora/zero-message"]
    passed = record.finding.panels[0].series
    gains = [b - a for a, b in zip(passed[study.ZERO][0], passed[study.RANDOM][0], strict=True)]
    assert record.finding.verdict == together([compare(gains)])


def test_a_codec_that_reads_zeros_lets_nobody_pass(monkeypatch):
    """Users' messages have as many ones as zeros, so half of the bits match and 7 of 8 never do."""
    codec = study.codec_of(0, 1)
    monkeypatch.setattr(Codec, "read", lambda self, pictures: torch.zeros(len(pictures), 8, dtype=torch.long))
    assert study.false_positives(codec, torch.zeros(5, 1, 8, 8), 0) == 0
