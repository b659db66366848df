"""One adapter's life on a model: attaching, training flags, activating, copying, saving the base, merging, leaving."""

import copy
import gc
import weakref

import pytest
import torch
from core.tiny import clear, gradients, llama, off_zero, same_bytes, snapshot, tokens, unchanged
from torch import nn

import lorry
from lorry.core.life.state import state_of


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def two(model=None, **more):
    model = model if model is not None else llama()
    one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="one", **more), 1)
    other = off_zero(lorry.attach(model, lorry.LoRA(rank=3), name="two", targets="attention"), 2)
    return model, one, other


def test_attaching_changes_nothing_that_can_be_seen():
    model, fresh = llama(), llama()
    before, bare = snapshot(model), logits(model)
    types = {n: type(m) for n, m in model.named_modules()}
    text = str(fresh)
    adapter = lorry.attach(model, lorry.LoRA(rank=4))
    assert torch.equal(logits(model), bare) and unchanged(model, before)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fresh.named_modules()] and str(model) == text
    for name, module in model.named_modules():
        assert isinstance(module, types[name]) and type(module).__name__ == types[name].__name__
        assert type(module).__module__ == types[name].__module__
    assert adapter.receipt.sites == 14 and adapter.receipt.tensors_applied == adapter.receipt.tensors_total == 28
    assert adapter.receipt.fingerprint == "match" and "14 sites" in str(adapter.receipt)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lorry" not in n] == []
    adapter.detach()
    assert {n: type(m) for n, m in model.named_modules()} == types and unchanged(model, before)
    assert not any("lorry" in k for m in model.modules() for k in (*m.__dict__, *m._parameters))
    assert all(p.requires_grad for p in model.parameters()), "frozen parameters are thawed"


def test_detach_thaws_only_what_was_trainable_before():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    lorry.attach(model, lorry.LoRA(rank=2)).detach()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_the_same_seed_gives_the_same_adapter_whatever_else_is_adapted():
    a = lorry.attach(llama(), lorry.LoRA(rank=2), seed=3)
    b = lorry.attach(llama(), lorry.LoRA(rank=2), seed=3, targets="q_proj", name="b")
    c = lorry.attach(llama(), lorry.LoRA(rank=2), seed=4, targets="q_proj")
    path = "model.layers.1.self_attn.q_proj"
    mine, same, other = (x.entries[path].tensors()["A"] for x in (a, b, c))
    assert torch.equal(mine, same) and not torch.equal(mine, other)
    half = lorry.attach(llama(), lorry.LoRA(rank=2), seed=3, dtype=torch.bfloat16).entries[path].tensors()["A"]
    assert torch.equal(half, mine.to(torch.bfloat16))


def test_attaching_does_not_touch_the_global_generator():
    model = llama()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    lorry.attach(model, lorry.LoRA(rank=2))
    lorry.attach(model, lorry.PiSSA(rank=2, iterations=2), name="p")
    assert torch.equal(torch.get_rng_state(), before)


def test_activate_switches_and_weighs():
    model, one, other = two()
    results = {}
    for composition in (None, "one", "two"):
        lorry.activate(model, composition)
        results[composition] = logits(model)
    assert not torch.allclose(results["one"], results["two"], atol=1e-3)
    lorry.activate(model, {"one": 0.0})
    assert torch.equal(logits(model), results[None])
    lorry.activate(model, {"one": 1, "two": 0})
    assert torch.equal(logits(model), results["one"])
    for composition in ({}, None):
        lorry.activate(model, composition)
        assert torch.equal(logits(model), results[None])
    # one site alone: the sum of the weighted updates
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    lorry.activate(model, {"one": 0.5, "two": -2.0})
    path = "model.layers.0.self_attn.q_proj"
    update = 0.5 * one.entries[path].delta() - 2.0 * other.entries[path].delta()
    torch.testing.assert_close(layer(x), x @ (layer.weight + update).T, atol=1e-5, rtol=1e-4)


def test_composition_errors_change_nothing():
    model, *_ = two()
    lorry.activate(model, "one")
    before = logits(model)
    for wrong, said in (
        ("onee", "Did you mean 'one'"),
        ({"one": 1.0, "tow": 1.0}, "Did you mean 'two'"),
        ({"one": float("nan")}, "finite"),
        ({"one": float("inf")}, "finite"),
        ({"one": True}, "finite"),
        ({"one": "1"}, "finite"),
    ):
        with pytest.raises(lorry.AdapterError, match=said):
            lorry.activate(model, wrong)
        with pytest.raises(lorry.AdapterError, match=said), lorry.rows(model, ["one", wrong, None]):
            pass
        assert torch.equal(logits(model), before)
    with pytest.raises(lorry.AdapterError, match="carries no adapters"):
        lorry.activate(llama(), "one")
    lorry.activate(llama(), None)
    with pytest.raises(lorry.AdapterError, match="attached already"):
        lorry.attach(model, "lora", name="one")


