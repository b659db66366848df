import pytest
import torch
from methods.small import batch, copies, peft_model, round_trip, scatter_trained, set_tensors, stack, train

import lorry
from lorry.core.life.calibrate import calibrate
from lorry.core.life.switch import make_switch
from lorry.kernels.sparse import reference, scatter, sparse_linear


def loss(model, x):
    return model(x).square().mean()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lorry_" not in n}


def test_base_bit_for_bit_at_start():
    x, model = batch(), stack()
    before = model(x)
    lorry.attach(model, lorry.SHiRA(rank=1))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sparse_linear_is_its_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(12 * 9, generator=generator)[:31].sort().values.int()
    results = []
    for function in (sparse_linear, reference):
        generator.manual_seed(1)
        x = torch.randn(2, 5, 9, generator=generator).to(dtype).requires_grad_()
        values = torch.randn(31, generator=generator).requires_grad_()
        y = function(x, values, index, (12, 9))
        assert y.dtype == dtype and y.shape == (2, 5, 12)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, values.grad])
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_only_masked_entries_of_the_merged_weight_change():
    model = stack()
    before = weights(model)
    adapter = lorry.attach(model, lorry.SHiRA(rank=1))
    train(model, adapter, 4, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    adapter.fuse()
    for path, entry in adapter.entries.items():
        changed = (weights(model)[f"{path}.weight"] != before[f"{path}.weight"]).flatten().nonzero().flatten()
        assert torch.equal(changed, entry.tensors()["index"].long())
        assert len(changed) == 16 + 24
    assert all(torch.equal(weights(model)[n], v) for n, v in before.items() if n.endswith("bias"))


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.01)])
def test_same_as_training_the_weight_with_a_masked_gradient(make):
    x, target = batch(16).double(), batch(16, seed=9).double()
    model, plain = stack().double(), stack().double()
    adapter = lorry.attach(model, lorry.SHiRA(rank=1), dtype=torch.float64)
    paths = [f"{p}.weight" for p in adapter.entries]
    masks = {
        f"{p}.weight": scatter(
            torch.ones(len(e.tensors()["index"]), dtype=torch.float64), e.tensors()["index"], 384
        ).view(e.site.shape)
        for p, e in adapter.entries.items()
    }
    trained = {n: p for n, p in plain.named_parameters() if n in paths}
    first, second = make(adapter.parameters()), make(list(trained.values()))
    for _ in range(5):
        for m, o in ((model, first), (plain, second)):
            o.zero_grad()
            (m(x) - target).square().mean().backward()
            for name, parameter in trained.items():
                if m is plain:
                    parameter.grad *= masks[name]
            o.step()
    adapter.fuse()
    for path in adapter.entries:
        assert torch.allclose(model.get_submodule(path).weight, trained[f"{path}.weight"], atol=1e-10)


def test_rank_is_high():
    adapter = scatter_trained(lorry.attach(stack(1, 32, 32), lorry.SHiRA(rank=2)))
    assert all(int(torch.linalg.matrix_rank(d)) > 8 for _, d in adapter.deltas())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_in_place_restores_every_byte(dtype):
    x, model = batch().to(dtype), stack().to(dtype)
    before = weights(model)
    adapters = [lorry.attach(model, lorry.SHiRA(rank=2), name=n, seed=s) for s, n in enumerate("ab")]
    switches = [make_switch(scatter_trained(a, seed=s)) for s, a in enumerate(adapters)]
    tolerance = 1e-1 if dtype == torch.bfloat16 else 1e-5
    for adapter, switch in zip(adapters, switches, strict=True):
        lorry.activate(model, adapter.name)
        active = model(x)
        with pytest.raises(lorry.AdapterError, match="is active"):
            switch.on()
        lorry.activate(model, None)
        switch.on()
        assert torch.allclose(model(x), active, rtol=tolerance, atol=tolerance)
        with pytest.raises(lorry.AdapterError, match="in the base"):
            switches[0].on()
        written = weights(model)
        switch.off()
        adapter.fuse()
        assert all(torch.equal(v, weights(model)[n]) for n, v in written.items())
        adapter.unfuse()
        assert all(torch.equal(v, weights(model)[n]) for n, v in before.items())
        with pytest.raises(lorry.AdapterError, match="not in the base"):
            switch.off()


