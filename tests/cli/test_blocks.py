"""What an adapter does, and how like two of them are, by block."""

import pytest
import torch
from diffusion import tiny

import lorry as package
from lorry.cli.blocks import block_of, times_of


@pytest.mark.parametrize(
    "path, block",
    [
        ("up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", "up_blocks.0.attentions.1"),
        ("unet.down_blocks.1.resnets.0.conv1", "unet.down_blocks.1.resnets.0"),
        ("mid_block.attentions.0.proj_in", "mid_block.attentions.0"),
        ("single_transformer_blocks.12.attn.to_q", "single_transformer_blocks.12"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("time_embedding.linear_1", "time_embedding"),
    ],
)
def test_the_block_of_a_site(path, block):
    assert block_of(path) == block


def test_times_are_those_of_training():
    assert times_of({"training": {"job": {"objective": {"objective": "diffusion", "timesteps": [500, 1000]}}}}) == (
        500,
        1000,
    )
    assert times_of({"training": {"job": {"objective": "causal"}}}) is None and times_of({}) is None


@pytest.fixture
def two(tmp_path):
    """Two adapters of one U-Net that differ everywhere, and their updates."""
    unet, deltas = tiny.pipeline("sd").unet, {}
    for seed, name in enumerate(("one", "two")):
        adapter = package.attach(unet, package.LoRA(rank=2), targets="attention", name=name, seed=seed)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g))
        adapter.metadata["training"] = {"steps": 1, "job": {"objective": {"timesteps": [0, 500]}}}
        adapter.save(tmp_path / name)
        deltas[name] = {site.path: delta.double() for site, delta in adapter.deltas()}
        adapter.detach()
    return tmp_path, deltas


def test_inspect_by_block_sums_the_dense_updates(two, run_json, lorry):
    folder, deltas = two
    facts = run_json("inspect", folder / "one", "--by", "block", "--heatmap", folder / "heat.png")
    assert (folder / "heat.png").read_bytes().startswith(b"\x89PNG")
    blocks = {b["block"]: b for b in facts["blocks"]}
    assert "up_blocks.0.attentions.0" in blocks and sum(b["share"] for b in blocks.values()) == pytest.approx(1)
    for name, found in blocks.items():
        inside = [d for p, d in deltas["one"].items() if p.startswith(f"{name}.")]
        assert found["sites"] == len(inside)
        assert found["norm"] == pytest.approx(float(torch.cat([d.flatten() for d in inside]).norm()), rel=1e-4)
    shown = lorry("inspect", folder / "one", "--by", "block").stdout
    assert "mid_block.attentions.0" in shown and "trained from 0 to below 500" in shown


def test_compare_by_block_is_the_cosine_of_the_dense_updates(two, run_json, lorry):
    folder, deltas = two
    facts = run_json("compare", folder / "one", folder / "two", "--by", "block")
    ((_, blocks),) = facts["blocks"].items()
    for name, found in blocks.items():
        first, second = (
            torch.cat([d.flatten() for p, d in deltas[n].items() if p.startswith(f"{name}.")]) for n in ("one", "two")
        )
        assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-4)
    assert "mid_block.attentions.0" in lorry("compare", folder / "one", folder / "two", "--by", "block").stdout
