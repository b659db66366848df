"""Results that were silently wrong on models as people have them: each as a promise, against plain PyTorch."""

import copy
import io

import pytest
import torch
from core.choices import adapted, alone
from core.tiny import llama, off_zero, snapshot, tokens, unchanged

import lorry
from lorry.core.life.switch import make_switch

TARGETS = {"mixlora": "mlp", "full": ["model.norm"]}
#: A gate over no adapters does nothing by itself; with a rank it has a LoRA of its own.
OPTIONS = {"gated-fusion": {"rank": 2}}
ALL = sorted(lorry.methods())


def targets_of(slug):
    return TARGETS.get(slug, "attention")


def trained(slug, **more):
    model = llama(**more)
    method = {"method": slug, **OPTIONS.get(slug, {})}
    return model, off_zero(lorry.attach(model, method, targets=targets_of(slug)))


# -- whole models, written and read by torch


@pytest.mark.parametrize("slug", ALL)
def test_a_model_is_written_and_read_by_torch(slug):
    """In training and frozen; what is read can be trained, saved and detached."""
    for training in (True, False):
        model, adapter = trained(slug)
        adapter.train(training)
        before = model(tokens()).logits.detach()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert torch.equal(read(tokens()).logits.detach(), before)
        again = lorry.adapters(read)["default"]
        assert {n: s.shape for n, _, s in again.named_tensors()} == {n: s.shape for n, _, s in adapter.named_tensors()}
        again.train()
        read(tokens()).logits.sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in again.parameters())
        again.detach()
        assert type(read.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert torch.equal(model(tokens()).logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slug", ALL)
def test_a_cast_model_computes_trains_saves_and_merges(slug, dtype, tmp_path):
    model, adapter = trained(slug)
    expected = model(tokens()).logits.detach()
    model.to(dtype)
    found = model(tokens()).logits
    assert found.dtype == dtype
    rough = 0.1 if dtype == torch.bfloat16 else 1e-4
    constant = adapter.method.fusing != "never"  # routes are choices: in half precision some tokens take others
    if dtype == torch.float64 or constant:
        torch.testing.assert_close(found.float(), expected, atol=rough, rtol=rough)
    found.float().sum().backward()
    adapter.save(tmp_path / "a")
    other = llama().to(dtype)
    lorry.load(other, tmp_path / "a")
    # what is loaded computes in float32 what was cast here (DoRA's norms, VeRA's pair)
    if dtype == torch.float64 or constant:
        torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, atol=rough, rtol=rough)
    if constant:
        adapter.train(False)
        unfused = model(tokens()).logits.detach()
        adapter.fuse()
        rough = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(model(tokens()).logits.detach(), unfused, atol=rough, rtol=rough)


def test_a_tensor_that_keeps_its_type_keeps_its_values():
    """Uni-LoRA's one vector moves in very small steps."""
    model, adapter = trained("uni-lora")
    before = dict(adapter.named_parameters())["shared.theta"].detach().clone()
    model.to(torch.bfloat16)
    after = dict(adapter.named_parameters())["shared.theta"]
    assert torch.equal(after.detach(), before) and after.requires_grad
    model.float()
    assert torch.equal(dict(adapter.named_parameters())["shared.theta"].detach(), before)


def test_a_copied_adapter_says_that_it_cannot_start_anew():
    model, adapter = trained("vera")
    spec = next(s for _, _, s in lorry.adapters(copy.deepcopy(model))["default"].named_tensors())
    with pytest.raises(lorry.AdapterError, match=r"attach a fresh one"):
        spec.init(torch.zeros(spec.shape), torch.Generator())


# -- the base is changed while something is merged into it


def merged_dora(slug="dora", **more):
    model, adapter = trained(slug, **more)
    adapter.fuse()
    return model, adapter


LINEAR = ["lora", "dora", "hira", "shira"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slug", LINEAR)
def test_a_model_that_is_cast_while_merged_gets_its_own_weights_back_as_cast(slug, dtype):
    model, adapter = merged_dora(slug)
    model.to(dtype)
    adapter.unfuse()
    assert unchanged(model, snapshot(llama().to(dtype)))
    adapter.fuse()
    model.to(torch.float32)
    adapter.detach()
    assert unchanged(model, snapshot(llama().to(dtype).float()))


def test_two_adapters_merged_into_a_model_that_is_cast():
    model, first = trained("lora")
    second = off_zero(lorry.attach(model, "dora", targets="attention", name="second"), 7)
    first.fuse()
    second.fuse()
    model.to(torch.float64)
    deltas = {site.path: delta for site, delta in second.deltas()}
    assert deltas
    second.unfuse()
    first.unfuse()
    assert unchanged(model, snapshot(llama().double()))


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(llama(seed=3).state_dict()),
    "assign": lambda model: model.load_state_dict(llama(seed=3).state_dict(), assign=True),
    "in place": lambda model: scale(model),
    "there and back": lambda model: model.bfloat16().float(),
}


def scale(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)


@pytest.mark.parametrize("slug", ["lora", "dora"])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_base_that_was_changed_while_merged_is_left_as_it_is(change, slug):
    """Old tensors do not come back: taking the adapter out is refused, taking it off with what is there is not."""
    model, adapter = merged_dora(slug)
    CHANGES[change](model)
    now = snapshot(model)
    for action in (adapter.unfuse, adapter.detach, lambda: list(adapter.deltas())):
        with pytest.raises(lorry.AdapterError, match=r"was changed after adapter 'default'.*detach\(keep=True\)"):
            action()
        assert unchanged(model, now) and adapter.fused
    adapter.detach(keep=True)
    assert unchanged(model, now) and not lorry.adapters(model)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    if change in ("load_state_dict", "assign"):
        assert torch.equal(model(tokens()).logits, llama(seed=3)(tokens()).logits)
    again = off_zero(lorry.attach(model, slug, targets="attention"))
    again.fuse()
    again.detach()
    assert unchanged(model, now)


@pytest.mark.parametrize("change", ["load_state_dict", "assign", "in place"])
def test_a_base_that_was_changed_while_switched_is_left_as_it_is(change):
    model, adapter = trained("shira")
    lorry.activate(model, None)
    switch = make_switch(adapter)
    switch.on()
    CHANGES[change](model)
    now = snapshot(model)
    for action in (switch.off, adapter.detach):
        with pytest.raises(lorry.AdapterError, match=r"was changed after adapter 'default'.*detach\(keep=True\)"):
            action()
        assert unchanged(model, now)
    adapter.detach(keep=True)
    assert unchanged(model, now)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_while_switched_gets_its_own_values_back_as_cast(dtype):
    model, adapter = trained("shira")
    lorry.activate(model, None)
    switch = make_switch(adapter)
    switch.on()
    model.to(dtype)
    switch.off()
    assert unchanged(model, snapshot(llama().to(dtype)))


def test_a_copy_of_a_switched_model_is_switched_off_by_itself():
    model, adapter = trained("shira")
    lorry.activate(model, None)
    make_switch(adapter).on()
    switched = snapshot(model)
    twin = copy.deepcopy(model)
    lorry.adapters(twin)["default"].unfuse()
    assert unchanged(twin, snapshot(llama())) and unchanged(model, switched)
    adapter.unfuse()
    assert unchanged(model, snapshot(llama()))


@pytest.mark.parametrize("slug", ["dora", "hira", "lora"])
def test_updates_are_those_of_the_bare_base_while_merged(slug):
    model, adapter = trained(slug)
    before = {site.path: delta for site, delta in adapter.deltas()}
    off_zero(lorry.attach(model, "lora", targets="attention", name="other"), 9, 0.3).fuse()
    adapter.fuse()
    for site, delta in adapter.deltas():
        assert torch.equal(delta, before[site.path])
    lorry.adapters(model)["other"].deltas()


def test_a_copy_of_a_model_with_two_fused_adapters_gives_both_back():
    model = llama()
    before = snapshot(model)
    for name in ("a", "b"):
        off_zero(lorry.attach(model, "lora", targets="attention", name=name, activate=False), ord(name), 0.3).fuse()
    twin = copy.deepcopy(model)
    for name in ("b", "a"):
        lorry.adapters(twin)[name].unfuse()
    assert unchanged(twin, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: read_again(model)])
