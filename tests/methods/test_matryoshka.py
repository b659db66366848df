import pytest
import torch
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train

import lorry
from lorry.core.life.calibrate import finish_step
from lorry.methods.parts.nested import at_rank, aurac, cut, mean_loss

SCALINGS = ("none", "rank", "sqrt")


def adapted(layers=2, **options):
    model = stack(layers)
    return model, lorry.attach(model, lorry.Matryoshka(**{"rank": 8, **options}))


def test_weights_of_the_sheet():
    full = lorry.Matryoshka(rank=16)
    assert full.weights() == [5, 4, 3, 3, 2, 2, 2, 2] + [1] * 8
    assert (
        lorry.Matryoshka(rank=16, scaling="rank").weights()
        == [1.9375, 0.9375, 0.4375, 0.4375] + [0.1875] * 4 + [0.0625] * 8
    )
    expected = [2.811, 1.811, 1.104, 1.104, 0.604]
    assert lorry.Matryoshka(rank=16, scaling="sqrt").weights()[:5] == pytest.approx(expected, abs=1e-3)


def test_identity_at_start_for_every_rank():
    x, (model, adapter) = batch(), adapted()
    bare = stack()(x)
    assert torch.equal(model(x), bare)
    for rank in range(1, 9):
        with at_rank(adapter, rank):
            assert torch.equal(model(x), bare)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_output_is_the_sum_of_the_sub_adapters(scaling):
    _, adapter = adapted(scaling=scaling)
    scatter_trained(adapter)
    entry = adapter.entries["layers.0.up"]
    a, b = entry.tensors()["A"], entry.tensors()["B"]
    method = adapter.method
    parts = [method.scale_of(r) * b[:, :r] @ a[:r] for r in method.trained_ranks]
    assert torch.allclose(entry.delta(), sum(parts), atol=1e-5)


@pytest.mark.parametrize("options", [{"mode": "lora"}, {"ranks": (8,)}, {"mode": "dylora", "ranks": (8,)}])
def test_full_rank_alone_is_lora(options):
    model, adapter = adapted(scaling="sqrt", **options)
    plain = stack()
    lora = lorry.attach(plain, lorry.LoRA(rank=8, alpha=8 / 8**0.5))
    set_tensors(lora, {k: v for k, v in copies(adapter).items() if "drawn" not in k})
    model.train(), plain.train()
    assert train(model, adapter, 5) == pytest.approx(train(plain, lora, 5), rel=1e-5)


@pytest.mark.parametrize("rule", ["P", "rank"])
def test_cut_is_nested_exported_and_merged(rule, tmp_path):
    x, (model, adapter) = batch(), adapted(scaling="sqrt", cut_scale=rule)
    scatter_trained(adapter)
    for rank in (1, 3, 8):
        cut(adapter, rank)
        entry = adapter.entries["layers.0.up"]
        a, b = entry.tensors()["A"][:rank], entry.tensors()["B"][:, :rank]
        weights = torch.tensor(adapter.method.weights()[:rank]) if rule == "P" else torch.full((rank,), rank**-0.5)
        assert torch.allclose(entry.delta(), b * weights @ a, atol=1e-5)
        output = model(x)
        adapter.fuse()
        assert torch.allclose(model(x), output, atol=1e-4)
        adapter.unfuse()


def test_official_rule_differs_from_training_at_full_rank_and_p_does_not():
    x, (model, adapter) = batch(), adapted()
    scatter_trained(adapter)
    trained = model(x)
    with at_rank(adapter, 8):
        assert torch.allclose(model(x), trained, atol=1e-6)
    with at_rank(adapter, 8, "rank"):
        assert not torch.allclose(model(x), trained, atol=1e-2)
    assert torch.equal(model(x), trained) and adapter.method.at is None


def test_gradients_are_weighted_by_p():
    x = batch()
    gradients = []
    for options in ({}, {"mode": "lora"}):
        model, adapter = adapted(layers=1, **options)
        model(x).square().sum().backward()
        gradients.append(adapter.entries["layers.0.up"].tensors()["B"].grad)
    weights = torch.tensor(lorry.Matryoshka(rank=8).weights())
    assert torch.allclose(gradients[0], gradients[1] * weights, rtol=1e-4, atol=1e-6)