def test_names_that_differ_by_punctuation_alone_do_not_share_parameters():
    model = llama(1)
    names = ["a.b", "a-b", "a_b", "a", "a.b_A"]
    made = {n: off_zero(lorry.attach(model, lorry.LoRA(rank=2), name=n), i) for i, n in enumerate(names)}
    values = {n: a.entries["model.layers.0.mlp.up_proj"].tensors()["B"] for n, a in made.items()}
    assert len({v.data_ptr() for v in values.values()}) == 5
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(set(trained)) == 5 * 14
    made["a.b"].detach()
    assert torch.equal(made["a-b"].entries["model.layers.0.mlp.up_proj"].tensors()["B"], values["a-b"])


def test_detaching_one_leaves_the_others_active():
    model, one, other = two()
    lorry.activate(model, "one")
    wanted = logits(model)
    lorry.activate(model, {"one": 1.0, "two": 1.0})
    other.detach()
    assert torch.equal(logits(model), wanted)
    with pytest.raises(lorry.AdapterError, match="not attached any more"):
        other.detach()
    assert list(lorry.adapters(model)) == ["one"]


def test_train_false_freezes_and_takes_parameters_out_of_the_module_tree():
    model, one, _ = two()
    lorry.activate(model, "one")
    wanted = logits(model)
    one.train(False)
    assert not one.trainable and one.parameters() == [] and torch.equal(logits(model), wanted)
    assert not any("lorry_one" in n for n, _ in model.named_parameters())
    one.train()
    assert len(one.parameters()) == 28 and torch.equal(logits(model), wanted)
    assert one.count() == sum(p.numel() for p in one.parameters())
    assert one.to(torch.bfloat16) is one and {p.dtype for p in one.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), wanted, atol=0.05, rtol=0.05)


def test_a_step_moves_the_adapter_alone():
    model, one, other = two()
    before, mine = snapshot(model), [p.detach().clone() for p in one.parameters()]
    theirs = [p.detach().clone() for p in other.parameters()]
    lorry.activate(model, "one")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens()).logits.square().mean().backward()
    optimizer.step()
    assert unchanged(model, before)
    assert all(not torch.equal(a, b) for a, b in zip(mine, one.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(theirs, other.parameters(), strict=True))


def test_deepcopy_is_independent_and_complete():
    model, one, _ = two()
    lorry.activate(model, {"one": 1.0, "two": 0.5})
    model(tokens()).logits.sum().backward()
    wanted = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted) and list(lorry.adapters(twin)) == ["one", "two"]
    mine = lorry.adapters(twin)["one"]
    assert mine is not one and mine.state is state_of(twin) and mine.state.root is twin
    off_zero(mine, 9, 1.0)
    assert torch.equal(logits(model), wanted) and not torch.allclose(logits(twin), wanted, atol=1e-3)
    lorry.activate(twin, None)
    assert torch.equal(logits(model), wanted)
    clear(twin)
    lorry.activate(twin, "one")
    twin(tokens()).logits.sum().backward()
    assert gradients(mine)
    for adapter in list(lorry.adapters(twin).values()):
        adapter.detach()
    assert torch.equal(logits(model), wanted) and unchanged(twin, snapshot(llama()))


def test_deepcopy_of_a_model_prepared_for_compiling():
    model, *_ = two()
    compiled = torch.compile(model, backend="eager")
    lorry.activate(compiled, {"one": 1.0, "two": 0.5})
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert state_of(twin).runtimes.number != state_of(model).runtimes.number


def test_save_pretrained_writes_a_clean_base_that_reloads(tmp_path):
    from transformers import LlamaForCausalLM

    model, *_ = two()
    bare = logits(llama())
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), bare) and not lorry.adapters(again)
    assert unchanged(again, snapshot(model))


def test_load_state_dict_of_a_plain_base_fits_strictly():
    model, *_ = two()
    lorry.activate(model, "one")
    wanted = logits(model)
    assert model.load_state_dict(llama().state_dict(), strict=True).missing_keys == []
    assert torch.equal(logits(model), wanted), "the adapter's tensors are left alone"


