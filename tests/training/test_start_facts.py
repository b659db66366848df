"""What the published starts begin with, against plain torch and against PEFT."""

import copy

import pytest
import torch
from methods.small import batch, stack
from safetensors.torch import save_file
from torch import nn

import lorry
from lorry.core.errors import OptionError, SiteError
from lorry.core.life.calibrate import observe
from lorry.training.starts import STARTS, apply_start
from lorry.training.starts.corda import CorDA
from lorry.training.starts.loftq import LoftQ
from lorry.training.starts.lora_da import LoRADA
from lorry.training.starts.lora_one import LoRAOne
from lorry.training.starts.lora_sb import LoRASB
from lorry.training.starts.milora import MiLoRA
from lorry.training.starts.nz_lora import NonZero
from lorry.training.starts.pissa import PiSSAStart

BATCHES = [batch(40, seed=s) * torch.linspace(3, 0.1, 16) + 0.3 for s in (1, 2)]
RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK


def loss(model, x):
    return (model(x) - x.roll(1, -1)).square().mean()


def started(start, method="lora", model=None, **options):
    model = stack() if model is None else model
    adapter = lorry.attach(model, {"method": method, "rank": RANK, **options}, name="a")
    apply_start(start, adapter, BATCHES, loss, seed=0)
    return adapter


def product(entry):
    own = entry.tensors()
    return (own["B"] @ own["A"]).detach()


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_start_on_lora_is_the_method(name):
    ours = started(STARTS[name](), alpha=ALPHA)
    method = lorry.attach(stack(), {"method": name, "rank": RANK, "alpha": ALPHA}, name="a")
    for path, entry in ours.entries.items():
        for tensor, value in method.entries[path].tensors().items():
            assert torch.equal(entry.tensors()[tensor], value), f"{path}.{tensor}"


def test_eva_on_lora_is_the_method():
    from lorry.core.life.calibrate import calibrate

    ours = started(STARTS["eva"](), model=stack(3), rank=4, alpha=8.0)
    method = lorry.attach(stack(3), {"method": "eva", "rank": 4, "alpha": 8.0}, name="a")
    calibrate(method, BATCHES, loss)
    assert ours.entries.keys() == method.entries.keys()
    ranks = [entry.method.rank for entry in ours.entries.values()]
    assert sum(ranks) == 4 * 6 and len(set(ranks)) > 1
    for path, entry in ours.entries.items():
        assert torch.equal(entry.tensors()["A"], method.entries[path].tensors()["A"])
        assert entry.method.scale(entry.site) == pytest.approx(2.0)


