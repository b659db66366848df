"""Which modules attend, and what is said of them."""

import pytest
import torch
from attention.tiny import Torch, bert, causal_model, flux, gpt2, mochi, sd3, t5, unet, wan, whisper
from torch import nn

from lorry.attention import AttentionSite, attention_sites, watch
from lorry.core.errors import SiteError


def test_a_grouped_model_says_its_heads():
    sites = attention_sites(causal_model("llama"))
    assert sites["model.layers.1.self_attn"] == AttentionSite(
        path="model.layers.1.self_attn",
        kind="self",
        heads=4,
        kv_heads=2,
        head_dim=8,
        owner="model.layers.1",
        interface="transformers",
    )
    assert list(sites) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (gpt2, {"self": 2, "cross": 2}),
        (bert, {"self": 2}),
        (t5, {"self": 4, "cross": 2}),
        (whisper, {"self": 2, "cross": 1}),
        (unet, {"self": 4, "cross": 4}),
        (sd3, {"joint": 2}),
        (flux, {"joint": 1, "self": 2}),
        (wan, {"self": 2, "cross": 2}),
        (mochi, {"joint": 2, "self": 1}),
        (Torch, {"self": 3, "cross": 1, "pool": 1}),
    ],
)
def test_kinds_of_real_models(build, kinds):
    found = attention_sites(build())
    # a MultiheadAttention does not tell whether its keys are its queries
    kinds["self"] = kinds.get("self", 0) + kinds.pop("pool", 0)
    counts = {kind: sum(s.kind == kind for s in found.values()) for kind in {s.kind for s in found.values()}}
    assert counts == {kind: count for kind, count in kinds.items() if count}


def test_attention_over_frames_is_temporal():
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    kinds = {path: site.kind for path, site in attention_sites(model).items()}
    assert kinds["mid_block.temp_attentions.0.transformer_blocks.0.attn1"] == "temporal"
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1"] == "self"
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn2"] == "cross"


def test_an_attention_module_itself_is_a_site_with_an_empty_path():
    assert list(attention_sites(nn.MultiheadAttention(8, 2))) == [""]


def test_what_cannot_be_seen_is_no_site():
    from diffusers.models.attention_processor import XFormersAttnProcessor

    model = unet()
    processors = dict.fromkeys(model.attn_processors, XFormersAttnProcessor())
    model.set_attn_processor(processors)
    assert attention_sites(model) == {}
    with pytest.raises(SiteError, match="no attention that can be watched"):
        watch(model, print)


def test_a_pattern_that_matches_nothing_names_near_misses():
    with pytest.raises(SiteError, match=r"No attention site matches 'model\.layers\.0\.self_atn'.*Did you mean"):
        watch(causal_model("llama"), print, targets="model.layers.0.self_atn")
    with pytest.raises(SiteError, match="no kind of attention 'crossed'.*'cross'"):
        watch(causal_model("llama"), print, kinds="crossed")
    with pytest.raises(SiteError, match="of kind 'cross'; the sites that the targets name are of kind 'self'"):
        watch(causal_model("llama"), print, kinds="cross")
    with pytest.raises(SiteError, match="No targets were given"):
        watch(causal_model("llama"), print, targets=[])


def test_targets_and_kinds_choose():
    model = unet()
    chosen = watch(model, print, targets=["mid_block.*", "attn2"], kinds=["cross"]).sites
    assert set(chosen) == {path for path in attention_sites(model) if path.endswith("attn2")}
    assert set(watch(model, print, targets="re:.*mid_block.*attn1").sites) == {
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    }


def test_models_without_attention_have_none():
    assert attention_sites(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))) == {}


def test_finding_sites_imports_no_library():
    import subprocess
    import sys

    code = (
        "import sys, torch, lorry.attention as a\n"
        "assert list(a.attention_sites(torch.nn.Transformer(8, 2, 1, 1, 8)))\n"
        "model = torch.nn.MultiheadAttention(8, 2)\n"
        "x = torch.ones(1, 2, 8)\n"
        "with a.watch(model, lambda call: None): model(x, x, x)\n"
        "print([n for n in ('transformers', 'diffusers', 'matplotlib', 'torch._dynamo') if n in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert torch.backends.mha.get_fastpath_enabled()
