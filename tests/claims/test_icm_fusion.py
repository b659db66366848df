"""The miniatures of ICM-Fusion: few-shot contenders, rebuilding, and records that follow from their figures."""

import statistics

import pytest
import torch

import lorry
from lorry.claims.digits import base
from lorry.claims.ledger import Setting, claims, read_records
from lorry.claims.studies import _digit_merges as shared
from lorry.claims.studies import icm_fusion as study
from lorry.claims.studies._digit_merges import VIEWS, less
from lorry.claims.studies._icm_scene import SUPPORT, WIDTH, coder, scene
from lorry.claims.verdicts import compare, together

LOOK = Setting(seeds=(0,), effort=0.01)


@pytest.fixture(scope="module")
def one():
    with scene(0, LOOK) as found:
        yield found


@pytest.mark.parametrize("key", [one.key for one in claims("icm-fusion")])
def test_contenders(key, monkeypatch):
    monkeypatch.setattr(shared, "STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr(study, "RATES", (0.05,))
    monkeypatch.setattr(study, "REFINING", (1e-2,))
    found = next(one for one in claims("icm-fusion") if one.key == key).study(LOOK)
    (panel,) = found.panels
    assert all(len(places) == 1 and len(places[0]) == 1 for places in panel.series.values())
    contenders = {
        "reconstruction": {"original", "rebuilt"},
        "conditioning": {"weights: own vector", "hidden states: another's vector"},
        "fusion": {study.LATENT, study.AVERAGE, study.TUNED, study.REFINED},
    }
    assert contenders[key] < set(panel.series)


def test_support_rows_choose_nothing_else(one):
    for view in VIEWS:
        own, rest = one.support[view].x, one.pool.tasks[view].validation.x
        assert len(own) == SUPPORT and len(own) + len(rest) == 397
        assert (torch.cdist(own, rest).amin(1) > 0).float().mean() > 0.9  # few digits of the set are drawn twice
        assert len(one.tasks[view].checkpoints) > 1


def test_tuned_weights_lower_the_loss_on_the_support_rows(one):
    network = one.pool.network

    def loss(weights):
        lorry.activate(network, dict(zip(one.pool.adapters, weights, strict=True)))
        with torch.no_grad():
            value = float(study.support_loss(one, network))
        lorry.activate(network, None)
        return value

    assert loss(study.tuned_weights(one, 5, 0.1)) < loss([1 / 4] * 4)


def test_refining_leaves_the_network_as_it_was(one):
    study.refined(one, None, 2, 1e-2)
    assert set(lorry.adapters(one.pool.network)) == set(VIEWS)
    plain = base(0, WIDTH)
    x = one.support["flip"].x
    assert torch.equal(plain(x), one.pool.network(x))


def test_a_rebuilt_adapter_has_the_shapes_of_the_original(one):
    made = coder(one, LOOK)
    for path, tensors in made.rebuilt("flip").items():
        own = one.pool.adapters["flip"].entries[path].tensors()
        assert {name: value.shape for name, value in tensors.items()} == {n: own[n].shape for n in ("A", "B")}


def test_recorded_verdicts_follow_from_the_figures():
    records = {one.key: one.finding for one in read_records() if one.slug == "icm-fusion"}
    found = {key: {n: v[0] for n, v in one.panels[0].series.items()} for key, one in records.items()}
    fusion = found["fusion"]
    verdicts = [
        compare(less(fusion[study.LATENT], fusion[study.AVERAGE])),
        compare(less(fusion[study.LATENT], fusion[study.TUNED]), margin=-1e-9),
    ]
    assert records["fusion"].verdict == together(verdicts)
    rebuilt = found["reconstruction"]
    ratios = [a / b for a, b in zip(rebuilt["rebuilt"], rebuilt["original"], strict=True)]
    assert records["reconstruction"].verdict == compare([ratio - 0.95 for ratio in ratios])
    steered = found["conditioning"]
    costs = [
        less(steered[f"{kind}: own vector, noise"], steered[f"{kind}: another's vector"])
        for kind in ("hidden states", "weights")
    ]
    assert records["conditioning"].verdict == together([compare(cost) for cost in costs])
    assert statistics.fmean(rebuilt["original"]) > statistics.fmean(rebuilt["base"])
