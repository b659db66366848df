"""The checks of MixLoRA's definition, on the feed-forward blocks of real models."""

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, tokens, unchanged
from torch import nn

import lorry
from lorry.methods.lora import LoRA
from lorry.methods.mixlora import MixLoRA
from lorry.methods.parts.feedforward import feed_forward
from lorry.methods.parts.routing import balance_loss, balance_sums

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def model_of(name):
    import transformers

    classes = {
        "llama": ("Llama", {}),
        "mistral": ("Mistral", {}),
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {}),
        "gemma": ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
        "gemma2": ("Gemma2", {"query_pre_attn_scalar": 8}),
        "phi3": ("Phi3", {}),
        "phi": ("Phi", {"hidden_act": "gelu"}),
        "gpt_neox": ("GPTNeoX", {"hidden_act": "relu"}),
        "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    }
    stem, more = classes[name]
    plain = {} if name == "gpt2" else SMALL
    if name in ("phi", "gpt_neox"):
        plain = {k: v for k, v in plain.items() if k not in ("head_dim", "num_key_value_heads")}
    config = getattr(transformers, f"{stem}Config")(**{**plain, "vocab_size": 50, **more})
    torch.manual_seed(0)
    return getattr(transformers, f"{stem}ForCausalLM" if name != "gpt2" else "GPT2LMHeadModel")(config).double().eval()


MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "phi", "gpt_neox", "gpt2"]


def blocks(model):
    return {p: m for p, m in model.named_modules() if feed_forward(m) is not None}


def attached(model, **options):
    chosen = {"experts": 4, "top_k": 2, "rank": 3, **options}
    return lorry.attach(model, MixLoRA(**chosen), targets="mlp", dtype=torch.float64)


