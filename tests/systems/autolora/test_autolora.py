"""AutoLoRA whole: a pool by fleets, retrieval, fusing behind a gate; and its parts."""

import json
import random

import pytest
import torch

import lorry
from lorry.core.errors import CheckpointError, OptionError
from lorry.depot.encoder import AdapterEncoder, EncoderShape
from lorry.depot.index import read_depot, shapes_of
from lorry.diffusion import DiffusionError, sample
from lorry.systems import Run, run
from lorry.systems.autolora.baselines import (
    FlatEncoder,
    expected_recall,
    names_of,
    regauged,
    scores_of_names,
    split,
)
from lorry.systems.autolora.fusing import triples
from lorry.systems.autolora.pool import FACTS, PoolTraining, build, concepts, read_pool
from lorry.systems.autolora.tokens import TokenTraining, own_words, train_tokens

pytest.importorskip("diffusers")
pytest.importorskip("lorry_pocket")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The system at a look's effort."""
    out = tmp_path_factory.mktemp("autolora")
    return out, run("autolora", Run(out, effort=0.02))


def test_it_runs_whole(whole):
    out, outcome = whole
    assert json.loads((out / "outcome.json").read_text())["rows"] == [list(row) for row in outcome.rows]
    assert (out / "fusing.png").stat().st_size > 1000
    shares = dict(outcome.rows)
    assert {"gate", "sum", "right adapter alone", "base"} <= set(shares)
    assert all(0 <= value <= 1 for value in shares.values())
    with pytest.raises(OptionError, match="leave out --base"):
        run("autolora", Run(out, base="somewhere"))


def test_the_pool_is_kept_and_another_is_refused(whole):
    out, _ = whole
    pool = read_pool(out / "pool")
    before = {name: (pool.path(name) / "adapter_model.safetensors").stat().st_mtime_ns for name in pool.concepts}
    again = build(out / "pool", list(pool.concepts.values()), PoolTraining(steps=2))
    assert again == pool
    assert before == {n: (pool.path(n) / "adapter_model.safetensors").stat().st_mtime_ns for n in pool.concepts}
    with pytest.raises(CheckpointError, match="made otherwise"):
        build(out / "pool", concepts(3), PoolTraining(steps=2))
    assert (out / "pool" / FACTS).is_file()
    with pytest.raises(CheckpointError, match="no pool"):
        read_pool(out / "nothing")


def test_the_gate_that_was_saved_fuses_any_adapters_of_the_pool(whole):
    from lorry.pocket.diffusion import load

    out, _ = whole
    pool, pipeline = read_pool(out / "pool"), load()
    names = list(pool.concepts)[:4]
    for name in names:
        adapter = lorry.load(pipeline.unet, pool.path(name), name=name, activate=False)
        with torch.no_grad():
            for entry in adapter.entries.values():  # two steps leave little to see
                entry.tensors()["B"].mul_(50)
    lorry.load(pipeline.unet, out / "gate", name="gate", activate=False)

    def made(compositions, **options):
        settings = {"seeds": [3] * len(compositions), "steps": 2, "guidance": 2.0, "batch_size": 3, **options}
        return sample(pipeline, "a sks shape", compositions=compositions, **settings).pixels.int()

    a, b, c, _ = names
    gated = {"sampler": {"sampler": "gated", "gate": "gate"}}
    rows = [{a: 1.0, b: 1.0, c: 1.0}, {c: 1.0}, None]
    together = made(rows, **gated)
    for number, row in enumerate(rows):
        assert (together[number] - made([row], **gated)[0]).abs().max() <= 2  # to rounding
    assert torch.equal(together[2], made([None])[0])
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], made([rows[0]])[0])
    with lorry.context(pipeline.unet, combined={"gate": [a, b, c]}):  # told around a whole sample
        assert (made(["gate"])[0] - together[0]).abs().max() <= 2
    with pytest.raises(DiffusionError, match="is none. There are: 'gate'"):
        made([{a: 1.0}], sampler={"sampler": "gated", "gate": b})
    with pytest.raises(DiffusionError, match="not the gate itself"):
        made([{"gate": 1.0}], **gated)


