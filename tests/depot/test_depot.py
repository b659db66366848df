"""The retriever: what the encoder sees of weights, what it finds, and the index on disk."""

import json

import pytest
import torch
from typer.testing import CliRunner

import lorry
from lorry.cli.main import app
from lorry.core.errors import AdapterError, CheckpointError, OptionError
from lorry.depot.encoder import AdapterEncoder, EncoderShape, with_tokens
from lorry.depot.index import CAPTIONS, FACTS, INDEX, TENSORS, build_index, load_index
from lorry.depot.retriever import BagOfWords, Retriever, RetrieverTraining, recall_at, train_retriever

SHAPES = {"layers.0.up": (12, 8), "layers.0.down": (8, 12), "layers.1.up": (12, 8)}
COLOURS, THINGS = ("red", "green", "blue", "black"), ("square", "circle", "star", "cross")
SMALL = EncoderShape(width=32, probes=4, heads=2, out=32)


def adapter(colour, thing, seed, rank=2):
    """Updates of rank 2, one part for the colour and one for the thing, with noise and in a gauge of their own."""
    factors, g = {}, torch.Generator().manual_seed(seed)
    for number, (path, (out, inner)) in enumerate(SHAPES.items()):
        parts = [torch.Generator().manual_seed(1000 * number + k) for k in (colour, 50 + thing)]
        a = torch.stack([torch.randn(inner, generator=p) for p in parts]) + 0.2 * torch.randn(rank, inner, generator=g)
        b = torch.stack([torch.randn(out, generator=p) for p in parts], 1) + 0.2 * torch.randn(out, rank, generator=g)
        gauge = torch.randn(rank, rank, generator=g) * 2
        factors[path] = (torch.linalg.inv(gauge) @ a, b @ gauge)
    return factors


def pool(copies, seed):
    """Adapters of all pairs, `copies` of each, with a caption."""
    pairs = [(c, t) for _ in range(copies) for c in range(4) for t in range(4)]
    adapters = [adapter(c, t, seed + i) for i, (c, t) in enumerate(pairs)]
    return adapters, [f"a {COLOURS[c]} {THINGS[t]}" for c, t in pairs]


def encoded(factors, seed=0):
    with torch.no_grad():
        return AdapterEncoder(SHAPES, SMALL, seed)([factors])


def test_the_gauge_and_the_size_of_an_update_do_not_matter():
    plain, g = adapter(0, 1, 5), torch.Generator().manual_seed(9)
    gauge = torch.randn(2, 2, generator=g) + 2 * torch.eye(2)
    turned = {p: (torch.linalg.inv(gauge) @ a, b @ gauge) for p, (a, b) in plain.items()}
    doubled = {p: (3 * a, b) for p, (a, b) in plain.items()}
    torch.testing.assert_close(encoded(turned), encoded(plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded(doubled), encoded(plain), atol=1e-5, rtol=0)
    assert (encoded(adapter(2, 3, 5)) - encoded(plain)).abs().max() > 1e-2


def test_sites_of_one_type_share_a_projection():
    encoder = AdapterEncoder(SHAPES, SMALL)
    count = sum(p.numel() for p in encoder.to_tokens.parameters())
    assert count == (12 + 1) * 32 + (8 + 1) * 32
    sites = sum(4 * inner + 2 * out for out, inner in SHAPES.values())
    assert sum(p.numel() for p in (*encoder.probes, *encoder.norms.parameters())) == sites


def test_held_out_adapters_are_found_by_words_and_not_by_their_flattened_weights():
    adapters, captions = pool(6, 0)
    held, _ = pool(1, 500)
    queries = [f"a {c} {t}" for c in COLOURS for t in THINGS]
    words = BagOfWords.of(captions)
    retriever = Retriever(SHAPES, SMALL, len(words.words))
    settings = RetrieverTraining(steps=120, rows=32, rate=3e-3)
    losses = train_retriever(retriever, adapters, [[text] for text in captions], words, settings, 0)
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        found = recall_at(retriever.of_texts(words(queries)) @ retriever.of_adapters(held).mT)

    def flat(one):
        return torch.cat([t.flatten() for pair in one.values() for t in pair])

    # the nearest of the pool by its flattened factors, and whether it has the caption
    near = torch.cdist(torch.stack([flat(h) for h in held]), torch.stack([flat(a) for a in adapters])).argmin(1)
    flattened = sum(captions[n] == q for n, q in zip(near.tolist(), queries, strict=True)) / len(queries)
    assert found > 0.8 and found > flattened + 0.2


def depot(folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 8))
    for number, (colour, thing) in enumerate((c, t) for c in range(3) for t in range(2)):
        one = lorry.attach(model, lorry.LoRA(rank=2), targets="all", name=f"n{number}")
        with torch.no_grad():
            for entry, part in zip(one.entries.values(), adapter(colour, thing, number).values(), strict=False):
                entry.tensors()["A"].copy_(part[0])
                entry.tensors()["B"].copy_(part[1])
        one.save(folder / f"n{number}")
        (folder / f"n{number}" / CAPTIONS).write_text(f"a {COLOURS[colour]} {THINGS[thing]}\n")
        one.detach()
    return folder