def naive(module, method, tensors, x):
    """Each expert run by itself on all tokens, weighted by its gate: the definition."""
    parts = feed_forward(module)
    p = (x @ tensors["router"].T).softmax(-1)
    best = p.topk(method.top_k, dim=-1)
    gates = torch.zeros_like(p).scatter(-1, best.indices, best.values)
    gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)
    total = 0
    for e in range(method.experts):

        def project(name, value, e=e):
            site = parts.sites[name]
            weight, bias = site.matrix(), site.kind.bias(site)
            if f"{name}.A" in tensors:
                weight = weight + method.scaling * tensors[f"{name}.B"][e] @ tensors[f"{name}.A"][e]
            return F.linear(value, weight, bias)

        hidden = parts.between([project(n, x) for n in parts.inputs], parts.activation)
        total = total + gates[..., e : e + 1] * project(parts.output, hidden)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_shared_computation_equals_the_naive_form(name):
    """Outputs and all gradients, in float64, for the blocks of every family."""
    model = model_of(name)
    ids = tokens()
    before = model(ids).logits.detach()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = blocks(model)
    assert len(found) == 2
    adapter = attached(model)
    assert set(adapter.entries) == set(found) and all(e.site.kind.name == "block" for e in adapter.entries.values())
    torch.testing.assert_close(model(ids).logits.detach(), before, atol=1e-10, rtol=1e-10)
    off_zero(adapter, std=0.2)
    path, module = next(iter(found.items()))
    entry = adapter.entries[path]
    x = torch.randn(2, 5, module_width(entry), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(2, 5, module_width(entry), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (module(x) * weights).sum().backward()
    mine = {n: t.grad.clone() for n, t in entry.tensors().items()}
    own = {n: t.detach().clone().requires_grad_() for n, t in entry.tensors().items()}
    expected = naive(module, entry.method, own, x)
    torch.testing.assert_close(module(x), expected, atol=1e-10, rtol=1e-10)
    (expected * weights).sum().backward()
    for key, gradient in mine.items():
        torch.testing.assert_close(gradient, own[key].grad, atol=1e-10, rtol=1e-8)
    adapter.detach()
    assert unchanged(model, state)


def module_width(entry):
    return entry.tensors()["router"].shape[1]


def test_one_expert_is_a_plain_lora():
    model, twin = llama(), llama()
    adapter = off_zero(lorry.attach(model, MixLoRA(experts=1, top_k=1, rank=3, alpha=6), targets="mlp"), std=0.2)
    lora = lorry.attach(twin, LoRA(rank=3, alpha=6), targets="mlp")
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            for name in ("gate_proj", "up_proj", "down_proj"):
                for factor in "AB":
                    lora.entries[f"{path}.{name}"].tensors()[factor].copy_(entry.tensors()[f"{name}.{factor}"][0])
    torch.testing.assert_close(model(tokens()).logits, twin(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_identical_experts_do_not_depend_on_the_router():
    model = llama()
    adapter = off_zero(lorry.attach(model, MixLoRA(experts=4, rank=2), targets="mlp"), std=0.2)
    with torch.no_grad():
        for entry in adapter.entries.values():
            for name, tensor in entry.tensors().items():
                if name != "router":
                    tensor.copy_(tensor[:1].clone().expand_as(tensor))
        first = model(tokens()).logits
        for entry in adapter.entries.values():
            entry.tensors()["router"].normal_(0, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(tokens()).logits, first, atol=1e-5, rtol=1e-5)


def test_all_experts_active_is_the_dense_mixture():
    model = model_of("llama")
    adapter = off_zero(attached(model, top_k=4), std=0.2)
    path, entry = next(iter(adapter.entries.items()))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = model.get_submodule(path)
    torch.testing.assert_close(module(x), naive(module, entry.method, entry.tensors(), x), atol=1e-10, rtol=1e-10)


def test_permutations_of_experts_and_tokens():
    model = model_of("llama")
    adapter = off_zero(attached(model), std=0.3)
    path, entry = next(iter(adapter.entries.items()))
    module, tensors = model.get_submodule(path), entry.tensors()
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = module(x).detach()
    shuffled = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(module(x[:, shuffled]).detach(), before[:, shuffled], atol=1e-12, rtol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(module(x).detach(), before, atol=1e-12, rtol=1e-12)


def test_an_expert_without_tokens_has_zero_gradient():
    model = model_of("llama")
    adapter = off_zero(attached(model, top_k=1), std=0.2)
    path, entry = next(iter(adapter.entries.items()))
    with torch.no_grad():
        entry.tensors()["router"].zero_()
    model.get_submodule(path)(torch.randn(4, 32, dtype=torch.float64)).sum().backward()
    for name, tensor in entry.tensors().items():
        if name != "router":
            assert tensor.grad[0].any() and not tensor.grad[1:].any()


def test_targets_decide_where_experts_are():
    adapter = lorry.attach(llama(), MixLoRA(rank=2, attention_rank=3), targets=["q_proj", "up_proj", "down_proj"])
    kinds = {p: type(e.method).__name__ for p, e in adapter.entries.items()}
    assert kinds == {
        f"model.layers.{i}.{n}": m for i in (0, 1) for n, m in (("self_attn.q_proj", "LoRA"), ("mlp", "MixLoRA"))
    }
    block = adapter.entries["model.layers.0.mlp"]
    assert set(block.method.projections) == {"up_proj", "down_proj"}
    assert set(block.home.specs) == {"router", *(f"{n}.{f}" for n in ("up_proj", "down_proj") for f in "AB")}
    assert adapter.entries["model.layers.0.self_attn.q_proj"].method == LoRA(rank=3, alpha=6.0)
    whole = lorry.attach(llama(), "mixlora", targets="all-linear")
    by_module = lorry.attach(llama(), "mixlora", targets=["re:.*(q|k|v|o)_proj", "re:model.layers.[0-9]+.mlp"])
    assert whole.count() == by_module.count()


def test_parameter_count_is_the_formula_and_the_published_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    plan = lorry.plan(model, MixLoRA(experts=8, rank=16), targets="all-linear")
    d, f, r = 4096, 11008, 16
    assert plan.trained == 4 * r * 2 * d + 8 * 3 * r * (d + f) + 8 * d
    assert plan.trained * 32 / 1e6 == pytest.approx(203.4, abs=0.1)
    assert not [p for p in plan.left_out if ".mlp." in p]


def test_balance_loss_is_pooled_over_layers_and_ignores_padding():
    model = llama()
    adapter = lorry.attach(model, MixLoRA(experts=4, rank=2, load_balance=0.5), targets="mlp")
    model.train()
    seen = {}
    for path in adapter.entries:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, p=path: seen.update({p: args[0]}))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 3:] = False
    with lorry.context(model, padding_mask=mask):
        model(tokens())
        loss = lorry.auxiliary_loss(model)
    sums = []
    for path, entry in adapter.entries.items():
        p = F.linear(seen[path], entry.tensors()["router"]).softmax(-1)
        sums.append(balance_sums(p[mask], p[mask].topk(2).indices, None))
    torch.testing.assert_close(loss, 0.5 * balance_loss(sum(sums)))
    loss.backward()
    assert all(e.tensors()["router"].grad.any() for e in adapter.entries.values())


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_only_the_balance_loss_spreads_a_collapsed_router(weight):
    torch.manual_seed(0)
    model = model_of("llama").float()
    adapter = lorry.attach(model, MixLoRA(experts=4, rank=2, load_balance=weight), targets="mlp", layers=[0])
    entry = next(iter(adapter.entries.values()))
    module = model.model.layers[0].mlp
    x = torch.randn(64, 32) + 1.0
    with torch.no_grad():
        entry.tensors()["router"][:2] += 0.1
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.003)
    loads = []
    module.train()
    for _ in range(150):
        with lorry.context(model, recording=True) as context:
            loss = module(x).square().mean() * 1e-4
            extra = lorry.auxiliary_loss(model)
            (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = context.records["default", entry.site.path, "load"] / 2
        loads.append(float(torch.special.entr(load).sum()))
    assert (loads[-1] > loads[0] + 0.3) is bool(weight)


@pytest.mark.parametrize(
    ("slug", "options"), [("mixlora-dynamic", {"top_p": 0.5}), ("mixlora-switch", {"jitter": 0.0})]
)
def test_published_variants_change_a_fresh_model(slug, options):
    """Their weights are probabilities that do not sum to 1."""
    model = llama()
    before = model(tokens()).logits
    lorry.attach(model, {"method": slug, "rank": 2, **options}, targets="mlp")
    assert not torch.allclose(model(tokens()).logits, before, atol=1e-3)


def test_tokens_beyond_the_capacity_get_the_frozen_block():
    model = model_of("llama")
    adapter = off_zero(attached(model, routing="switch", capacity=2, experts=2), std=0.3)
    path, entry = next(iter(adapter.entries.items()))
    module, tensors = model.get_submodule(path), entry.tensors()
    with torch.no_grad():
        tensors["router"].zero_()  # every token takes the first expert, with weight 1/2
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output = module(x).detach()
    lorry.activate(model, None)
    torch.testing.assert_close(output[:, 2:], module(x)[:, 2:], atol=1e-12, rtol=1e-12)
    lorry.activate(model, "default")
    alone = module(x[:, :2]).detach()
    torch.testing.assert_close(output[:, :2], alone, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(alone, x[:, :2])


@pytest.mark.parametrize("name", ["phi", "gpt2", "gpt_neox"])
def test_beyond_the_capacity_biases_count_once(name):
    """Switch routing by its definition in float64, with biases that are not zero, as real checkpoints have them."""
    model = model_of(name)
    with torch.no_grad():
        for number, (key, parameter) in enumerate(model.named_parameters()):
            if key.endswith("bias"):
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(number))
    adapter = off_zero(attached(model, routing="switch", capacity=2, experts=3, top_k=1, router_std=1.0), std=0.2)
    path, entry = next(iter(adapter.entries.items()))
    module, tensors = model.get_submodule(path), entry.tensors()
    x = torch.randn(2, 12, module_width(entry), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        output = module(x)
        lorry.activate(model, None)
        frozen = module(x)
        p = (x @ tensors["router"].T).softmax(-1)
        best = p.max(-1)
        chosen = F.one_hot(best.indices, 3)
        beyond = ((chosen.cumsum(-2) > 2) & chosen.bool()).any(-1)
        expected = best.values[..., None] * naive(module, entry.method, tensors, x)
    assert beyond.sum() >= 2 * (12 - 3 * 2) and not beyond.all()
    torch.testing.assert_close(output[beyond], frozen[beyond], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(output[~beyond], expected[~beyond], atol=1e-10, rtol=1e-10)


def test_z_loss():
    model = model_of("llama")
    adapter = attached(model, load_balance=0.0, z_loss=0.5)
    model.train()
    path, entry = next(iter(adapter.entries.items()))
    x = torch.randn(4, 32, dtype=torch.float64)
    with lorry.context(model):
        model.get_submodule(path)(x)
        loss = lorry.auxiliary_loss(model)
    logits = F.linear(x, entry.tensors()["router"])
    torch.testing.assert_close(loss, (0.5 * logits.logsumexp(-1).square().mean()).float())


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_dora_experts(name):
    model = model_of(name)
    ids = tokens()
    before = model(ids).logits.detach()
    adapter = attached(model, dora=True)
    torch.testing.assert_close(model(ids).logits.detach(), before, atol=1e-6, rtol=1e-6)
    off_zero(adapter, std=0.2)
    path, entry = next(iter(adapter.entries.items()))
    module, tensors, parts = (
        model.get_submodule(path),
        entry.tensors(),
        feed_forward(model.get_submodule(path)),
    )
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = (x @ tensors["router"].T).softmax(-1)
    best = p.topk(2, dim=-1)
    expected = []
    for i in range(3):
        row = 0
        for weight, e in zip(best.values[i] / best.values[i].sum(), best.indices[i].tolist(), strict=True):

            def project(n, v, e=e):
                site = parts.sites[n]
                whole = site.matrix() + entry.method.scaling * tensors[f"{n}.B"][e] @ tensors[f"{n}.A"][e]
                magnitude = tensors[f"{n}.magnitude"][e] / whole.norm(dim=1)
                return F.linear(v, magnitude[:, None] * whole, site.kind.bias(site))

            hidden = parts.between([project(n, x[i]) for n in parts.inputs], parts.activation)
            row = row + weight * project(parts.output, hidden)
        expected.append(row)
    torch.testing.assert_close(module(x), torch.stack(expected), atol=1e-6, rtol=1e-6)
    module(x).sum().backward()
    assert tensors[f"{parts.output}.magnitude"].grad.any()


def test_two_mixtures_and_a_lora_train_in_one_batch_as_alone():
    """Three adapters on the same blocks, some inside them: each gets the gradients it gets alone."""
    ids, who = tokens(6), ["one", "lora", "two", "one", "two", "lora"]

    def three():
        model = llama()
        found = {}
        for seed, (name, method) in enumerate(
            (("one", MixLoRA(rank=2)), ("two", MixLoRA(rank=3, experts=3)), ("lora", LoRA(4)))
        ):
            found[name] = off_zero(lorry.attach(model, method, targets="all-linear", name=name), seed=seed)
        return model.train(), found

    model, together = three()
    with lorry.context(model), lorry.rows(model, who):
        logits = model(ids).logits
        extra = sum(v for v in (lorry.auxiliary_loss(model, n) for n in together) if v is not None)
        (logits.square().sum() + extra).backward()
    for name, adapter in together.items():
        rows = [i for i, w in enumerate(who) if w == name]
        model, alone = three()
        with lorry.context(model), lorry.rows(model, [name] * 2):
            loss = model(ids[rows]).logits.square().sum()
            extra = lorry.auxiliary_loss(model, name)
            (loss if extra is None else loss + extra).backward()
        for key, gradient in gradients(alone[name]).items():
            torch.testing.assert_close(gradients(adapter)[key], gradient, atol=1e-4, rtol=1e-4)


def test_activation_can_be_chosen_and_an_unknown_one_is_refused():
    model = model_of("llama")
    adapter = attached(model, activation="relu")
    path, _ = next(iter(adapter.entries.items()))
    x = torch.randn(3, 32, dtype=torch.float64)
    module = model.get_submodule(path)
    expected = module.down_proj(F.relu(module.gate_proj(x)) * module.up_proj(x))
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(lorry.OptionError, match="must be one of"):
        MixLoRA(activation="swish")


def test_what_is_no_feed_forward_block_is_refused():
    with pytest.raises(lorry.SiteError, match="no feed-forward block"):
        lorry.attach(llama(), "mixlora", targets="self_attn")
    with pytest.raises(lorry.SiteError, match="needs feed-forward blocks"):
        lorry.attach(llama(), "mixlora", targets="attention")
    with pytest.raises(lorry.SiteError, match="not \\['gate'\\]"):
        lorry.attach(llama(), MixLoRA(projections=("gate",)), targets="mlp")
    block = nn.Module()
    block.fc1, block.fc2, block.scale = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(2, 2)
    assert feed_forward(block) is None


def test_bad_options():
    with pytest.raises(lorry.OptionError, match="top_k=9 and experts=8"):
        MixLoRA(top_k=9)
