"""Several models addressed as one, and a bundle: one adapter over all of them."""

import pytest
import torch
from core.tiny import off_zero, same_bytes, unet
from torch import nn

import lorry


def text_encoder(seed=1):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=8, projection_dim=8,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


TARGETS = {"unet": ["to_q", "to_v"], "text_encoder": "all-linear"}


def pipeline():
    return lorry.Roots({"unet": unet(), "text_encoder": text_encoder()})


def paint(roots, ids, x, step=5):
    words = roots["text_encoder"](ids).last_hidden_state
    return roots["unet"](x, step, words).sample


IDS = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def moved(bundle, seed=1):
    for number, part in enumerate(bundle.parts.values()):
        off_zero(part, seed + number, 0.3)
    return bundle


def test_a_bundle_trains_saves_and_loads_as_one(tmp_path):
    roots = pipeline()
    bundle = roots.attach(lorry.LoRA(rank=2), targets=TARGETS, name="style", train_also={"unet": ["conv_out"]})
    assert set(bundle.parts) == {"unet", "text_encoder"}
    with torch.no_grad():
        bare = paint(pipeline(), IDS, X)
        torch.testing.assert_close(paint(roots, IDS, X), bare)
    optimizer = torch.optim.SGD(bundle.parameters(), 0.1)
    paint(roots, IDS, X).square().mean().backward()
    assert all(p.grad is not None for p in bundle.parameters())
    optimizer.step()
    moved(bundle)
    with torch.no_grad():
        wanted = paint(roots, IDS, X)
    assert (wanted - bare).abs().max() > 1e-3
    bundle.save(tmp_path / "style")
    fresh = pipeline()
    loaded = fresh.load(tmp_path / "style")
    with torch.no_grad():
        torch.testing.assert_close(paint(fresh, IDS, X), wanted)
    assert {r: x.fingerprint for r, x in loaded.receipts.items()} == {"unet": "match", "text_encoder": "match"}
    with pytest.raises(lorry.FingerprintError):
        lorry.Roots({"unet": unet(seed=7), "text_encoder": text_encoder()}).load(tmp_path / "style")


def test_rows_and_weights_reach_every_root():
    roots = pipeline()
    moved(roots.attach(lorry.LoRA(rank=2), targets=TARGETS, name="both"))
    only = roots.attach(lorry.LoRA(rank=2), targets={"unet": "attention"}, name="picture")
    moved(only, 9)
    guided, words = torch.cat([X, X]), torch.cat([IDS, IDS])
    with torch.no_grad():
        with roots.rows([{"both": 0.5, "picture": 1.0}, None], tile=2):
            mixed = paint(roots, words, guided)
        for row, composition in ((0, {"both": 0.5, "picture": 1.0}), (1, None)):
            roots.activate(composition)
            alone = paint(roots, IDS[row : row + 1], X[row : row + 1])
            for entry in (row, row + 2):
                torch.testing.assert_close(mixed[entry : entry + 1], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(lorry.AdapterError, match="'nobody'"):
        roots.activate("nobody")


def test_all_roots_or_none():
    roots = pipeline()
    before = {r: {k: v.clone() for k, v in m.state_dict().items()} for r, m in roots.items()}
    with pytest.raises(lorry.SiteError):
        roots.attach(lorry.LoRA(rank=2), targets={"unet": "attention", "text_encoder": "nothing_like_it"})
    with pytest.raises(lorry.SiteError, match="no root 'vae'"):
        roots.attach(targets={"vae": "all-linear"})
    assert not any(lorry.adapters(m) for m in roots.values())
    bundle = moved(roots.attach(lorry.LoRA(rank=2), targets=TARGETS, name="style"))
    with torch.no_grad():
        wanted = paint(roots, IDS, X)
        bundle.fuse()
        torch.testing.assert_close(paint(roots, IDS, X), wanted, atol=1e-5, rtol=1e-4)
        bundle.unfuse()
    bundle.detach()
    for root, model in roots.items():
        assert all(same_bytes(v, before[root][k]) for k, v in model.state_dict().items())


def test_what_is_no_set_of_models_is_refused():
    for wrong in ({}, {"a": 3}, nn.Linear(2, 2), 5):
        with pytest.raises(lorry.SiteError):
            lorry.Roots(wrong)


def test_a_pipeline_gives_its_models():
    class Pipeline:
        components = {"unet": unet(), "scheduler": object(), "text_encoder": text_encoder(), "vae": None}

    assert set(lorry.Roots(Pipeline())) == {"unet", "text_encoder"}
