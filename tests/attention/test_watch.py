"""Watching changes nothing and sees everything."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from attention.tiny import (
    LENGTH,
    MODELS,
    build,
    causal_model,
    gpt2,
    interface,
    noise,
    padded,
    reference,
    same,
    state,
    t5,
    tokens,
    unet,
)
from torch import nn

import lorry
from lorry.attention import AttentionError, attention_sites, watch


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same_and_is_afterwards_what_it_was(name):
    model, call = build(name)
    if name == "torch":
        # without watching, evaluation under no_grad takes torch's fused path, which is another kernel
        for parameter in model.parameters():
            parameter.requires_grad_()
    own, before = interface(), state(model)
    expected = call(model)
    seen = []
    with watch(model, lambda c: seen.append(c.output.shape)) as w:
        assert torch.equal(call(model), expected)
    assert sum(w.counts.values()) == len(seen) >= len(w.sites) > 0
    same(before, state(model))
    assert interface() is own
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_that_the_output_is_made_of(name):
    model, call = build(name)
    calls = []
    with torch.no_grad(), watch(model, calls.append):
        call(model)
    for one in calls:
        found = one.probabilities
        assert found.dtype == torch.float32
        assert found.shape == (*one.q.shape[:3], one.k.shape[2])
        assert torch.all(found >= 0) and torch.all(found.sum(-1) < 1 + 1e-5)
        torch.testing.assert_close(found @ one.expand(one.v), one.output, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *((family, "eager") for family in ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")),
        # transformers has gemma2 and gpt_oss for eager attention only, on a processor
        *((family, name) for family in ("llama", "mistral", "gemma3") for name in ("sdpa", "flex_attention")),
    ],
)
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_causal_models_against_float64(family, implementation, padding):
    model = causal_model(family, implementation)
    mask = None if padding is None else padded() if padding == "left" else padded().flip(1)
    calls = []
    # transformers compiles flex attention, which takes half a minute and is not what is tested
    plain = torch.compiler.set_stance("force_eager") if implementation == "flex_attention" else nullcontext()
    with torch.no_grad(), plain, watch(model, calls.append):
        model(tokens(), attention_mask=mask)
    position = torch.arange(LENGTH)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    for layer, one in enumerate(calls):
        attention = model.model.layers[layer].self_attn
        seen = (position[:, None] >= position).expand(2, -1, -1) & real[:, None, :]
        if family == "mistral" or (family != "llama" and model.config.layer_types[layer] == "sliding_attention"):
            seen = seen & (position[:, None] - position < 4)
        probabilities, output = reference(
            one.q,
            one.k,
            one.v,
            scaling=attention.scaling,
            seen=seen,
            cap=5.0 if family == "gemma2" else None,
            sinks=attention.sinks if family == "gpt_oss" else None,
        )
        rows = real[:, None, :, None]
        atol = 2e-6
        torch.testing.assert_close(one.probabilities.double() * rows, probabilities * rows, atol=atol, rtol=1e-5)
        torch.testing.assert_close(one.output.double() * rows, output * rows, atol=atol, rtol=1e-5)
        # the test means something only where attention is far from even
        assert float(probabilities[1, :, -1].max()) > 0.5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_relative_positions_are_in_the_probabilities(implementation):
    model = t5(implementation)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.embedding_dim == 4:
                module.weight.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    calls = []
    with torch.no_grad(), watch(model, calls.append, kinds="self"):
        model(tokens(), decoder_input_ids=tokens(seed=3))
    below = torch.ones(LENGTH, LENGTH).tril().bool()
    for stack, rows in ((model.encoder, calls[:2]), (model.decoder, calls[2:])):
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(LENGTH, LENGTH)
        for one in rows:
            seen = below if stack is model.decoder else None
            probabilities, output = reference(one.q, one.k, one.v, scaling=1.0, bias=bias, seen=seen)
            torch.testing.assert_close(one.probabilities.double(), probabilities, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one.output.double(), output, atol=1e-5, rtol=1e-4)


def test_cross_attention_maps_of_a_unet_by_token():
    """What CLoRA takes: at one resolution, per head and text token, under a batch of guidance."""
    model = unet()
    maps = []

    def read(call):
        if call.q.shape[2] == 16:
            maps.append(call.probabilities.unflatten(2, (4, 4)))

    with torch.no_grad(), watch(model, read, kinds="cross"):
        model(noise(4, 4, 8, 8), 3, noise(4, 5, 16))
    assert [tuple(m.shape) for m in maps] == [(4, m.shape[1], 4, 4, 5) for m in maps] and maps
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(maps[0].shape[:-1]))


@pytest.mark.parametrize("explicit", [False, True])
def test_an_image_prompt_is_a_second_part(explicit):
    from diffusers.models import attention_processor as processors

    kind = processors.IPAdapterAttnProcessor if explicit else processors.IPAdapterAttnProcessor2_0
    torch.manual_seed(0)
    attention = unet().mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(kind(hidden_size=32, cross_attention_dim=16, num_tokens=(3,)))
    inputs = {"hidden_states": noise(2, 16, 32), "encoder_hidden_states": (noise(2, 5, 16), [noise(2, 1, 3, 16)])}
    calls = []
    with torch.no_grad():
        expected = attention(**inputs)
        with watch(attention, calls.append):
            assert torch.equal(attention(**inputs), expected)
    assert [(one.part, one.k.shape[2]) for one in calls] == [(0, 5), (1, 3)]
    for one in calls:
        _, output = reference(one.q, one.k, one.v)
        torch.testing.assert_close(one.output.double(), output, atol=2e-6, rtol=1e-5)


def test_a_decoding_step_sees_all_keys_of_the_cache():
    model = causal_model("llama")
    calls = []
    with watch(model, calls.append, targets="model.layers.0.self_attn"):
        out = model.generate(tokens(), attention_mask=padded(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(
        out, model.generate(tokens(), attention_mask=padded(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )
    assert [(c.q.shape[2], c.k.shape[2]) for c in calls] == [(9, 9), (1, 10), (1, 11), (1, 12)]
    step = calls[-1]
    seen = torch.ones(2, 1, 12)
    seen[0, :, :3] = 0
    probabilities, output = reference(step.q, step.k, step.v, seen=seen)
    torch.testing.assert_close(step.probabilities.double(), probabilities, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(step.output.double(), output, atol=2e-6, rtol=1e-5)


def test_bfloat16_keeps_the_layers_dtype_and_widens_probabilities():
    model = causal_model("llama").to(torch.bfloat16)
    calls = []
    with torch.no_grad(), watch(model, calls.append):
        model(tokens())
    assert {c.q.dtype for c in calls} == {c.output.dtype for c in calls} == {torch.bfloat16}
    expected, _ = reference(calls[0].q, calls[0].k, calls[0].v, seen=torch.ones(LENGTH, LENGTH).tril())
    assert calls[0].probabilities.dtype == torch.float32
    torch.testing.assert_close(calls[0].probabilities.double(), expected, atol=1e-5, rtol=1e-4)


def test_mixed_precision_around_the_model_does_not_round_the_probabilities():
    model = causal_model("llama")
    found = []

    def read(one):
        found.append((one, one.probabilities))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watch(model, read):
        model(tokens())
    for one, probabilities in found:
        expected, _ = reference(one.q, one.k, one.v, seen=torch.ones(LENGTH, LENGTH).tril())
        torch.testing.assert_close(probabilities.double(), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_on_the_projections_is_in_q_and_v():
    model = causal_model("llama")
    adapter = lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj", "v_proj"], name="a")
    with torch.no_grad():
        for _, tensor, _ in adapter.named_tensors():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(4))
    calls = []
    with watch(model, calls.append, targets="model.layers.0.self_attn"):
        with torch.no_grad():
            model(tokens())
            lorry.activate(model, None)
            model(tokens())
    with_adapter, without = calls
    layer = model.model.layers[0]
    lorry.activate(model, "a")
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(tokens()))
        value = layer.self_attn.v_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
    assert torch.equal(with_adapter.v, value)
    assert not torch.allclose(with_adapter.v, without.v) and not torch.allclose(with_adapter.q, without.q)
    assert torch.equal(with_adapter.k, without.k)


def test_weights_that_the_module_returns_are_not_disturbed():
    model = causal_model("llama", "eager")
    expected = model(tokens(), output_attentions=True).attentions
    calls = []
    with watch(model, calls.append):
        found = model(tokens(), output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    torch.testing.assert_close(calls[0].probabilities, found[0])


def test_dropout_is_not_in_the_probabilities_and_draws_the_same():
    model = causal_model("llama", attention_dropout=0.5).train()
    torch.manual_seed(3)
    expected = model(tokens()).logits
    calls = []
    torch.manual_seed(3)
    with watch(model, calls.append):
        found = model(tokens()).logits
    assert torch.equal(found, expected)
    assert calls[0].training
    torch.testing.assert_close(calls[0].probabilities.sum(-1), torch.ones(2, 4, LENGTH))


def test_only_what_is_wanted_is_given():
    model = causal_model("llama")
    calls = []
    with torch.no_grad(), watch(model, calls.append, want="q"):
        model(tokens())
    assert calls[0].q.shape == (2, 4, LENGTH, 8)
    for name in ("k", "output", "probabilities", "gradient"):
        with pytest.raises(AttentionError, match=f"'{name}' was not asked for"):
            getattr(calls[0], name)
    with pytest.raises(AttentionError, match="A call has no 'probs'"):
        watch(model, print, want=["probs"])
    with pytest.raises(AttentionError, match="Nobody watches"):
        watch(model)


def test_probabilities_that_do_not_explain_the_output_are_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward
    model = causal_model("llama", "eager")

    def sharper(module, q, k, v, mask, **options):
        out, weights = own(module, 2 * q, k, v, mask, **options)
        return out, weights if keep_weights else None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharper)
    keep_weights, calls = True, []
    with torch.no_grad(), watch(model, calls.append):
        model(tokens())
        # the function's own weights explain the output, so they are given
        torch.testing.assert_close(calls[0].probabilities @ calls[0].expand(calls[0].v), calls[0].output)
        keep_weights = False
        model(tokens())
        with pytest.raises(AttentionError, match="does not give its output"):
            _ = calls[-1].probabilities
        assert calls[-1].output.shape == (2, 4, LENGTH, 8)


def test_a_registered_implementation_without_a_known_mask_gives_no_probabilities():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("house", sdpa_attention_forward)
    AttentionMaskInterface.register("house", sdpa_mask)
    calls = []
    try:
        model = causal_model("llama", "house")
        with torch.no_grad(), watch(model, calls.append):
            model(tokens())
    finally:
        del AttentionInterface._global_mapping["house"]
        del AttentionMaskInterface._global_mapping["house"]
    assert calls[0].output.shape == (2, 4, LENGTH, 8)
    with pytest.raises(AttentionError, match="'house' does not say what it masks"):
        _ = calls[0].probabilities


def test_a_site_that_computes_in_another_way_is_noticed():
    model = gpt2(attn_implementation="eager", reorder_and_upcast_attn=True, add_cross_attention=False)
    before = state(model)
    with pytest.raises(AttentionError, match=r"'transformer\.h\.0\.attn' ran, but its attention was not seen"):
        with watch(model, print):
            model(tokens())
    same(before, state(model))


def test_a_watch_that_saw_nothing_says_so():
    model = causal_model("llama")
    with pytest.warns(UserWarning, match="Nothing was seen at 2 attention sites"), watch(model, print):
        pass


def test_every_site_of_every_model_is_seen():
    for name in ("unet", "wan", "torch", "gpt2"):
        model, call = build(name)
        with torch.no_grad(), ExitStack() as stack:
            seen = stack.enter_context(watch(model, lambda c: None)).counts
            call(model)
        assert set(seen) == set(attention_sites(model)) and min(seen.values()) == 1


def test_the_example_of_the_package():
    import doctest

    import lorry.attention

    assert doctest.testmod(lorry.attention) == doctest.TestResults(failed=0, attempted=6)
