"""The trials of DEYOLO can be run, and their records are of what they say."""

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from lorry.claims.ledger import Setting
from lorry.claims.studies import deyolo


def test_both_trials_are_made_of_one_contest(monkeypatch):
    monkeypatch.setattr(deyolo, "RATES", (2e-2,))
    look = Setting(seeds=(0,), effort=0.005)
    found = {"modalities": deyolo.modalities(look), "fusions": deyolo.fusions(look)}
    deyolo.contest.cache_clear()
    assert found["fusions"].verdict == "reported"
    assert found["modalities"].panels[0].series == found["fusions"].panels[0].series
    assert set(found["fusions"].panels[0].series) == set(deyolo.CONTENDERS)