def test_components_beyond_the_trained_ranks_stay():
    model, adapter = adapted(ranks=(1, 4))
    before = copies(adapter)
    train(model, adapter, 3)
    after = copies(adapter)
    for path in adapter.entries:
        assert torch.equal(before[f"{path}.A"][4:], after[f"{path}.A"][4:])
        assert torch.equal(before[f"{path}.B"][:, 4:], after[f"{path}.B"][:, 4:])
        assert not torch.equal(before[f"{path}.B"][:, :4], after[f"{path}.B"][:, :4])


def test_dylora_draws_one_rank_for_all_layers():
    model = stack().train()
    adapter = lorry.attach(model, lorry.method_from({"method": "dylora", "rank": 8}))
    drawn = set()
    for step in range(1, 20):
        rank = int(adapter.shared.tensors()["drawn"])
        drawn.add(rank)
        model(batch()).square().sum().backward()
        for entry in adapter.entries.values():
            b = entry.tensors()["B"].grad
            assert not b[:, rank:].any() and b[:, :rank].any(0).all()
        model.zero_grad()
        for parameter in adapter.parameters():
            parameter.grad = None
        finish_step(adapter, step, 20)
    assert drawn == {1, 2, 4, 8}


def test_dylora_evaluates_and_merges_all_units():
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.Matryoshka(rank=8, mode="dylora", draw_seed=1)))
    output = model(x)
    model.train()
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)


@pytest.mark.parametrize("rule", ["P", "rank"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_cut_of_dylora_is_what_was_trained_at_that_rank(scaling, rule):
    x, (model, adapter) = batch(), adapted(mode="dylora", scaling=scaling, cut_scale=rule)
    scatter_trained(adapter)
    for rank in adapter.method.trained_ranks:
        adapter.shared.tensors()["drawn"].fill_(rank)
        model.train()
        trained = model(x)  # with a graph, as in a training step
        model.eval()
        with at_rank(adapter, rank):
            assert torch.allclose(model(x), trained, atol=1e-5)
            expected = {site.path: delta for site, delta in adapter.deltas()}
        for path, entry in adapter.entries.items():
            a, b = entry.tensors()["A"][:rank], entry.tensors()["B"][:, :rank]
            assert torch.allclose(expected[path], adapter.method.scale_of(rank) * b @ a, atol=1e-5)


def test_mean_loss_serves_every_rank():
    x, (model, adapter) = batch(), adapted()
    scatter_trained(adapter)
    each = []
    for rank in adapter.method.trained_ranks:
        with at_rank(adapter, rank):
            each.append(model(x).square().mean())
    assert torch.allclose(mean_loss(adapter, lambda: model(x).square().mean()), torch.stack(each).mean())


def test_aurac():
    for axis in ("log2", "linear"):
        assert aurac([1, 2, 8], [0.7, 0.7, 0.7], axis) == pytest.approx(0.7)
    assert aurac([1, 2, 4], [0.2, 0.6, 1.0], "log2") == pytest.approx(0.6)
    assert aurac([1, 2, 4], [0.2, 0.6, 1.0], "linear") == pytest.approx((0.4 + 1.6) / 3)
    assert aurac([1, 2, 8], [0.1, 0.5, 0.6]) == pytest.approx(aurac([2, 4, 16], [0.1, 0.5, 0.6]))
    assert aurac([4], [0.3]) == 0.3
    with pytest.raises(lorry.OptionError, match="ascending"):
        aurac([2, 1], [0.1, 0.2])


def test_two_adapters_have_their_own_weights():
    x, model = batch(), stack()
    scatter_trained(lorry.attach(model, lorry.Matryoshka(rank=8), name="a"))
    first = model(x)
    scatter_trained(lorry.attach(model, lorry.Matryoshka(rank=4, scaling="sqrt"), name="b"))
    lorry.activate(model, "a")
    assert torch.equal(model(x), first)


def test_saved_cut_is_read_again(tmp_path):
    x, (model, adapter) = batch(), adapted()
    scatter_trained(adapter)
    cut(adapter, 3)
    adapter.save(tmp_path / "a")
    other = stack()
    loaded = lorry.load(other, tmp_path / "a")
    assert torch.equal(model(x), other(x))
    cut(loaded, None), cut(adapter, None)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("options", [{"ranks": (1, 9)}, {"ranks": ()}, {"at": 9}])
def test_ranks_beyond_the_stored_one(options):
    with pytest.raises(lorry.OptionError, match="rank 8"):
        lorry.Matryoshka(rank=8, **options)


def test_other_methods_cannot_be_cut():
    adapter = lorry.attach(stack(), "lora")
    with pytest.raises(lorry.AdapterError, match="'lora'.*no nested ranks|no nested ranks.*matryoshka-lora"):
        cut(adapter, 2)