def test_switching_a_transposed_weight_and_a_dense_update():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    x, model = batch(), torch.nn.Sequential(Conv1D(24, 16))
    before = model[0].weight.clone()
    adapter = scatter_trained(lorry.attach(model, lorry.SHiRA(rank=2)))
    active = model(x)
    switch = make_switch(adapter)
    lorry.activate(model, None)
    switch.on()
    assert torch.allclose(model(x), active, atol=1e-5)
    switch.off()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(lorry.AdapterError, match="not sparse"):
        make_switch(lorry.attach(model, "lora", name="dense", activate=False))


def test_masks_differ_between_layers_and_adapters_and_are_unique():
    model = stack(2, 16, 16)
    first = lorry.attach(model, lorry.SHiRA(rank=1), name="a", seed=0)
    second = lorry.attach(model, lorry.SHiRA(rank=1), name="b", seed=1)
    masks = [e.tensors()["index"] for a in (first, second) for e in a.entries.values()]
    for number, mask in enumerate(masks):
        assert len(mask.unique()) == len(mask) == 32
        assert not any(torch.equal(mask, other) for other in masks[:number])


def test_magnitude_masks_and_their_parts():
    masks = []
    for part in (0, 1):
        adapter = lorry.attach(stack(), lorry.SHiRA(mask="wm", rank=1, part=part))
        masks.append(adapter.entries["layers.0.up"].tensors()["index"].long())
    flat = stack().layers[0]["up"].weight.abs().flatten()
    assert set(masks[0].tolist()) == set(flat.topk(40).indices.tolist())
    assert set(torch.cat(masks).tolist()) == set(flat.topk(80).indices.tolist())


@pytest.mark.parametrize("every", [1, 5, 8])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_structured_mask(axis, every):
    adapter = lorry.attach(stack(), lorry.SHiRA(mask="struct", every=every, axis=axis))
    entry = adapter.entries["layers.0.up"]
    mask = scatter(torch.ones(len(entry.tensors()["index"])), entry.tensors()["index"], 384).view(24, 16)
    expected = torch.zeros(24, 16)
    expected.fill_diagonal_(1)
    (expected if axis == "row" else expected.T)[::every] = 1
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_masks_from_the_gradient(mask):
    batches = [batch(seed=s) for s in (1, 2, 3)]
    model, plain = stack(), stack()
    adapter = lorry.attach(model, lorry.SHiRA(mask=mask, rank=1))
    calibrate(adapter, batches, loss)
    for x in batches:
        loss(plain, x).backward()
    for path, entry in adapter.entries.items():
        weight = plain.get_submodule(path).weight
        scores = (weight.grad * weight if mask == "snip" else weight.grad).abs().flatten()
        assert set(entry.tensors()["index"].tolist()) == set(scores.topk(40).indices.tolist())
    assert all(p.grad is None for p in model.parameters())


def test_indices_survive_casting_and_round_trip(tmp_path):
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.SHiRA(rank=1)))
    other = stack()
    loaded = round_trip(adapter, other, tmp_path / "a")
    assert all(torch.equal(v, copies(loaded)[k]) for k, v in copies(adapter).items())
    assert torch.equal(model(x), other(x))
    adapter.to(torch.bfloat16)
    assert adapter.entries["layers.0.up"].tensors()["index"].dtype == torch.int32


def test_adapters_add_at_overlaps():
    x, model, plain = batch(), stack(), stack()
    adapters = [
        scatter_trained(lorry.attach(model, lorry.SHiRA(mask="wm", rank=1), name=n), seed=s) for s, n in enumerate("ab")
    ]
    lorry.activate(model, {"a": 0.5, "b": 2.0})
    with torch.no_grad():
        for adapter, weight in zip(adapters, (0.5, 2.0), strict=True):
            for site, delta in adapter.deltas():
                plain.get_submodule(site.path).weight += weight * delta
    assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_less_interference_than_lora():
    sparse = [scatter_trained(lorry.attach(stack(1, 64, 64), lorry.SHiRA(rank=1), seed=s)) for s in (0, 1)]
    dense = [scatter_trained(lorry.attach(stack(1, 64, 64), lorry.LoRA(rank=1)), seed=s) for s in (0, 1)]

    def zeros(pair):
        first, second = (next(iter(a.deltas()))[1] for a in pair)
        return float((first.T @ second == 0).float().mean())

    assert zeros(dense) == 0 and zeros(sparse) > 0.8


