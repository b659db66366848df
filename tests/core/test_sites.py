"""Every kind of site against the same module run with the dense weight W + ΔW."""

import copy

import pytest
import torch
from core.tiny import clear, gradients, llama, off_zero, same_bytes, snapshot, tokens, unchanged
from torch import nn
from torch.func import functional_call

import lorry
from lorry.core.sites.kinds import catalogue


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class One(nn.Module):
    """A model with one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def gpt2_linear():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 6)


def gemma_embedding():
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    return GemmaTextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5)


IDS = torch.tensor([[1, 0, 5, 5], [2, 3, 0, 10], [0, 0, 1, 4]])
LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), lambda: randn(3, 4, 6)),
    "linear without bias, two dimensions": (lambda: nn.Linear(6, 10, bias=False), lambda: randn(3, 6)),
    "transposed linear": (gpt2_linear, lambda: randn(3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: randn(3, 4, 9)),
    "conv1d stride dilation": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, bias=False),
        lambda: randn(3, 4, 11),
    ),
    "conv2d stride padding": (
        lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        lambda: randn(3, 3, 7, 6),
    ),
    "conv2d reflect": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        lambda: randn(3, 3, 7, 6),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(3, 6, 3, padding=2, padding_mode="circular"),
        lambda: randn(3, 3, 7, 6),
    ),
    "conv2d same": (lambda: nn.Conv2d(3, 6, 3, padding="same"), lambda: randn(3, 3, 7, 6)),
    "conv2d pointwise": (lambda: nn.Conv2d(3, 6, 1), lambda: randn(3, 3, 5, 4)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: randn(3, 4, 6, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: randn(3, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), lambda: randn(3, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: IDS),
    "embedding with padding": (lambda: nn.Embedding(11, 6, padding_idx=0), lambda: IDS),
    "scaled embedding": (gemma_embedding, lambda: IDS),
}
METHODS = [lorry.LoRA(rank=2, alpha=3), lorry.DoRA(rank=2, alpha=3)]


def built(name):
    torch.manual_seed(0)
    make, draw = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return One(layer), draw()


def dense(model, adapter, site, *args, **kwargs):
    """The model run with the weight W + ΔW in the place of W; differentiable in the adapter's tensors."""
    delta = site.kind.to_weight(site, adapter.entries[site.path].delta())
    lorry.activate(model, None)
    holder = next(n for n, m in model.named_modules() if m is site.holder)
    out = functional_call(model, {f"{holder}.{site.parameter}": site.stored + delta}, args, kwargs)
    lorry.activate(model, adapter.name)
    return out


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.info.slug)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_are_those_of_the_dense_weight(name, method):
    model, x = built(name)
    x = x.requires_grad_() if x.is_floating_point() else x
    bare = model(x)
    adapter = lorry.attach(model, method, targets="layer")
    torch.testing.assert_close(model(x), bare, atol=1e-6, rtol=1e-5)
    site = off_zero(adapter, std=0.3).sites[0]
    found, wanted = model(x), dense(model, adapter, site, x)
    assert found.shape == bare.shape and (found - bare).norm() > 0.05 * bare.norm()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    probe = randn(*found.shape, seed=9)
    if getattr(model.layer, "padding_idx", None) is not None:
        probe[x == 0] = 0  # gradients from padding tokens are the subject of a test of their own
    inputs = adapter.parameters() + ([x] if x.is_floating_point() else [])
    # DoRA holds the norm constant in the gradient, in the dense form too
    for a, b in zip(torch.autograd.grad(found, inputs, probe), torch.autograd.grad(wanted, inputs, probe), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.info.slug)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_merge_and_detach(name, method):
    model, x = built(name)
    before = snapshot(model)
    one = off_zero(lorry.attach(model, method, targets="layer", name="one"), 1, 0.3)
    off_zero(lorry.attach(model, lorry.LoRA(rank=1), targets="layer", name="two"), 2, 0.3)
    batch = [{"one": 0.5, "two": 1.0}, None, "one"]
    with lorry.rows(model, batch):
        mixed = model(x)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), atol=1e-5, rtol=1e-5)
    lorry.activate(model, "one")
    adapted = model(x)
    receipt = one.fuse()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)
    assert receipt.max_error == 0.0, "float32 is written without rounding"
    one.unfuse()
    assert unchanged(model, before)
    for adapter in list(lorry.adapters(model).values()):
        adapter.detach()
    assert unchanged(model, before) and not any("lorry" in k for m in model.modules() for k in m.__dict__)


def test_padding_tokens_of_an_embedding_get_no_gradient():
    model, x = built("embedding with padding")
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="layer"))
    model(x).sum().backward()
    gradient = gradients(adapter)["layer.A"]
    assert gradient[:, 5].abs().sum() > 0 and gradient[:, 0].abs().sum() == 0, "as nn.Embedding treats its own row"