def test_concepts_are_different_and_their_scenes_show_them():
    found = concepts()
    assert len(found) >= 200 and len({one.text for one in found}) == len(found)
    assert concepts(10) == found[:10] and concepts(10, seed=1) != found[:10]
    rng = random.Random(0)
    for one in found[::20]:
        assert all(one.shown(one.scene(rng)).values())
        assert set(one.words.values()) <= set(one.captions[2].split())
    assert any(one.text == "a red striped square" for one in found)


def test_held_out_concepts_have_words_that_are_known():
    known = {str(number): one for number, one in enumerate(concepts())}
    learned, held = split(known, 0.2, 0)
    words = {word for name in learned for word in known[name].words.values()}
    assert not set(learned) & set(held) and len(learned) + len(held) == len(known) and len(held) > 35
    assert all(set(known[name].words.values()) <= words for name in held)
    assert split(known, 0.2, 1)[1] != held


def test_wrong_adapters_have_other_triggers(whole):
    pool = read_pool(whole[0] / "pool")
    for one in triples(pool, list(pool.concepts), 2, 0):
        assert len({one.right, *one.wrong}) == 3
        assert pool.concepts[one.right].trigger not in {pool.concepts[name].trigger for name in one.wrong}


def test_a_change_of_gauge_changes_flattened_factors_and_not_the_encoder(whole):
    _, factors, _ = read_depot(whole[0] / "pool")
    shapes, turned = shapes_of(factors[0]), regauged(factors[0], 0)
    for path, (a, b) in factors[0].items():
        torch.testing.assert_close(turned[path][1] @ turned[path][0], b @ a, atol=1e-5, rtol=1e-4)
    encoder, flat = AdapterEncoder(shapes, EncoderShape(width=16, heads=2)), FlatEncoder(shapes, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(encoder([turned]), encoder([factors[0]]), atol=1e-3, rtol=0)
        apart = flat.encode(flat.stacked([turned])) - flat.encode(flat.stacked([factors[0]]))
    assert apart.abs().max() > 1e-2


def test_ties_count_in_expectation():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert expected_recall(scores) == pytest.approx((0.5 + 1 + 0) / 3)
    assert expected_recall(scores, 2) == pytest.approx((1 + 1 + 0) / 3)
    assert expected_recall(torch.zeros(4, 4)) == pytest.approx(0.25)
    wanted = concepts(60)
    scores = scores_of_names([one.text for one in wanted], names_of(wanted, 0))
    assert 1 / 60 < expected_recall(scores) < 0.8


def test_an_adapters_own_words_are_trained_and_stand_behind_the_prompt(whole):
    from lorry.pocket.diffusion import load

    pool, pipeline = read_pool(whole[0] / "pool"), load()
    names = list(pool.concepts)[:3]
    for name in names:
        lorry.load(pipeline.unet, pool.path(name), name=name, activate=False)
    listed, factors, _ = read_depot(pool.folder)
    own = {name: factors[listed.index(name)] for name in names}
    before = {n: t.detach().clone() for n, t in pipeline.unet.named_parameters()}
    settings, shape = TokenTraining(steps=3, rows=2, pictures=1), EncoderShape(width=8, probes=2, heads=2)
    encoder, losses = train_tokens(pipeline, pool, own, settings, shape=shape)
    again, same = train_tokens(pipeline, pool, own, settings, shape=shape)
    fresh = AdapterEncoder(encoder.shapes, encoder.shape, 0)
    assert losses == same and len(losses) == 3 and encoder.shape.out == 128
    pairs = zip(encoder.state_dict().values(), again.state_dict().values(), fresh.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    after = dict(pipeline.unet.named_parameters())
    assert all(torch.equal(t, after[n]) and after[n].grad is None for n, t in before.items())

    def made(compositions, **options):
        return sample(pipeline, "a shape", compositions=compositions, steps=2, guidance=2.0, **options).pixels.int()

    words = own_words(encoder, own)
    together = made(names, predict=words)
    assert (together[1] - made(names[1:2], predict=words)[0]).abs().max() <= 2
    assert not torch.equal(together, made(names))
    with pytest.raises(DiffusionError, match="one adapter for each picture"):
        made([{names[0]: 1.0, names[1]: 1.0}], predict=words)