def test_same_as_peft():
    from peft import ShiraConfig

    x, model = batch(), stack()
    peer = peft_model(stack(), ShiraConfig(r=2, target_modules=["up", "down"], random_seed=3))
    adapter = lorry.attach(model, lorry.SHiRA(rank=2))
    for path in adapter.entries:
        layer = peer.base_model.model.get_submodule(path)
        rows, columns = layer.shira_indices["default"].long()
        flat, order = (rows * layer.in_features + columns).sort()
        set_tensors(adapter, {f"{path}.index": flat, f"{path}.values": layer.shira_weight["default"].detach()[order]})
    assert torch.allclose(model(x), peer(x), atol=1e-5)


def test_too_many_positions():
    with pytest.raises(lorry.SiteError, match="384 positions"):
        lorry.attach(stack(), lorry.SHiRA(rank=10))
    with pytest.raises(lorry.SiteError, match="part 1"):
        lorry.attach(stack(), lorry.SHiRA(rank=6, part=1))
    with pytest.raises(lorry.OptionError, match="no parts"):
        lorry.SHiRA(mask="struct", part=1)
    with pytest.raises(lorry.OptionError, match="random"):
        lorry.SHiRA(mask="random")


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_structured_mask_has_as_many_positions_as_the_rank_allows(axis, rank):
    """The densest grid with no more positions than a LoRA of the rank has."""
    adapter = lorry.attach(stack(), lorry.SHiRA(mask="struct", rank=rank, axis=axis))
    assert adapter.count() <= lorry.plan(stack(), lorry.LoRA(rank=rank)).trained
    for entry in adapter.entries.values():
        site = entry.site
        shape = (site.out_features, site.in_features)
        mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        mask[entry.tensors()["index"].long()] = True
        mask = mask.view(shape)
        most = rank * sum(shape)

        def grid(step, shape=shape):
            chosen = torch.zeros(shape, dtype=torch.bool)
            chosen.fill_diagonal_(True)
            (chosen if axis == "row" else chosen.T)[::step] = True
            return chosen

        fitting = [n for n in range(1, max(shape) + 1) if grid(n).sum() <= most]
        assert torch.equal(mask, grid(fitting[0]))
    with pytest.raises(lorry.OptionError, match="give one of them"):
        lorry.SHiRA(mask="struct", rank=rank, every=2)


def corners(site):
    """Scores that prefer the ends of each row."""
    return (torch.arange(site.in_features) - site.in_features / 2).abs().expand(site.shape)


def test_a_function_chooses_the_positions(tmp_path):
    model = stack()
    method = lorry.SHiRA(mask=corners, rank=1)
    adapter = scatter_trained(lorry.attach(model, method, site_options={"up": {"rank": 2}}))
    for path, entry in adapter.entries.items():
        count = (2 if path.endswith("up") else 1) * sum(entry.site.shape)
        assert len(entry.tensors()["index"]) == count
        columns = entry.tensors()["index"].long() % entry.site.in_features
        scores = corners(entry.site)
        assert scores[0, columns].min() >= scores.flatten().sort(descending=True).values[count - 1]
    adapter.save(tmp_path / "a")
    other = stack()
    loaded = lorry.load(other, tmp_path / "a")
    assert loaded.method.mask == "given" and torch.equal(model(batch()), other(batch()))
    with pytest.raises(lorry.OptionError, match="read from a checkpoint"):
        lorry.attach(stack(), lorry.SHiRA(mask="given", rank=1))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda site: torch.ones(3), "must give a tensor"),
        (lambda site: torch.ones(site.shape, dtype=torch.bool), "times True"),
        (lambda site: None, "found NoneType"),
    ],
)
def test_what_a_function_gives_is_checked(mask, words):
    with pytest.raises(lorry.OptionError, match=words):
        lorry.attach(stack(), lorry.SHiRA(mask=mask, rank=1))


def test_a_function_may_give_the_positions_themselves():
    def first(site):
        mask = torch.zeros(site.shape, dtype=torch.bool)
        mask.view(-1)[: sum(site.shape)] = True
        return mask

    adapter = lorry.attach(stack(), lorry.SHiRA(mask=first, rank=1))
    assert all(e.tensors()["index"].tolist() == list(range(40)) for e in adapter.entries.values())
