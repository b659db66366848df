import pytest
import torch
from methods.small import batch, copies, round_trip, scatter_trained, stack

import lorry
from lorry.core.life.calibrate import calibrate, needs_calibration

BATCHES = [batch(40, seed=s) * torch.linspace(3, 0.1, 16) + 0.3 for s in (1, 2, 3)]


def run(model, x):
    return model(x).square().mean()


def inputs_of(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for x in BATCHES:
            model(x)
    handle.remove()
    return torch.cat(seen)


def test_starts_at_the_principal_directions_of_the_inputs():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.EVA(rank=4, rho=1.0))
    assert needs_calibration(adapter)
    receipt = calibrate(adapter, BATCHES, run)
    assert receipt.sites == 4 and not needs_calibration(adapter)
    assert torch.equal(model(x), before)
    for path, entry in adapter.entries.items():
        x_all = inputs_of(stack(), path)
        _, _, vt = torch.linalg.svd(x_all - x_all.mean(0), full_matrices=False)
        a = entry.tensors()["A"].detach()
        assert torch.allclose(a @ vt[:4].T @ vt[:4], a, atol=1e-3)
        assert torch.allclose((a * vt[:4]).sum(1).abs(), torch.ones(4), atol=1e-3)


def test_ranks_follow_the_explained_variance():
    adapter = lorry.attach(stack(3), lorry.EVA(rank=4, alpha=8.0))
    calibrate(adapter, BATCHES, run)
    ranks = {path: entry.method.rank for path, entry in adapter.entries.items()}
    assert sum(ranks.values()) == 4 * 6 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    for entry in adapter.entries.values():
        assert entry.tensors()["A"].shape[0] == entry.method.rank
        assert entry.method.scale(entry.site) == pytest.approx(2.0)
    assert all(p.requires_grad for p in adapter.parameters()) and len(adapter.parameters()) == 2 * len(ranks)


def test_trained_and_saved_with_its_ranks(tmp_path):
    x, model, other = batch(), stack(3), stack(3)
    adapter = lorry.attach(model, lorry.EVA(rank=4))
    calibrate(adapter, BATCHES, run)
    scatter_trained(adapter)
    loaded = round_trip(adapter, other, tmp_path / "a")
    assert torch.equal(model(x), other(x))
    assert copies(loaded).keys() == copies(adapter).keys()


def test_same_directions_as_peft():
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    eva = EvaConfig(rho=1.0, tau=0.0)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="eva", eva_config=eva, target_modules=["up", "down"])
    peer = get_peft_model(stack(), config)
    initialize_lora_eva_weights(
        peer,
        [BATCHES[0], BATCHES[0]],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    adapter = lorry.attach(stack(), lorry.EVA(rank=4, rho=1.0))
    calibrate(adapter, [BATCHES[0], BATCHES[0]], run)
    for path, entry in adapter.entries.items():
        theirs = peer.base_model.model.get_submodule(path).lora_A["default"].weight
        assert torch.allclose(entry.tensors()["A"], theirs, atol=5e-3)


def test_padding_is_left_out():
    def padded(model, x):
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        mask[:, -2:] = False
        x = x.clone()
        x[:, -2:] = 1000
        with lorry.context(model, padding_mask=mask):
            return model(x)

    shaped = [x.view(10, 4, 16) for x in BATCHES]
    starts = []
    for batches, loss in ((shaped, padded), ([x[:, :2] for x in shaped], run)):
        adapter = lorry.attach(stack(), lorry.EVA(rank=4, rho=1.0))
        calibrate(adapter, batches, loss)
        starts.append(copies(adapter))
    assert all(torch.allclose(v, starts[1][k], atol=1e-5) for k, v in starts[0].items())


def test_sketch_with_few_components_keeps_the_principal_ones():
    exact, sketched = (lorry.attach(stack(), lorry.EVA(rank=2, rho=1.0)) for _ in range(2))
    calibrate(exact, BATCHES, run)
    calibrate(sketched, BATCHES, run, components=10)
    for path in exact.entries:
        a, b = (c.entries[path].tensors()["A"].detach() for c in (exact, sketched))
        assert torch.allclose((a * b).sum(1), torch.ones(2), atol=2e-2)


def test_too_few_directions():
    adapter = lorry.attach(stack(), lorry.EVA(rank=4, rho=1.0))
    with pytest.raises(lorry.AdapterError, match="give more tokens"):
        calibrate(adapter, [batch(3)], run)
