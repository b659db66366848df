"""Editing attention, and gradients through what is seen."""

import gc
import weakref

import pytest
import torch
from attention.tiny import (
    LENGTH,
    MODELS,
    Plain,
    build,
    causal_model,
    close,
    gpt2,
    gradients,
    noise,
    reference,
    tokens,
    unet,
    wan,
)
from torch import nn

import lorry
from lorry.attention import AttentionError, watch


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_output_is_what_the_layer_goes_on_with(name):
    """Halving every output by a reader, and by an editor that computes the product itself, is the same."""
    model, call = build(name)
    first = []

    def by_editor(one):
        return {"output": (one.probabilities @ one.expand(one.v)).to(one.v.dtype) / 2}

    with torch.no_grad():
        plain = call(model)
        with watch(model, lambda one: one.output / 2), watch(model, first.append):
            halved = call(model)
        with watch(model, editor=by_editor):
            again = call(model)
        with watch(model, lambda one: one.output.clone()):
            copied = call(model)
    assert not torch.allclose(halved, plain, atol=1e-4)
    torch.testing.assert_close(again, halved, atol=2e-5, rtol=1e-4)
    assert torch.equal(copied, plain) or name == "torch"
    # the second watch saw what the first had left
    one = first[0]
    torch.testing.assert_close(one.output, one.probabilities @ one.expand(one.v) / 2, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edit", ["q", "k", "v", "probabilities"])
def test_replaced_inputs_act_as_in_float64(name, edit):
    model, call = build(name)
    before, after = [], []

    def change(one):
        tensor = getattr(one, edit)
        if edit == "probabilities":
            # every query looks at its first key alone
            return {edit: torch.zeros_like(tensor).index_fill(-1, torch.tensor([0]), 1.0)}
        return {edit: 0.5 * tensor + 0.1}

    def note(one):
        before.append(one)
        return change(one)

    with torch.no_grad(), watch(model, after.append, editor=note):
        call(model)
    for old, new in zip(before, after, strict=True):
        if edit == "probabilities":
            expected = old.expand(old.v)[:, :, :1].expand(new.output.shape)
            torch.testing.assert_close(new.output, expected, atol=2e-6, rtol=1e-5)
            continue
        assert torch.equal(getattr(new, edit), 0.5 * getattr(old, edit) + 0.1)
        torch.testing.assert_close(new.output, new.probabilities @ new.expand(new.v), atol=5e-6, rtol=1e-5)
        if name == "llama" or name == "flux":
            seen = torch.ones(new.q.shape[2], new.q.shape[2])
            rows = slice(1, None)
            if name == "llama":
                seen = seen.tril()
            found, output = reference(new.q[rows], new.k[rows], new.v[rows], scaling=new.scaling, seen=seen)
            torch.testing.assert_close(new.probabilities[rows].double(), found, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(new.output[rows].double(), output, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, "last two"])
def test_an_edited_mask_takes_the_place_of_the_causal_one(implementation, mask):
    """Hydra's retrieval mode: the same weights, seeing both ways."""
    model = causal_model("llama", implementation)
    seen = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    if mask:
        seen[..., -2:] = False
    calls = []
    with torch.no_grad(), watch(model, calls.append, editor=lambda _: {"mask": seen if mask else None}):
        model(tokens())
    for one in calls:
        probabilities, output = reference(one.q, one.k, one.v, seen=seen[0])
        torch.testing.assert_close(one.probabilities.double(), probabilities, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(one.output.double(), output, atol=2e-6, rtol=1e-5)
        assert not one.causal


def test_a_split_value_cache():
    """LRAgent: values kept as base and rank-r part give what the adapted projection gives, also while decoding."""
    model = causal_model("llama")
    adapter = lorry.attach(model, lorry.LoRA(rank=3, alpha=6), targets=["v_proj"], name="agent")
    with torch.no_grad():
        for _, tensor, _ in adapter.named_tensors():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(4))
        expected = model.generate(tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        logits = model(tokens()).logits
    factors, low = {}, {}
    handles = []
    for path, site in ((f"model.layers.{n}.self_attn", layer.self_attn) for n, layer in enumerate(model.model.layers)):
        tensors = adapter.entries[f"{path}.v_proj"].tensors()
        factors[path] = (tensors["A"], tensors["B"])

        def keep(_, args, path=path):
            part = args[0] @ factors[path][0].T
            low[path] = part if part.shape[1] > 1 else torch.cat([low[path], part], dim=1)

        handles.append(site.v_proj.register_forward_pre_hook(keep))

    def split(call):
        """P V_base + s (P V_lr) B, with the base values of the cache and one rank-r cache for all heads."""
        maps, b = call.probabilities, factors[call.site.path][1]
        heads, kv_heads, width = maps.shape[1], call.v.shape[1], call.v.shape[-1]
        by_group = b.unflatten(0, (kv_heads, width)).repeat_interleave(heads // kv_heads, 0)
        reordered = maps @ low[call.site.path][:, None] @ by_group.transpose(-1, -2)
        return {"output": maps @ call.expand(call.v) + 2.0 * reordered}

    lorry.activate(model, None)
    with torch.no_grad(), watch(model, editor=split):
        found = model.generate(tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        torch.testing.assert_close(model(tokens()).logits, logits, atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)


def test_rows_that_attend_to_each_other():
    """UniVidX: keys and values of all modalities of a sample side by side; one modality alone changes nothing."""
    model = wan()
    call = MODELS["wan"][1]

    def together(count):
        def edit(one):
            joined = [t.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3) for t in (one.k, one.v)]
            return dict(zip("kv", (t.repeat_interleave(count, 0) for t in joined), strict=True))

        return edit

    x, time, text = noise(2, 4, 2, 8, 8), torch.tensor([3, 3]), noise(2, 5, 16)
    with torch.no_grad():
        alone = call(model)
        with watch(model, editor=together(1), kinds="self"):
            assert torch.equal(call(model), alone)
        calls = []
        with watch(model, calls.append, editor=together(2), kinds="self"):
            model(x, time, text)
    for one in calls:
        assert one.k.shape[2] == 2 * one.q.shape[2]
        assert torch.equal(one.k[0], one.k[1])
        _, output = reference(one.q, one.k, one.v)
        torch.testing.assert_close(one.output.double(), output, atol=5e-6, rtol=1e-5)


def test_keys_without_a_mask_for_them_are_refused():
    model = causal_model("llama", "eager")

    def double(one):
        return {"k": torch.cat([one.k, one.k], 2), "v": torch.cat([one.v, one.v], 2)}

    with watch(model, editor=double), pytest.raises(AttentionError, match="18 keys at .* but the mask is for 9"):
        model(tokens())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"query": torch.zeros(1)}, "cannot replace 'query'"),
        ({"v": 3}, "'v' must be a tensor, but found int"),
        (3, "returned int"),
        ({"k": torch.zeros(2, 2, 5, 8)}, "does not fit: expected k of shape"),
        ({"output": torch.zeros(2, 4, 9, 5)}, r"expected output of shape \(2, 4, 9, 8\), found \(2, 4, 9, 5\)"),
        ({"probabilities": torch.zeros(2, 4, 9)}, r"expected probabilities of shape \(2, 4, 9, 9\)"),
    ],
)
def test_edits_that_fit_nothing_are_refused(answer, message):
    model = causal_model("llama")
    with watch(model, editor=lambda _: answer), pytest.raises(AttentionError, match=message):
        model(tokens())
    with watch(model, lambda _: torch.zeros(1)), pytest.raises(AttentionError, match="an output of shape"):
        model(tokens())