def test_train_also_trains_copies_of_whole_modules():
    model = llama(1)
    before, bare = snapshot(model), logits(model)
    adapter = lorry.attach(model, lorry.LoRA(rank=2), train_also=["norm", "lm_head"], name="one")
    assert torch.equal(logits(model), bare)
    assert {"model.norm.weight", "lm_head.weight"} <= {n for n, _ in adapter.named_parameters()}
    model(tokens()).logits.square().mean().backward()
    assert adapter.entries["lm_head"].tensors()["weight"].grad is not None and model.lm_head.weight.grad is None
    off_zero(adapter)
    moved = logits(model)
    assert not torch.allclose(moved, bare, atol=1e-3) and unchanged(model, before)
    with lorry.rows(model, [None, "one", "one"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed[1:], moved[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0], bare[0], atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert torch.equal(logits(model), bare) and unchanged(model, before)


def test_merge_order_and_refusals():
    model, one, other = two()
    before = snapshot(model)
    lorry.activate(model, {"one": 1.0, "two": 1.0})
    wanted = logits(model)
    one.fuse()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
    other.fuse()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
    for action, said in (
        (one.fuse, "fused already"),
        (one.unfuse, "unfuse it first"),
        (lambda: one.train(), "unfuse it before training"),
        (lambda: lorry.activate(model, {"one": 0.5}), "fused with weight 1"),
        (lambda: lorry.rows(model, ["one", None, None]).__enter__(), "fused into the base"),
    ):
        with pytest.raises(lorry.AdapterError, match=said):
            action()
    other.detach()
    one.unfuse()
    with pytest.raises(lorry.AdapterError, match="is not fused"):
        one.unfuse()
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_an_update_that_is_not_finite_is_refused_and_nothing_is_merged(value):
    model, one, _ = two()
    before = snapshot(model)
    with torch.no_grad():
        for parameter in list(one.parameters())[-2:]:  # 1e38 overflows in the product
            parameter.fill_(value)
    with pytest.raises(lorry.AdapterError, match="not finite"):
        one.fuse()
    assert unchanged(model, before) and not one.fused


def test_a_sum_beyond_the_type_of_the_base_is_refused_and_nothing_is_merged():
    model = llama(1, dtype=torch.float16)
    one = lorry.attach(model, lorry.LoRA(rank=2), name="one", dtype=torch.float32)
    before = snapshot(model)
    with torch.no_grad():
        for parameter in list(one.parameters())[-2:]:
            parameter.fill_(1e3)
    with pytest.raises(lorry.AdapterError, match=r"range of torch\.float16"):
        one.fuse()
    assert unchanged(model, before) and not one.fused


def test_norms_follow_the_base_weight_through_merges():
    """DoRA keeps the norms of the base; they belong to the weight that is there now."""
    model = llama(1)
    off_zero(lorry.attach(model, lorry.DoRA(rank=2), name="dora", targets="mlp"))
    wanted = logits(model)
    for seed in range(4):
        other = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="other", targets="mlp"), seed, 0.3)
        other.fuse()
        lorry.activate(model, "dora")
        on_merged = logits(model)
        twin = copy.deepcopy(model)  # a copy has no norms yet
        assert torch.equal(logits(twin), on_merged) and not torch.allclose(on_merged, wanted, atol=1e-3)
        other.detach()
        gc.collect()
        lorry.activate(model, "dora")
        assert torch.equal(logits(model), wanted)


def test_parts_and_parents_are_not_adapted_twice():
    model = llama()
    part = off_zero(lorry.attach(model.model.layers[0], lorry.LoRA(rank=2), name="part"))
    with pytest.raises(lorry.SiteError, match="Attach all adapters to the same object"):
        lorry.attach(model, lorry.LoRA(rank=2), name="whole")
    whole = lorry.attach(model, lorry.LoRA(rank=2), name="whole", exclude="model.layers.0.*")
    assert len(whole.sites) == 7
    model(tokens()).logits.square().mean().backward()
    assert gradients(part), "freezing the base of the whole leaves adapters of the part alone"
    whole.detach()
    part.detach()
    assert unchanged(model, snapshot(llama()))


def test_unloading_frees_the_memory():
    model, one, other = two()
    with lorry.rows(model, ["one", "two", {"one": 0.5}]):
        model(tokens()).logits.sum().backward()
    clear(model)
    lorry.activate(model, "one")
    logits(model)
    dead = [weakref.ref(t) for _, t, _ in one.named_tensors()] + [weakref.ref(one)]
    one.detach()
    del one
    gc.collect()
    assert all(r() is None for r in dead) and lorry.adapters(model)["two"] is other


def test_a_wrapped_forward_of_a_layer_still_gets_its_adapter():
    """As accelerate's hooks do it: the instance has a forward of its own, set before or after attaching."""
    for when in ("before", "after"):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                Count.calls += 1
                return args, kwargs

        model = llama(1)
        layer = model.model.layers[0].mlp.up_proj
        if when == "before":
            add_hook_to_module(layer, Count())
        adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="up_proj"), std=0.3)
        if when == "after":
            add_hook_to_module(layer, Count())
        x = torch.randn(3, 64)
        wanted = x @ (layer.weight + next(iter(adapter.entries.values())).delta()).T
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)
        adapter.detach()
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert Count.calls == 2
        remove_hook_from_module(layer)
        torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_forward_hooks_see_the_adapted_output():
    model, one, _ = two()
    seen = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    lorry.activate(model, "one")
    logits(model)
    (x, out), delta = seen[0], one.entries["model.layers.0.mlp.up_proj"].delta()
    torch.testing.assert_close(out, x @ (layer.weight + delta).T, atol=1e-5, rtol=1e-4)


