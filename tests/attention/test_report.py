"""The report's figures, and the picture."""

import json
import math

import pytest
import torch
from attention.tiny import LENGTH, causal_model, noise, tokens, unet

from lorry.attention import AttentionError, heat_map, report, watch


def test_figures_are_those_of_the_calls():
    model = causal_model("llama")
    calls = []
    with torch.no_grad(), watch(model, calls.append):
        model(tokens())
    found = report(model, tokens())
    assert [site.path for site in found.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for site, call in zip(found.sites, calls, strict=True):
        q, k, v = call.q.double(), call.expand(call.k).double(), call.v.double()
        assert (site.kind, site.heads, site.calls, site.keys) == ("self", 4, 1, LENGTH)
        assert site.q_max == pytest.approx(float(q.abs().max()))
        assert site.k_max == pytest.approx(float(k.abs().max()))
        assert site.v_max == pytest.approx(float(v.abs().max()))
        logits = torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(8)
        assert site.logit_max == pytest.approx(float(logits.abs().max()), rel=1e-5)
        gamma = max(site.q_max, site.k_max) * 8**-0.25
        assert site.ratio == pytest.approx(gamma / math.sqrt(math.log(LENGTH)))
        assert site.logit_max <= 8 * gamma**2
        p = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf).softmax(-1)
        entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1)
        assert site.entropy == pytest.approx(float(entropy.mean()), rel=1e-4)
        heads = entropy.mean(dim=(0, 2))
        assert site.sharpest_head == int(heads.argmin())
        assert site.sharpest_entropy == pytest.approx(float(heads.min()), rel=1e-4)


def test_every_form_of_inputs_and_the_table():
    model = causal_model("llama")
    forms = [tokens(), {"input_ids": tokens()}, (tokens(),), lambda m: m(tokens())]
    tables = [report(model, form) for form in forms]
    assert all(table == tables[0] for table in tables)
    lines = str(tables[0]).splitlines()
    assert len(lines) == 3 and lines[0].startswith("path") and lines[1].startswith("model.layers.0.self_attn")
    assert json.loads(json.dumps(tables[0].records()))[1]["path"] == "model.layers.1.self_attn"


def test_a_generation_counts_its_steps():
    model = causal_model("llama")
    found = report(model, lambda m: m.generate(tokens(), max_new_tokens=3, min_new_tokens=3), targets="layers.1.*")
    assert [(site.calls, site.keys) for site in found.sites] == [(3, LENGTH + 2)]
    assert found.sites[0].path == "model.layers.1.self_attn"


def test_larger_weights_mean_larger_norms():
    """Scaling the query projection scales its norm, its logits and the paper's ratio, and sharpens attention."""
    model = causal_model("llama")
    before = report(model, tokens()).sites[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(20)
    after = report(model, tokens()).sites[0]
    assert after.q_max == pytest.approx(20 * before.q_max, rel=1e-4)
    assert after.logit_max == pytest.approx(20 * before.logit_max, rel=1e-4)
    assert after.k_max == before.k_max
    assert after.entropy < before.entropy


def test_cross_attention_only():
    found = report(unet(), (noise(2, 4, 8, 8), 3, noise(2, 5, 16)), kinds="cross")
    assert {site.kind for site in found.sites} == {"cross"}
    assert {site.keys for site in found.sites} == {5}
    assert all(0 < site.entropy <= math.log(5) + 1e-6 for site in found.sites)


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_a_heat_map_is_drawn_whole(tmp_path):
    maps = torch.zeros(2, 4, 4)
    maps[0].fill_diagonal_(1.0)
    maps[1, :, 0] = 1.0
    names = list("abcd")
    path = heat_map(maps, tmp_path / "deep" / "map.png", title="two heads", queries=names, keys=names)
    picture = pixels(path)
    assert [p.name for p in path.parent.iterdir()] == ["map.png"]
    # both ends of the colour scale (viridis) fill their share: 8 of 32 cells are 1, the others 0
    bright = (picture[..., 0] > 0.9) & (picture[..., 1] > 0.85) & (picture[..., 2] < 0.2)
    dark = (picture[..., 0] < 0.3) & (picture[..., 1] < 0.05) & (picture[..., 2] > 0.3)
    assert 0.25 < bright.sum() / dark.sum() < 0.45


def test_one_map_and_chosen_heads(tmp_path):
    maps = torch.rand(6, 3, 5, generator=torch.Generator().manual_seed(0))
    wide = pixels(heat_map(maps, tmp_path / "six.png"))
    narrow = pixels(heat_map(maps, tmp_path / "two.png", heads=[5, 0]))
    single = pixels(heat_map(maps[0], tmp_path / "one.png"))
    assert wide.shape[1] > narrow.shape[1] > single.shape[1]
    assert wide.shape[0] > narrow.shape[0]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 3, 3), {}, r"found \(1, 2, 3, 3\); take one row"),
        ((2, 3, 3), {"keys": ["a"]}, "keys has 1 names, but the probabilities have 3 keys"),
        ((2, 3, 3), {"heads": [2]}, r"some of 0 to 1, found \[2\]"),
    ],
)
def test_pictures_that_cannot_be_drawn(tmp_path, shape, options, message):
    with pytest.raises(AttentionError, match=message):
        heat_map(torch.zeros(shape), tmp_path / "no.png", **options)
    assert not list(tmp_path.iterdir())