def test_an_editor_does_not_know_the_output():
    model = causal_model("llama")
    with watch(model, editor=lambda one: one.output), pytest.raises(AttentionError, match="not known before"):
        model(tokens())


def test_edits_of_two_watches_follow_each_other():
    model, call = build("plain")
    seen = []
    with torch.no_grad():
        with watch(model, seen.append):
            call(model)
        with watch(model, editor=lambda one: {"v": one.v + 1}), watch(model, editor=lambda one: {"v": one.v * 2}):
            with watch(model, seen.append):
                call(model)
    assert torch.equal(seen[1].v, (seen[0].v + 1) * 2)


@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt2", "unet", "flux", "plain"])
def test_gradients_flow_through_everything_that_is_seen(name):
    """What a loss of all that is seen sends to q, k and v is what float64 says, and goes on from there."""
    model, call = build(name)
    calls = []
    with watch(model, calls.append):
        call(model)
    one = calls[-1]
    # the second row has no padding
    seen = (one.probabilities.detach()[1:] > 0).any(1)
    inputs = [tensor.detach()[1:].double().requires_grad_() for tensor in (one.q, one.k, one.v)]
    probabilities, output = reference(*inputs, scaling=one.scaling, seen=seen)

    def loss_of(q, k, v, maps, out):
        return q.sin().sum() + k.cos().sum() + v.square().sum() + maps.square().sum() + out.square().sum()

    expected = torch.autograd.grad(loss_of(*inputs, probabilities, output), inputs)
    loss = loss_of(*(tensor[1:] for tensor in (one.q, one.k, one.v, one.probabilities, one.output)))
    found = torch.autograd.grad(loss, (one.q, one.k, one.v), retain_graph=True)
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here[1:].double(), there, atol=1e-4, rtol=1e-4)
    loss.backward()
    reached = [n for n, p in model.named_parameters() if n.startswith(one.site.path) and p.grad is not None]
    assert any(model.get_parameter(name).grad.abs().max() > 0 for name in reached)


