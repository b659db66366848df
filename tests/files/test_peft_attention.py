"""``nn.MultiheadAttention`` and the encoder layer around it, whose fast path reads weights past their layers."""

import copy

import peft
import pytest
import torch
from files.tiny_models import close, stir_peft
from torch import nn

import lorry

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.fixture
def slow():
    """PEFT's layers apply where torch calls them, which its fast path does not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


CONFIGS = {
    "linear1": peft.LoraConfig(r=2, target_modules=["linear1"]),
    "both": peft.LoraConfig(r=2, target_modules=["linear1", "linear2"]),
    "attention": peft.LoraConfig(r=2, target_modules=["self_attn"]),
    "all": peft.LoraConfig(r=2, target_modules=["self_attn", "linear1", "linear2"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["linear2"]),
    "lokr": peft.LoKrConfig(r=2, target_modules=["linear1"]),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", CONFIGS)
def test_an_encoder_layer_computes_what_peft_does_when_its_layers_are_called(case, batch_first, slow, tmp_path):
    base = encoder(batch_first)
    peer = stir_peft(peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS[case])))
    with torch.no_grad():
        wanted, bare = peer(X), base(X)
    peer.save_pretrained(str(tmp_path / "a"))
    assert not torch.allclose(wanted, bare, atol=1e-2)
    adapter = lorry.load(base, tmp_path / "a")
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        close(base(X), wanted)
        adapter.fuse()
        close(base(X), wanted)
        torch.backends.mha.set_fastpath_enabled(False)
        close(base(X), wanted)


def test_an_output_projection_by_itself_is_loaded_only_where_it_does_nothing(tmp_path):
    base = encoder()
    peer = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["out_proj", "linear1"])
    ).train()
    peer(X).square().mean().backward()
    assert all(p.grad is None or not p.grad.any() for n, p in peer.named_parameters() if "out_proj.lora_" in n)
    peer.eval().save_pretrained(str(tmp_path / "unmoved"))
    adapter = lorry.load(base, tmp_path / "unmoved")
    assert not any("twice" in note for note in adapter.receipt.notes)
    close(base(X), encoder()(X))
    stir_peft(peer).save_pretrained(str(tmp_path / "moved"))
    other = encoder()
    with pytest.raises(lorry.CheckpointError, match="out_proj' by itself.*Target the attention module"):
        lorry.load(other, tmp_path / "moved")
    assert not lorry.adapters(other)
