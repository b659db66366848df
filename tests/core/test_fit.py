"""Layers that look like a known one and compute something else are no sites, and it is said."""

import pytest
import torch
from core.tiny import llama, off_zero, snapshot, tokens, unchanged
from torch import nn

import lorry


def llama4():
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [0, 1], "intermediate_size_mlp": 48}
    more = {"intermediate_size": 48, "num_attention_heads": 2, "attention_chunk_size": 16, "pad_token_id": 0}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **experts, **more))


def opt():
    import transformers

    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(max_position_embeddings=32, word_embed_proj_dim=32, **sizes)
    )


def bart():
    import transformers

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(max_position_embeddings=32, **sizes, **heads)
    )


CASES = {
    "llama4": (llama4, "all-linear", "feed_forward.router", "returns a tuple"),
    "opt": (opt, "embeddings", "embed_positions", "OPTLearnedPositionalEmbedding"),
    "bart": (bart, "embeddings", "embed_positions", "BartLearnedPositionalEmbedding"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_layers_that_compute_something_else_are_left_out_and_said(name):
    make, targets, path, reason = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    before, bare = snapshot(model), model(tokens(2, 5)).logits
    planned = lorry.plan(model, "lora", targets)
    assert any(path in p and reason in why for p, why in planned.left_out.items())
    assert not any(path in site.path for site in planned.sites)
    adapter = off_zero(lorry.attach(model, {"method": "lora", "rank": 2}, targets=targets))
    assert any(path in note and reason in note for note in adapter.receipt.notes)
    assert not any(path in p for p in adapter.entries) and adapter.entries
    moved = model(tokens(2, 5)).logits
    assert not torch.allclose(moved, bare, atol=1e-4)
    adapter.fuse()
    torch.testing.assert_close(model(tokens(2, 5)).logits, moved, atol=1e-4, rtol=1e-4)
    adapter.detach()
    assert unchanged(model, before)
    with pytest.raises(lorry.SiteError, match=rf"No adapter can sit on '.*{path}.*train_also"):
        lorry.attach(model, "lora", targets=[path])


class Doubled(nn.Linear):
    """Another function of the same weight."""

    def forward(self, x):
        return 2 * super().forward(x)


class Noted(nn.Linear):
    """The same function, with a forward of its own that counts its calls."""

    calls = 0

    def forward(self, x):
        Noted.calls += 1
        return super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("layer", [Doubled(8, 8), Standardised(3, 4, 3)])
def test_another_function_of_the_weight_is_no_site(layer):
    with pytest.raises(lorry.SiteError, match="computes something else than a"):
        lorry.attach(nn.Sequential(layer), "lora", targets="all")


def test_a_forward_of_its_own_that_computes_the_same_is_a_site():
    model = nn.Sequential(Noted(8, 8)).train()
    adapter = off_zero(lorry.attach(model, {"method": "lora", "rank": 2}))
    assert list(adapter.entries) == ["0"] and model[0].training and Noted.calls
    assert not adapter.receipt.notes
    assert not lorry.plan(llama(), "lora").left_out.keys() & {"model.layers.0.mlp.up_proj"}