def test_a_folder_is_searched_and_the_index_kept(tmp_path):
    place, program = depot(tmp_path / "depot"), CliRunner()
    asked = ["search", "a green circle", str(place), "-k", "1", "--json"]
    first = program.invoke(app, [*asked, "-o", "steps=80", "-o", "rate=0.003"])
    assert first.exit_code == 0, first.output
    (hit,) = json.loads(first.stdout)["hits"]
    assert hit["name"] == "n3"
    before = {p.name: p.read_bytes() for p in (place / INDEX).iterdir()}
    assert json.loads(program.invoke(app, asked).stdout)["hits"] == [hit]
    assert {p.name: p.read_bytes() for p in (place / INDEX).iterdir()} == before
    unknown = program.invoke(app, ["search", "zebra", str(place)])
    assert unknown.exit_code == 2 and "None of the words" in unknown.output
    facts = json.loads((place / INDEX / FACTS).read_text())
    (place / INDEX / FACTS).write_text(json.dumps({**facts, "names": facts["names"][1:]}))
    with pytest.raises(CheckpointError, match="5 adapters"):
        load_index(place / INDEX)


def test_what_cannot_be_indexed_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no folders"):
        build_index(tmp_path)
    with pytest.raises(CheckpointError, match="holds no folders"):
        build_index(tmp_path / "nowhere")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(CheckpointError, match="holds no folders"):
        build_index(tmp_path)
    (tmp_path / "broken").mkdir()
    with pytest.raises(CheckpointError, match="'.*broken' in the depot"):
        build_index(tmp_path)
    with pytest.raises(AdapterError, match="made for 3 sites"):
        encoded({"other": (torch.zeros(2, 8), torch.zeros(12, 2))})
    retriever = Retriever(SHAPES, SMALL, 4)
    with pytest.raises(OptionError, match="two adapters or more"):
        train_retriever(retriever, [adapter(0, 0, 0)], [["red"]], BagOfWords.of(["red"]), RetrieverTraining(), 0)


def test_adapters_of_another_base_in_the_folder_are_named(tmp_path):
    place = depot(tmp_path / "depot")
    torch.manual_seed(1)  # the same layers with other weights
    other = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 8))
    lorry.attach(other, lorry.LoRA(rank=2), targets="all", name="stranger").save(place / "stranger")
    with pytest.raises(CheckpointError, match="made for one base: 'n0' .* 'stranger'"):
        build_index(place)
    wider = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    lorry.attach(wider, lorry.LoRA(rank=2), targets="all", name="wide").save(place / "stranger", overwrite=True)
    with pytest.raises(CheckpointError, match="stranger' in the depot cannot be used: '0' is"):
        build_index(place)
    few = torch.nn.Sequential(torch.nn.Linear(8, 12))
    lorry.attach(few, lorry.LoRA(rank=2), targets="all", name="few").save(place / "stranger", overwrite=True)
    with pytest.raises(
        CheckpointError, match="stranger' in the depot cannot be used: The encoder was made for 2 sites"
    ):
        build_index(place)


def test_a_damaged_index_is_refused_and_a_query_needs_words(tmp_path):
    place, settings = depot(tmp_path / "depot"), RetrieverTraining(steps=2)
    index = build_index(place, shape=SMALL, settings=settings)
    for text in ("", "  ", "?!"):
        with pytest.raises(OptionError, match="needs words"):
            index.search(text)
    with pytest.raises(OptionError, match="None of the words of 'zebra' is known to the index. It knows 'a'"):
        index.search("zebra")
    index.save(tmp_path / "index")
    facts, tensors = (tmp_path / "index" / name for name in (FACTS, TENSORS))
    whole = {path: path.read_bytes() for path in (facts, tensors)}
    known = json.loads(whole[facts])
    damaged = (
        (tensors, whole[tensors][:-100]),
        (tensors, b""),
        (facts, whole[facts][:40]),
        (facts, json.dumps({**known, "encoder": {**known["encoder"], "width": 0}}).encode()),
        (facts, json.dumps({**known, "encoder": {**known["encoder"], "width": 64}}).encode()),
        (facts, json.dumps({**known, "words": known["words"][1:]}).encode()),
        (facts, json.dumps([]).encode()),
    )
    for path, content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read: .* Build it anew"):
            load_index(tmp_path / "index")
        path.write_bytes(whole[path])
    assert load_index(tmp_path / "index").names == index.names
    with pytest.raises(CheckpointError, match="There is no index"):
        load_index(tmp_path / "none")


def test_adapters_of_several_ranks_are_encoded_side_by_side():
    small, large = adapter(0, 1, 5), {p: (a.repeat(2, 1), b.repeat(1, 2)) for p, (a, b) in adapter(2, 3, 6).items()}
    together = AdapterEncoder(SHAPES, SMALL)([small, large])
    torch.testing.assert_close(together, torch.cat([encoded(small), encoded(large)]), atol=1e-5, rtol=0)


def test_what_came_to_the_folder_after_the_index_is_told(tmp_path):
    place, program = depot(tmp_path / "depot"), CliRunner()
    asked = ["search", "a green circle", str(place), "-k", "1"]
    program.invoke(app, [*asked, "-o", "steps=2"])
    (place / "n0").rename(place / "renamed")
    found = program.invoke(app, asked)
    assert found.exit_code == 0 and "'renamed'" in found.output and "'n0'" in found.output and "--build" in found.output


def test_tokens_stand_behind_the_prompt():
    encoder = AdapterEncoder(SHAPES, EncoderShape(width=32, special=2, heads=2, out=20))
    tokens = encoder([adapter(0, 0, 1)])[0]
    prompt = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    longer = with_tokens(prompt, tokens, 0.5)
    assert longer.shape == (3, 7, 20) and torch.equal(longer[:, :5], prompt)
    assert torch.equal(longer[1, 5:], 0.5 * tokens)
    longer.sum().backward()
    assert encoder.probes[0].grad is not None
    with pytest.raises(AdapterError, match="width of 8"):
        with_tokens(torch.zeros(1, 2, 8), tokens)
