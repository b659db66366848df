"""Checkpointing of both kinds on models whose first input is no text: every adapter gets its gradient."""

import pytest
import torch
from core.tiny import clear, gradients, off_zero, snapshot, tokens, unchanged

import lorry

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def vit():
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES)
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return transformers.ViTForImageClassification(config), {"pixel_values": pictures}


def whisper():
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": sound,
        "decoder_input_ids": tokens(2, 5),
    }


def bert():
    import transformers

    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **SIZES)), {"input_ids": tokens(2, 5)}


def step(model, adapter, inputs):
    clear(model)
    torch.manual_seed(0)
    model(**inputs).logits.square().sum().backward()
    return gradients(adapter)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [bert, vit, whisper])
def test_every_adapter_gets_the_gradient_that_it_gets_without(make, reentrant):
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    before = snapshot(model)
    hooks = {path: len(m._forward_hooks) for path, m in model.named_modules()}
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2, dropout=0.2), targets="all-linear"))
    expected = step(model, adapter, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = step(model, adapter, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    # without checkpointing nothing is left of it
    model.gradient_checkpointing_disable()
    step(model, adapter, inputs)
    adapter.detach()
    ours = {path: len(m._forward_hooks) for path, m in model.named_modules()}
    if make is not bert:  # transformers leaves a hook of its own on the embeddings of text models
        assert ours == hooks
    assert unchanged(model, before)


def test_layers_that_change_their_input_in_place_still_may():
    """What begins a graph is no leaf: those refuse to be changed."""
    import transformers

    torch.manual_seed(0)
    model, inputs = vit()
    model.vit.embeddings.dropout = torch.nn.Dropout(0.1, inplace=True)
    assert isinstance(model, transformers.ViTForImageClassification)
    adapter = off_zero(lorry.attach(model.train(), "lora", targets="attention"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert any(g.any() for g in step(model, adapter, inputs).values())
