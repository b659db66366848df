"""Sites whose weights something reads past the layer: the adapter would be lost in silence."""

import pytest
import torch
from core.tiny import llama, off_zero, tokens, unet

import lorry

INPUTS = (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 12))


def test_fused_projections_are_noticed_with_what_to_do():
    model = unet()
    off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="attention"), 1, 0.3)
    with torch.no_grad():
        wanted = model(*INPUTS).sample
        model.fuse_qkv_projections()
        with pytest.raises(lorry.AdapterError, match="unfuse_qkv_projections"):
            model(*INPUTS)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(model(*INPUTS).sample, wanted)
        model.fuse_qkv_projections()
        lorry.activate(model, None)
        model(*INPUTS)


def test_a_processor_that_reads_the_weights_itself_is_noticed():
    model = unet()
    lorry.attach(model, lorry.LoRA(rank=2), targets="attention")

    class Own:
        """Multiplies by the weight of ``to_q`` and does not call the layer."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **more):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q = torch.nn.functional.linear(hidden_states, attn.to_q.weight)
            q, k, v = (attn.head_to_batch_dim(t) for t in (q, attn.to_k(context), attn.to_v(context)))
            out = attn.batch_to_head_dim(attn.get_attention_scores(q, k) @ v)
            return attn.to_out[1](attn.to_out[0](out))

    model.set_attn_processor(Own())
    with torch.no_grad(), pytest.warns(UserWarning, match="did not run although.*to_q"):
        model(*INPUTS)
        model(*INPUTS)


def hybrids():
    """Models whose own code reads the weight of a layer, and never calls it."""
    import transformers

    mamba = {"vocab_size": 50, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    return {
        "mamba": (
            transformers.MambaForCausalLM,
            transformers.MambaConfig(time_step_rank=4, **mamba),
            ["conv1d", "dt_proj"],
        ),
        "jamba": (
            transformers.JambaForCausalLM,
            transformers.JambaConfig(num_key_value_heads=2, intermediate_size=48, **jamba, **sizes),
            ["conv1d", "dt_proj"],
        ),
        "deberta": (
            transformers.DebertaV2ForMaskedLM,
            transformers.DebertaV2Config(intermediate_size=48, **relative, **sizes),
            ["rel_embeddings"],
        ),
    }


@pytest.mark.parametrize("name", ["mamba", "jamba", "deberta"])
def test_weights_that_a_model_reads_itself_are_noticed_in_fusing_though_it_never_ran(name):
    make, config, targets = hybrids()[name]
    torch.manual_seed(0)
    model = make(config).train()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets=targets, activate=False), std=0.3)
    drawn = torch.get_rng_state()
    notes = adapter.fuse().notes
    assert any("past the layer" in note and targets[0] in note for note in notes)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("name", ["mamba", "jamba", "deberta"])
def test_weights_that_a_model_reads_itself_are_noticed_in_the_first_pass_and_in_merging(name):
    make, config, targets = hybrids()[name]
    torch.manual_seed(0)
    model = make(config).eval()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets=targets), std=0.3)
    with torch.no_grad(), pytest.warns(UserWarning, match="did not run although") as found:
        model(tokens(2, 5))
    named = [str(w.message) for w in found if "did not run although" in str(w.message)]
    assert len(named) == 1 and all(target in named[0] for target in targets)
    notes = adapter.fuse().notes
    assert any("past the layer" in note and targets[0] in note for note in notes)
    adapter.unfuse()
    plain = lorry.attach(model, lorry.LoRA(rank=2), targets=["dense" if name == "deberta" else "in_proj"], name="other")
    assert not any("past the layer" in note for note in plain.fuse().notes)


def test_parts_that_a_pass_does_not_need_are_no_reason_to_warn(recwarn):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config).eval()
    lorry.attach(t5, lorry.LoRA(rank=2), targets="all-linear")
    model, ids = llama(), tokens(2)
    lorry.attach(model, lorry.LoRA(rank=2))
    for _ in range(3):
        t5.generate(torch.randint(1, 40, (2, 4)), max_new_tokens=4, do_sample=False)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not [w for w in recwarn if "did not run although" in str(w.message)]