@pytest.mark.parametrize("library", ["diffusers", "torch"])
def test_gradients_of_explicit_products_are_those_of_the_fused_one(library):
    """Where the layer multiplies, normalises and multiplies by itself, weights get the same gradient."""

    def run(explicit):
        if library == "diffusers":
            model, call = build("unet explicit" if explicit else "unet")
        else:
            torch.manual_seed(0)
            model = nn.MultiheadAttention(16, 2)

            def call(module):
                return module(*(noise(5, 2, 16, seed=seed) for seed in (1, 2, 3)), need_weights=explicit)

        calls = []
        with watch(model, calls.append):
            call(model)
        one = calls[-1]
        loss = one.q.sin().sum() + one.k.cos().sum() + one.v.square().sum() + one.output.square().sum()
        (loss + one.probabilities.square().sum()).backward()
        return gradients(model)

    close(run(True), run(False), atol=2e-5)


def test_a_latent_is_moved_by_a_loss_of_attention_maps():
    """CLoRA: the gradient of a loss of cross-attention maps reaches the latent, and a step lowers the loss."""
    model = unet().requires_grad_(False)
    text = noise(2, 5, 16)

    def loss_of(latent):
        maps = []
        with watch(model, lambda one: maps.append(one.probabilities), kinds="cross"):
            model(torch.cat([latent, latent]), 3, text)
        large = torch.stack([m[1].mean(0)[:, 2] for m in maps if m.shape[2] == 64])
        return -large.var(-1).sum() * 1e3

    latent = noise(1, 4, 8, 8).requires_grad_()
    values = []
    for _ in range(3):
        loss = loss_of(latent)
        values.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, latent)
        latent = (latent - 0.1 * gradient / gradient.norm() * latent.norm()).detach().requires_grad_()
    assert values[2] < values[1] < values[0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "llama eager", "unet", "unet explicit", "torch", "plain"])
def test_the_gradient_of_the_output_is_the_one_that_autograd_gives(name):
    model, call = build(name)
    calls, outputs = [], []
    with watch(model, calls.append, want="gradient"):
        loss = call(model).square().sum()
    with pytest.raises(AttentionError, match="No gradient has reached"):
        _ = calls[0].gradient
    loss.backward()

    def keep(one):
        outputs.append(one.output.detach().requires_grad_())
        return outputs[-1]

    # cut open at every output from the last one backwards, each gradient is a leaf's
    last = calls[-1].gradient
    with watch(model, keep, targets=[calls[-1].site.path] if calls[-1].site.path else None):
        loss = call(model).square().sum()
    (expected,) = torch.autograd.grad(loss, outputs[-1])
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)
    assert all(one.gradient.shape[1] == (one.site.heads or one.gradient.shape[1]) for one in calls)
    with pytest.raises(AttentionError, match="keeps the gradient only|not asked for"):
        _ = calls[0].mask


def test_the_gradient_alone_keeps_no_activations_alive():
    model, call = build("plain")
    calls, held = [], []

    def read(one):
        calls.append(one)

    with watch(model, read, want="gradient"), watch(model, lambda one: held.append(weakref.ref(one.q))):
        call(model).sum().backward()
    gc.collect()
    assert calls[0].gradient is not None
    assert held[0]() is None


def test_returned_weights_follow_replaced_probabilities():
    model = causal_model("llama", "eager")
    even = torch.full((2, 4, LENGTH, LENGTH), 1 / LENGTH)
    with torch.no_grad(), watch(model, editor=lambda _: {"probabilities": even}):
        assert torch.equal(model(tokens(), output_attentions=True).attentions[0], even)


def test_prompts_are_edited_by_maps_of_another_pass():
    """One pass's cross-attention maps in another pass: only what comes after the projection of q and k is exchanged."""
    model = gpt2()
    first, second = noise(2, 3, 32), noise(2, 3, 32, seed=9)
    maps = {}

    def keep(one):
        maps[one.site.path] = one.probabilities

    with torch.no_grad():
        with watch(model, keep, kinds="cross"):
            model(tokens(), encoder_hidden_states=first)
        calls = []
        with watch(model, calls.append, editor=lambda one: {"probabilities": maps[one.site.path]}, kinds="cross"):
            model(tokens(), encoder_hidden_states=second)
    for one in calls:
        assert torch.equal(one.probabilities, maps[one.site.path])
        torch.testing.assert_close(one.output, maps[one.site.path] @ one.v)


def test_half_precision_edits_keep_the_layers_dtype():
    model = Plain().to(torch.bfloat16)
    with torch.no_grad(), watch(model, editor=lambda one: {"probabilities": one.probabilities}):
        assert model(noise(2, 6, 16).bfloat16()).dtype == torch.bfloat16
    assert isinstance(model.qkv, nn.Linear)