def test_a_single_layer_is_a_model_too():
    layer = nn.Linear(4, 3)
    adapter = off_zero(lorry.attach(layer, lorry.LoRA(rank=2)), std=0.5)
    x = torch.randn(5, 4)
    wanted = x @ (layer.weight + next(adapter.deltas())[1]).T + layer.bias
    torch.testing.assert_close(layer(x), wanted)
    adapter.detach()
    assert type(layer) is nn.Linear


def test_fingerprints_tell_bases_apart():
    base = lorry.attach(llama(), lorry.LoRA(rank=2)).fingerprint
    half = lorry.attach(llama(dtype=torch.bfloat16), lorry.LoRA(rank=2)).fingerprint
    assert base.digest == half.digest and base.compare(half) == "match"
    other = lorry.attach(llama(seed=1), lorry.LoRA(rank=2)).fingerprint
    assert base.digest != other.digest
    with pytest.raises(lorry.FingerprintError, match=f"{base.digest}.*{other.digest}"):
        base.require(other, "Adapter 'x'")
    part = lorry.attach(llama(), lorry.LoRA(rank=2), targets="q_proj").fingerprint
    assert base.compare(part) == "match" and part.compare(base) == "match"
    nothing = lorry.attach(nn.Sequential(nn.Linear(3, 3)), lorry.LoRA(rank=2)).fingerprint
    assert base.compare(nothing) == "unknown"


def test_the_fingerprint_is_that_of_the_base_while_something_is_merged():
    model, one, _ = two()
    one.fuse()
    late = lorry.attach(model, lorry.LoRA(rank=2), name="late")
    assert late.fingerprint.digest == one.fingerprint.digest
    model = llama()
    q = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets="q_proj", name="q"))
    q.fuse()
    everywhere = lorry.attach(model, lorry.LoRA(rank=2), name="all")
    assert everywhere.fingerprint.digest == one.fingerprint.digest


def test_shared_tensors_are_parameters_of_the_model_but_not_of_its_state_dict(shared_method):
    model = llama(1)
    before, bare = snapshot(model), logits(model)
    adapter = off_zero(lorry.attach(model, shared_method(), targets="mlp"), std=0.5)
    assert adapter.count() == 3 == sum(p.numel() for p in adapter.parameters())
    assert not torch.allclose(logits(model), bare, atol=1e-3) and unchanged(model, before)
    assert model.load_state_dict(llama(1).state_dict(), strict=True).missing_keys == []
    assert any("lorry" in n for n, _ in model.named_parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    model(tokens()).logits.square().mean().backward()
    assert gradients(adapter)["shared.core"].abs().sum() > 0
    adapter.detach()
    assert type(model) is type(llama(1)) and torch.equal(logits(model), bare)


@pytest.fixture
def shared_method():
    """A method whose sites share one trained diagonal, with fixed random factors; registered for one test."""
    import dataclasses

    from lorry.core.method import registry
    from lorry.core.method.families import Bottleneck
    from lorry.core.method.registry import register
    from lorry.core.method.spec import Layout, TensorSpec, kaiming

    @register("test-shared", paper="none")
    @dataclasses.dataclass(frozen=True)
    class Shared(Bottleneck):
        """One diagonal for all sites."""

        def tensors(self, site):
            return {
                "A": TensorSpec((3, site.in_features), kaiming, trained=False),
                "B": TensorSpec((site.out_features, 3), kaiming, trained=False),
            }

        def layout(self, sites):
            return Layout({s.path: self.tensors(s) for s in sites}, {"core": TensorSpec((3,))})

        def factors(self, tensors, site):
            return tensors["A"] * tensors["core"][:, None], tensors["B"]

    yield Shared
    del registry.METHODS._items["test-shared"]


def test_values_keep_their_bytes_through_freezing_and_training():
    _, one, _ = two()
    values = {n: t.detach().clone() for n, t, _ in one.named_tensors()}
    one.train(False).train().train(False)
    assert all(same_bytes(t, values[n]) for n, t, _ in one.named_tensors())


def test_walking_deltas_leaves_the_gradient_mode_alone():
    model = llama()
    one, two = (lorry.attach(model, lorry.LoRA(rank=2), targets="mlp", name=name) for name in ("one", "two"))
    for _ in zip(one.deltas(), two.deltas(), strict=True):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