def test_a_copy_of_a_merged_model_is_unmerged_by_itself(copied):
    model, adapter = merged_dora("dora")
    merged = snapshot(model)
    twin = copied(model)
    assert unchanged(twin, merged)
    lorry.adapters(twin)["default"].unfuse()
    assert unchanged(twin, snapshot(llama())) and unchanged(model, merged)
    adapter.unfuse()
    assert unchanged(model, snapshot(llama()))


def read_again(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# -- compositions as contexts


def run(model):
    with torch.no_grad():
        return model(tokens(2)).logits


@pytest.fixture
def several():
    """A model with adapters a, b and c, none active, and what it gives with each of them, and bare."""
    model = adapted(*"abc")
    return model, {choice: alone(model, choice, tokens(2)) for choice in ("a", "b", "c", None)}


def test_a_block_entered_late_does_not_undo_what_was_chosen_since(several):
    model, wanted = several
    lorry.activate(model, "b")
    late = lorry.activate(model, "a")
    lorry.activate(model, "c")
    with late:
        assert torch.equal(run(model), wanted["a"])
    assert torch.equal(run(model), wanted["c"])


def test_a_detached_adapter_does_not_come_back_with_a_block(several):
    model, wanted = several
    lorry.activate(model, "b")
    late = lorry.activate(model, "a")
    lorry.adapters(model)["b"].detach()
    with late:
        assert torch.equal(run(model), wanted["a"])
    assert torch.equal(run(model), wanted[None])
    lorry.activate(model, "c")
    with lorry.activate(model, "a"):
        lorry.adapters(model)["c"].detach()
        assert torch.equal(run(model), wanted["a"])
        lorry.adapters(model)["a"].detach()
    assert model(tokens(2)).logits is not None and not lorry.adapters(model)
    assert torch.equal(run(model), wanted[None])


def test_a_block_of_a_detached_adapter_is_not_entered(several):
    model, wanted = several
    late = lorry.activate(model, "a")
    lorry.adapters(model)["a"].detach()
    with pytest.raises(lorry.AdapterError, match="was detached before the block"), late:
        pass
    assert torch.equal(run(model), wanted[None])


def test_blocks_left_out_of_order(several):
    model, wanted = several
    first, rows = lorry.activate(model, "a"), lorry.rows(model, ["b", None])
    first.__enter__()
    rows.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(run(model)[0], wanted["b"][0])
    rows.__exit__(None, None, None)
    assert torch.equal(run(model), wanted[None])


def test_what_is_loaded_inside_a_block_applies_after_it(several, tmp_path):
    model, wanted = several
    lorry.adapters(model)["b"].save(tmp_path / "b")
    with lorry.activate(model, "a"):
        lorry.load(model, tmp_path / "b", name="again")
        assert torch.equal(run(model), wanted["a"])
    assert torch.equal(run(model), wanted["b"])


def test_nothing_is_merged_while_rows_are_in_force(several):
    """It would apply to every row."""
    model, wanted = several
    with lorry.rows(model, ["a", None]):
        for name in "ab":
            with pytest.raises(lorry.AdapterError, match=r"lorry\.rows is in force"):
                lorry.adapters(model)[name].fuse()
        found = run(model)
    torch.testing.assert_close(found[0], wanted["a"][0])
    torch.testing.assert_close(found[1], wanted[None][1])


def test_an_adapter_is_not_merged_with_another_weight_than_it_is_active_with(several):
    model, wanted = several
    lorry.activate(model, {"a": 0.5, "b": 1.0})
    half = run(model)
    with pytest.raises(lorry.AdapterError, match="active with another weight than the 1 "):
        lorry.adapters(model)["a"].fuse()
    assert torch.equal(run(model), half)
    lorry.adapters(model)["b"].fuse()
    torch.testing.assert_close(run(model), half, atol=1e-5, rtol=1e-4)


def test_nothing_beside_the_base_is_what_is_in_the_base(several):
    """`activate(None)` says what applies beside the base weights, in every form of it; `rows` is refused."""
    model, wanted = several
    lorry.adapters(model)["a"].fuse()
    lorry.activate(model, None)
    torch.testing.assert_close(run(model), wanted["a"], atol=1e-5, rtol=1e-4)
    with lorry.activate(model, None):
        torch.testing.assert_close(run(model), wanted["a"], atol=1e-5, rtol=1e-4)
    lorry.activate(model, "a")
    torch.testing.assert_close(run(model), wanted["a"], atol=1e-5, rtol=1e-4)
    with pytest.raises(lorry.AdapterError, match="fused into the base"), lorry.rows(model, [None, None]):
        pass
    lorry.adapters(model)["a"].unfuse()
    lorry.activate(model, None)
    assert torch.equal(run(model), wanted[None])