ATTENTION = {
    "one matrix, batch first": {"batch_first": True},
    "one matrix, length first": {"batch_first": False},
    "separate q, k, v": {"batch_first": True, "kdim": 6, "vdim": 4},
    "separate q, k, v, length first": {"batch_first": False, "kdim": 6, "vdim": 4},
    "without bias": {"batch_first": True, "bias": False},
    "with bias_kv": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
}


def attention(options, rows=3, length=5, keys=5):
    torch.manual_seed(0)
    model = One(nn.MultiheadAttention(8, 2, **options))
    q, k, v = (
        randn(rows, length, 8, seed=1),
        randn(rows, keys, options.get("kdim", 8), seed=2),
        randn(rows, keys, options.get("vdim", 8), seed=3),
    )
    if not options["batch_first"]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.zeros(rows, keys, dtype=torch.bool)
    padding[0, -2:] = True
    return model.eval(), (q, k, v), padding


def row_of(out, row, options):
    return out[row] if options["batch_first"] else out[:, row]


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("mask", ["none", "matrix", "for each head"])
def test_multihead_attention(options, rows, mask):
    """Rows equal to the length (5) must not be taken for the length by masks ``(length, length)``."""
    model, (q, k, v), padding = attention(options, rows=rows)
    attn_mask = None
    if mask == "matrix":
        attn_mask = torch.ones(5, 5).tril() == 0
    elif mask == "for each head":
        attn_mask = torch.zeros(rows, 2, 5, 5, dtype=torch.bool)
        attn_mask[:, 0, :, 1] = True
        attn_mask[0, 1, :, 2] = True
        attn_mask = attn_mask.reshape(rows * 2, 5, 5)
    run = {"key_padding_mask": padding, "attn_mask": attn_mask}
    before = snapshot(model)
    one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="one", targets="kind:qkv"), 1, 0.3)
    off_zero(lorry.attach(model, lorry.DoRA(rank=2), name="two", targets="kind:qkv"), 2, 0.3)
    assert len(one.sites) == (2 if "kdim" not in options else 4)
    results = {}
    for composition in ("one", "two", None):
        lorry.activate(model, composition)
        results[composition] = model(q, k, v, **run)
    assert not torch.allclose(results["one"][0], results[None][0], atol=1e-3)
    batch = ["one", None, "two", "one", "two"][:rows]
    with lorry.rows(model, batch):
        out, weights = model(q, k, v, **run)
    for row, composition in enumerate(batch):
        wanted, wanted_weights = results[composition]
        torch.testing.assert_close(row_of(out, row, options), row_of(wanted, row, options), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights[row], wanted_weights[row], atol=1e-5, rtol=1e-5)
    lorry.activate(model, "one")
    out, _ = model(query=q, key=k, value=v, **run)
    out.square().sum().backward()
    assert all(g.abs().sum() > 0 for g in gradients(one).values())
    one.fuse()
    torch.testing.assert_close(model(q, k, v, **run)[0], results["one"][0], atol=1e-5, rtol=1e-4)
    one.unfuse()
    assert unchanged(model, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_encoder_layers_do_not_go_around_the_adapter(training, grad):
    """PyTorch's fused path for evaluation without gradients reads the weights itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = randn(3, 5, 8)
    with torch.set_grad_enabled(grad):
        bare = model(x)
        adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)), std=0.3)
        assert len(adapter.sites) == 2 * 4
        with_adapter = model(x)
        lorry.activate(model, None)
        torch.testing.assert_close(model(x), bare, atol=1e-5, rtol=1e-5)
        lorry.activate(model, "default")
    merged = copy.deepcopy(model)
    lorry.adapters(merged)["default"].fuse()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(with_adapter, merged(x), atol=1e-5, rtol=1e-4)
    assert (with_adapter - bare).abs().max() > 1e-2
    adapter.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def moe(kind, implementation="eager"):
    import transformers as tf

    shared = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**shared))
    elif kind == "qwen3":
        more = {k: v for k, v in shared.items() if k != "num_local_experts"}
        model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**more, num_experts=4, moe_intermediate_size=12))
    else:
        model = tf.GptOssForCausalLM(tf.GptOssConfig(**shared))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if implementation != "eager":
        model.set_experts_implementation(implementation)
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_expert_banks(kind, implementation):
    model, ids = moe(kind, implementation), tokens(3, 4)
    before = snapshot(model)
    banks = {p: s for p, s in catalogue(model).items() if s.kind.name == "experts"}
    inner = 12 if kind == "qwen3" else 24
    shapes = {s.name: s.shape for s in banks.values()}
    assert shapes == {"gate_up_proj": (4, 2 * inner, 16), "down_proj": (4, 16, inner)}
    one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="experts", name="one"), 1, 0.2)
    off_zero(lorry.attach(model, lorry.DoRA(rank=2), targets=["experts", "q_proj"], name="two"), 2, 0.2)
    assert one.entries[next(iter(banks))].home.specs["A"].shape[0] == 4
    results = {}
    with torch.no_grad():
        for composition in ("one", "two", None):
            lorry.activate(model, composition)
            results[composition] = model(ids).logits
        assert (results["one"] - results[None]).abs().max() > 1e-3
        batch = ["two", None, "one"]
        with lorry.rows(model, batch):
            mixed = model(ids).logits
        for row, composition in enumerate(batch):
            torch.testing.assert_close(mixed[row], results[composition][row], atol=2e-4, rtol=1e-3)
    lorry.activate(model, "one")
    model(ids).logits.square().mean().backward()
    assert all(g.abs().sum() > 0 for g in gradients(one).values())
    with torch.no_grad():
        one.fuse()
        torch.testing.assert_close(model(ids).logits, results["one"], atol=2e-4, rtol=1e-3)
        one.unfuse()
    assert unchanged(model, before)


def test_expert_gradients_equal_those_of_the_dense_bank():
    model, ids = moe("gpt-oss"), tokens(2, 4)
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="gate_up_proj"), std=0.2)
    site = adapter.sites[0]
    grads = []
    for logits in (model(ids).logits, dense(model, adapter, site, ids).logits):
        clear(model)
        logits.square().mean().backward()
        grads.append(gradients(adapter))
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


def test_experts_refuse_dropout_where_the_input_cannot_be_dropped():
    model = moe("mixtral").train()
    lorry.attach(model, lorry.LoRA(rank=2, dropout=0.1), targets="experts")
    with pytest.raises(lorry.AdapterError, match="dropout=0"):
        model(tokens())
    model.eval()(tokens())


def test_tied_embedding_and_head_each_take_an_adapter_of_their_own():
    model, ids = llama(1, tied=True), tokens()
    with torch.no_grad():
        bare, hidden = model(ids).logits, model.model(ids).last_hidden_state
    before = snapshot(model)
    adapter = lorry.attach(model, lorry.LoRA(rank=2), targets="lm_head", name="head")
    assert any("embed_tokens" in n for n in adapter.receipt.notes)
    off_zero(adapter, std=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).last_hidden_state, hidden)
        delta = adapter.entries["lm_head"].delta()
        torch.testing.assert_close(model(ids).logits, bare + hidden @ delta.T, atol=1e-5, rtol=1e-4)
        table = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="embed_tokens", name="table"), 3, 0.3)
        with_table = model(ids).logits
        receipt = table.fuse()
        assert any("tie_word_embeddings=False" in n for n in receipt.notes)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        torch.testing.assert_close(model(ids).logits, with_table, atol=1e-5, rtol=1e-4)
        table.unfuse()
        assert model.lm_head.weight is model.model.embed_tokens.weight and unchanged(model, before)


def test_gpt2_with_its_own_linear_class():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)).eval()
    ids, before = tokens(), snapshot(model)
    adapter = lorry.attach(model, lorry.DoRA(rank=2))
    assert {s.name for s in adapter.sites} == {"c_attn", "c_proj", "c_fc"} and len(adapter.sites) == 8
    assert {s.shape for s in adapter.sites if s.name == "c_attn"} == {(48, 16)}
    with torch.no_grad():
        wanted = off_zero(adapter) and model(ids).logits
        adapter.fuse()
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)
        adapter.unfuse()
    assert unchanged(model, before)
    off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets=["wte", "wpe"], name="tables"), std=0.3)
    with torch.no_grad():
        lorry.activate(model, "tables")
        wanted = model(ids).logits
        with lorry.rows(model, ["tables", None, "default"]):
            # the position table sees one row for the whole batch
            mixed = model(ids).logits
        torch.testing.assert_close(mixed[0], wanted[0], atol=1e-5, rtol=1e-4)


def test_weights_keep_dtype_and_identity_of_the_parameter_through_merge_and_unmerge():
    model = llama(1, dtype=torch.bfloat16)
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)))
    weights = {s.path: s.stored for s in adapter.sites}
    copies = {p: w.clone() for p, w in weights.items()}
    receipt = adapter.fuse()
    assert 0 < receipt.max_error < 1e-2 and receipt.relative_error > 0
    assert all(s.stored.dtype == torch.bfloat16 and not s.stored.requires_grad for s in adapter.sites)
    adapter.unfuse()
    assert all(s.stored is weights[s.path] and same_bytes(s.stored, copies[s.path]) for s in adapter.sites)
