"""Mixtures in feed-forward blocks that encoders spread over two modules, with a norm and a residual around them."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import lorry
from lorry.methods.mixlora import MixLoRA
from lorry.methods.parts.feedforward import feed_forward

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **SIZES, **options)
    return transformers.BertModel(config).double().eval()


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES)
    return transformers.ViTModel(config).double().eval()


def blocks(model):
    return {p: m for p, m in model.named_modules() if (f := feed_forward(m, p)) is not None and f.opening is not None}


def attached(model, targets="all-linear", name="mix", **options):
    adapter = lorry.attach(
        model, MixLoRA(**{"experts": 4, "rank": 2, **options}), targets=targets, name=name, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return adapter


def tokens(rows=3):
    return torch.randint(0, 30, (rows, 7), generator=torch.Generator().manual_seed(2))


def mixture(parts, method, tensors, x):
    """Each expert run by itself on all tokens, weighted by its gate: the definition."""
    p = (x @ tensors["router"].T).softmax(-1)
    best = p.topk(method.top_k, dim=-1)
    gates = torch.zeros_like(p).scatter(-1, best.indices, best.values)
    gates = gates / gates.sum(-1, keepdim=True)
    total = 0
    for e in range(method.experts):

        def project(name, value, e=e):
            site = parts.sites[name]
            update = method.scaling * tensors[f"{name}.B"][e] @ tensors[f"{name}.A"][e]
            weight = site.matrix() + update
            if method.dora:
                weight = weight * (tensors[f"{name}.magnitude"][e] / weight.norm(dim=1))[:, None]
            return F.linear(value, weight, site.kind.bias(site))

        hidden = parts.activation(project("intermediate", x))
        total = total + gates[..., e, None] * project("output", hidden)
    return total


def by_hand(layer, parts, method, tensors):
    return lambda attended: layer.output.LayerNorm(mixture(parts, method, tensors, attended) + attended)


@pytest.mark.parametrize("dora", [False, True])
def test_the_output_is_that_of_the_layer_with_a_mixture_in_the_place_of_its_block(dora):
    model, ids = bert(), tokens()
    adapter = attached(model, dora=dora)
    found = model(ids).last_hidden_state
    paths = [p for p, entry in adapter.entries.items() if entry.site.kind.name == "block"]
    assert paths == ["encoder.layer.0", "encoder.layer.1"] == list(blocks(model))
    # the rest of the layers by hand: what attention gives, then mixture, residual and norm
    for path in paths:
        layer, entry = model.get_submodule(path), adapter.entries[path]
        parts, tensors = feed_forward(layer, path), {k: v.detach() for k, v in entry.tensors().items()}

        layer.feed_forward_chunk = by_hand(layer, parts, entry.method, tensors)
        own = type(layer)._lorry_original.forward
        layer.__dict__["forward"] = own.__get__(layer)
    torch.testing.assert_close(model(ids).last_hidden_state, found)


def test_a_fresh_mixture_changes_nothing_and_detaching_restores_the_modules():
    model, ids = bert(), tokens()
    before = model(ids).last_hidden_state
    adapter = lorry.attach(model, MixLoRA(experts=4), targets="all-linear", dtype=torch.float64)
    torch.testing.assert_close(model(ids).last_hidden_state, before)
    adapter.detach()
    assert torch.equal(model(ids).last_hidden_state, before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_rows_beside_other_adapters_saving_and_loading(tmp_path):
    model, ids = bert(), tokens(4)
    mix = attached(model)
    other = lorry.attach(model, lorry.LoRA(rank=2), name="lora", dtype=torch.float64)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    alone = []
    for name in ("mix", "lora", None):
        lorry.activate(model, name)
        alone.append(model(ids).last_hidden_state)
    with lorry.rows(model, ["lora", "mix", None, "mix"]):
        together = model(ids).last_hidden_state
    expected = torch.stack([alone[1][0], alone[0][1], alone[2][2], alone[0][3]])
    torch.testing.assert_close(together, expected)
    mix.save(tmp_path / "mix")
    fresh = bert()
    lorry.load(fresh, tmp_path / "mix", name="again")
    torch.testing.assert_close(fresh(ids).last_hidden_state, alone[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_chunking_change_neither_output_nor_gradients(reentrant):
    results = []
    for checkpointed, chunks in ((False, 0), (True, 0), (False, 1)):
        model = bert(chunk_size_feed_forward=chunks, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        adapter = attached(model, load_balance=0.0)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(tokens()).last_hidden_state
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in adapter.parameters())])
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_vision_transformer_whose_block_reads_a_normalised_input():
    model = vit()
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = model(pixels).last_hidden_state
    lorry.attach(model, MixLoRA(experts=4, rank=2), targets="all-linear", dtype=torch.float64)
    torch.testing.assert_close(model(pixels).last_hidden_state, before)
    adapter = attached(model, name="second")
    lorry.activate(model, "second")
    assert not torch.allclose(model(pixels).last_hidden_state, before)
    assert any(entry.site.kind.name == "block" for entry in adapter.entries.values())
