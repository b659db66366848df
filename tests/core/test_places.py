"""Targets by block and by kind of attention, on the networks of diffusers."""

import pytest
from core.tiny import unet
from diffusion import tiny

import lorry
from lorry.core.life.state import open_state
from lorry.core.sites.targets import select


def chosen(model, targets):
    return [site.path for site in select(model, open_state(model).catalogue, targets, kinds=("linear",)).sites]


def linears(model):
    return [path for path, module in model.named_modules() if type(module).__name__ == "Linear"]


def test_a_block_means_its_linear_layers_and_no_other_block():
    network = tiny.stable_diffusion_xl().unet
    block = "up_blocks.0.attentions.1"
    found = chosen(network, block)
    assert found == [p for p in linears(network) if p.startswith(f"{block}.")] and len(found) == 20
    assert chosen(network, f"to_q in {block}") == [p for p in found if p.endswith("to_q")]
    with pytest.raises(lorry.SiteError, match="matches none"):
        chosen(network, "up_blocks.0.attentions.9")
    with pytest.raises(lorry.SiteError, match="matches none"):
        chosen(network, "add_q_proj in mid_block")


def test_kinds_of_attention():
    network = unet((8, 16), cross=16, head=4)
    attention = chosen(network, "attention")
    assert chosen(network, "attention:cross") == [p for p in attention if ".attn2." in p]
    assert chosen(network, "attention:self") == [p for p in attention if ".attn2." not in p]
    inside = chosen(network, "attention:cross in mid_block")
    assert inside and all(p.startswith("mid_block.") and ".attn2." in p for p in inside)
    flux = tiny.flux().transformer
    assert all(p.startswith("single_transformer_blocks.") for p in chosen(flux, "attention:single"))
    assert all(p.startswith("transformer_blocks.") for p in chosen(flux, "attention:double"))
    assert sorted(chosen(flux, ["attention:single", "attention:double"])) == sorted(chosen(flux, "attention"))
    with pytest.raises(lorry.SiteError, match="matches none"):
        chosen(flux, "attention:cross")


def test_attention_over_the_frames_of_a_video():
    import torch
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    video = UNet3DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    found = chosen(video, "attention:temporal")
    assert not {*found} & {*chosen(video, "attention:cross"), *chosen(video, "attention:self")}
    assert any("temp_attentions" in p for p in found)