def test_pissa_takes_the_top_of_the_weight_and_milora_the_bottom():
    top, bottom = started(PiSSAStart(), alpha=ALPHA), started(MiLoRA(), alpha=ALPHA)
    for path, entry in top.entries.items():
        u, s, vt = torch.linalg.svd(entry.site.matrix())
        head = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        tail = u[:, len(s) - RANK : len(s)] * s[-RANK:] @ vt[len(s) - RANK : len(s)]
        torch.testing.assert_close(SCALE * product(entry), head, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(SCALE * product(bottom.entries[path]), tail, atol=1e-5, rtol=1e-4)


def inputs_of(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for x in BATCHES:
            model(x)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_sees_the_weight_through_its_inputs(mode):
    adapter = started(CorDA(mode=mode, damping=1e-6), alpha=ALPHA)
    for path, entry in adapter.entries.items():
        x, weight = inputs_of(stack(), path), entry.site.matrix().double()
        moment = x.T @ x / len(x)
        moment += 1e-6 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        u, s, vt = torch.linalg.svd(weight @ moment, full_matrices=False)
        kept = slice(-RANK, None) if mode == "kpm" else slice(None, RANK)
        expected = u[:, kept] * s[kept] @ vt[kept] @ torch.linalg.inv(moment)
        torch.testing.assert_close(SCALE * product(entry).double(), expected, atol=1e-4, rtol=1e-3)


def test_what_corda_would_train_moves_the_data_less_in_kpm_than_in_ipm():
    moved = {}
    for mode in ("kpm", "ipm"):
        adapter = started(CorDA(mode=mode))
        entry = adapter.entries["layers.0.up"]
        moved[mode] = float((inputs_of(stack(), "layers.0.up").float() @ product(entry).T).norm())
    assert moved["kpm"] < 0.2 * moved["ipm"]


def test_lora_one_points_along_the_first_step():
    adapter = started(LoRAOne(gamma=128.0, iterations=0))
    for path, g in gradients().items():
        u, s, vt = torch.linalg.svd(g)
        best = -(u[:, :RANK] * s[:RANK] @ vt[:RANK]) / s[0] / 128
        torch.testing.assert_close(product(adapter.entries[path]), best, atol=1e-6, rtol=1e-3)


def gradients():
    plain = stack()
    for x in BATCHES:
        (loss(plain, x) / len(BATCHES)).backward()
    return {p: m.weight.grad for p, m in plain.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("first_step", [False, True])
def test_lora_sb_has_the_gradient_between_its_factors(first_step):
    x, model = batch(), stack()
    before = model(x).detach()
    adapter = started(LoRASB(first_step=first_step, iterations=0), "lora-xs", model, alpha=ALPHA)
    for path, g in gradients().items():
        own = adapter.entries[path].tensors()
        u, s, vt = torch.linalg.svd(g)
        found = SCALE * own["B"] @ own["core"].detach() @ own["A"]
        torch.testing.assert_close(found, -(u[:, :RANK] * s[:RANK] @ vt[:RANK]), atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(own["A"] @ own["A"].T, torch.eye(RANK), atol=1e-5, rtol=0)
    assert torch.allclose(model(x), before, atol=1e-5) != first_step
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"core"}


def test_lora_da_begins_with_what_full_fine_tuning_changes():
    adapter = lorry.attach(stack(), lorry.LoRA(rank=RANK), name="a")
    before = [e.site.matrix().clone() for e in adapter.entries.values()]
    options = {"weight change": {"learning_rate": 0.01}}
    seen = observe(adapter, {"weight change": adapter.sites}, BATCHES * 5, loss, options=options)["weight change"]
    assert all(torch.equal(e.site.matrix(), w) for e, w in zip(adapter.entries.values(), before, strict=True))
    tuned = stack()
    with torch.no_grad():
        for path, found in seen.items():
            tuned.get_submodule(path).weight.add_(found.change)
    assert loss(tuned, BATCHES[0]) < 0.9 * loss(stack(), BATCHES[0])
    chosen = started(LoRADA(learning_rate=0.01, iterations=0))
    few = observe(adapter, {"weight change": adapter.sites}, BATCHES, loss, options=options)["weight change"]
    for path, entry in chosen.entries.items():
        u, s, vt = torch.linalg.svd(few[path].change)
        best = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        torch.testing.assert_close(product(entry), best, atol=1e-6, rtol=1e-3)


def test_the_first_step_of_lora_da_is_adalomos():
    """In one step the factored second moment is that of the gradient alone, and the update is clipped to RMS 1."""
    adapter = lorry.attach(stack(), lorry.LoRA(rank=RANK), name="a")
    options = {"weight change": {"learning_rate": 0.01}}
    seen = observe(adapter, {"weight change": adapter.sites}, BATCHES[:1], loss, options=options)["weight change"]
    plain = stack()
    loss(plain, BATCHES[0]).backward()
    for path, found in seen.items():
        weight = plain.get_submodule(path).weight
        g = weight.grad
        squares = g.square() + 1e-30
        update = g / (torch.outer(squares.mean(1), squares.mean(0)) / squares.mean()).sqrt()
        update = update / update.square().mean().sqrt().clamp_min(1)
        expected = -0.01 * weight.square().mean().sqrt() * update
        torch.testing.assert_close(found.change, expected.detach(), atol=1e-7, rtol=1e-3)


def test_nz_lora_draws_both_factors():
    adapter = started(NonZero(variance=4.0))
    for entry in adapter.entries.values():
        bound = 2 / entry.site.in_features**0.5
        for name in "AB":
            value = entry.tensors()[name].detach()
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.35)


def rounded(model, step=0.05):
    """A base whose weights were quantised."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter / step).round() * step)
    return model


def test_loftq_makes_good_what_quantising_lost(tmp_path):
    full, base = stack(), rounded(stack())
    save_file(dict(full.state_dict()), tmp_path / "model.safetensors")
    before, far, x = copy.deepcopy(base.state_dict()), base(batch()), batch()
    adapter = started(LoftQ(original=str(tmp_path)), model=base, alpha=ALPHA)
    near = base(x)
    assert (near - full(x)).norm() < 0.95 * (far - full(x)).norm()
    for path, entry in adapter.entries.items():
        lost = full.get_submodule(path).weight.detach() - before[f"{path}.weight"]
        u, s, vt = torch.linalg.svd(lost)
        torch.testing.assert_close(SCALE * product(entry), u[:, :RANK] * s[:RANK] @ vt[:RANK], atol=1e-6, rtol=1e-3)
    assert type(adapter.method) is lorry.LoRA


def test_loftq_says_what_is_missing(tmp_path):
    with pytest.raises(OptionError, match="set original to their folder"):
        LoftQ()
    save_file(dict(stack().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(SiteError, match="nothing to make good"):
        started(LoftQ(original=str(tmp_path)))
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(SiteError, match=r"no tensor 'layers.0.up.weight' of \(24, 16\)"):
        started(LoftQ(original=str(tmp_path)))


def test_dora_with_an_offset_keeps_its_magnitude_and_learns():
    x, model = batch(), stack()
    before = model(x).detach()
    adapter = started(PiSSAStart(), "dora", model)
    assert torch.allclose(model(x), before, atol=1e-5)
    losses = []
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for _ in range(20):
        value = loss(model, BATCHES[0])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.9 * losses[0]
    # the definition in float64: m ⊙ (W + ΔW) / ‖W + ΔW‖
    entry = adapter.entries["layers.0.up"]
    own = {n: t.detach().double() for n, t in entry.tensors().items()}
    weight = entry.site.matrix().double()
    moved = weight + own["B"] @ own["A"] - own["B0"] @ own["A0"]
    expected = own["magnitude"].unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + entry.delta().detach().double(), expected, atol=1e-5, rtol=1e-5)
