"""What single variants of LoRA promise beyond the laws: how ranks are found, gates closed, directions and experts
chosen."""

from __future__ import annotations

import math

import pytest
import torch
from core.tiny import llama, tokens
from methods.small import batch, scatter_trained, set_tensors, stack, train
from torch import nn
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.life.calibrate import calibrate, finish_step, observe
from lorry.methods.aurora import cubic_basis
from lorry.methods.mora import rotations
from lorry.methods.parts.allocation import effective_rank, ranks_by_importance
from lorry.training import Fleet, Job
from lorry.training import train as train_jobs
from lorry.training.starts import STARTS, apply_start


def square(model, x):
    return (model(x) - x.roll(1, -1)).square().mean()


def uneven():
    """A stack whose first layer weighs more than the others."""
    model = stack()
    with torch.no_grad():
        model.layers[0]["up"].weight.mul_(4)
    return model


def gradients(model, batches):
    probe = lorry.attach(model, "lora", name="probe")
    sites = [entry.site for entry in probe.entries.values()]
    seen = observe(probe, {"gradient": sites}, batches, square)["gradient"]
    probe.detach()
    return {path: observed.gradient for path, observed in seen.items()}


# -- ranks from gradients


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 6)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_ranks_by_importance_spend_the_budget_in_proportion():
    shapes = {"a": (8, 8), "b": (8, 24)}
    assert ranks_by_importance({"a": 1.0, "b": 2.0}, shapes, 4, 1, 64) == {"a": 4, "b": 4}
    assert ranks_by_importance({"a": 2.0, "b": 1.0}, shapes, 4, 1, 64) == {"a": 8, "b": 2}
    assert ranks_by_importance({"a": 1.0, "b": 0.0}, shapes, 4, 2, 6) == {"a": 6, "b": 2}


def test_ralora_takes_as_many_blocks_as_the_gradient_has_directions():
    batches = [batch(40, seed=s) for s in (1, 2)]
    seen = gradients(stack(), batches)
    model = stack()
    adapter = lorry.attach(model, lorry.RaLoRA(rank=2, alpha=6.0))
    calibrate(adapter, batches, square)
    blocks = {path: entry.method.blocks for path, entry in adapter.entries.items()}
    assert blocks == {p: 2 ** math.floor(math.log2(min(effective_rank(g) / 2, 8))) for p, g in seen.items()}
    assert max(blocks.values()) > 1
    for entry in adapter.entries.values():
        assert entry.method.scale(entry.site) == 3.0 and entry.method.rank == 2 * entry.method.blocks
    assert adapter.count() == lorry.plan(stack(), lorry.LoRA(rank=2)).trained
    x = batch()
    assert torch.equal(model(x), stack()(x))
    scatter_trained(adapter)
    assert all(int(torch.linalg.matrix_rank(e.delta().detach())) == e.method.rank for e in adapter.entries.values())


def test_d_ralora_moves_ranks_to_large_gradients():
    batches = [batch(40)]
    seen = gradients(uneven(), batches)
    adapter = lorry.attach(uneven(), {"method": "d-ralora", "rank": 3, "most_blocks": 1})
    calibrate(adapter, batches, square)
    ranks = {path: entry.method.rank for path, entry in adapter.entries.items()}
    norms = {path: float(g.norm()) for path, g in seen.items()}
    assert ranks == ranks_by_importance(norms, {p: tuple(g.shape) for p, g in seen.items()}, 3, 1, 64)
    assert len(set(ranks.values())) > 1


def started(name, method="lora", rank=3, **options):
    model = uneven()
    adapter = lorry.attach(model, {"method": method, "rank": rank, "alpha": 6.0}, seed=5)
    apply_start(STARTS[name](**options), adapter, [batch(40)], square, 1)
    return model, adapter


@pytest.mark.parametrize("name", ["gora", "lora-ga-pro"])
def test_ranks_follow_the_importance_of_weight_and_gradient(name):
    seen, plain = gradients(uneven(), [batch(40)]), uneven()
    worth = {p: float((plain.get_submodule(p).weight.detach() * g).abs().mean()) for p, g in seen.items()}
    _, adapter = started(name)
    ranks = {path: entry.method.rank for path, entry in adapter.entries.items()}  # of the frozen pairs
    shapes = {path: tuple(g.shape) for path, g in seen.items()}
    fair = ranks_by_importance(worth, shapes, 3, 1, 64)
    assert ranks == {p: min(r, 8 if name == "lora-ga-pro" else 16) for p, r in fair.items()}
    assert len(set(ranks.values())) > 1
    assert {e.method.scale(e.site) for e in adapter.entries.values()} == {2.0}


def test_gora_steps_against_the_gradient_as_far_as_it_says():
    seen = gradients(uneven(), [batch(40)])
    model, adapter = started("gora", first_step=True, step=0.1)
    for path, entry in adapter.entries.items():
        site, a = entry.site, entry.tensors()["A"].detach()
        inside = seen[path] @ torch.linalg.pinv(a) @ a
        step = -inside * 0.1 * site.matrix().norm() / seen[path].norm()
        torch.testing.assert_close(entry.delta().detach(), step, atol=1e-5, rtol=1e-4)
    assert square(model, batch(40)) < square(uneven(), batch(40))


def test_nlora_starts_at_nystroms_approximation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False))
    with torch.no_grad():  # of rank 3, where the approximation is exact
        model[0].weight.copy_(torch.randn(10, 3) @ torch.randn(3, 12))
    adapter = lorry.attach(model, {"method": "mos-lora", "rank": 3, "alpha": 6.0})
    apply_start(STARTS["nlora"](cutoff=1e-4), adapter, [], square, 1)
    (entry,) = adapter.entries.values()
    tensors = entry.tensors()
    product = 2.0 * tensors["B"] @ tensors["mixer"] @ tensors["A"]
    torch.testing.assert_close(product.detach(), model[0].weight.detach(), atol=1e-4, rtol=1e-3)
    assert entry.delta().abs().max() < 1e-5


# -- ranks in training


def test_increlora_grows_to_its_budget_where_importance_is():
    model, total = stack(), 12
    adapter = lorry.attach(model, lorry.IncreLoRA(initial_rank=1, target_rank=3, most_rank=6, warmup=2, final=2))
    counts = []

    def after(step):
        finish_step(adapter, step, total)
        counts.append(sum(int(e.tensors()["kept"].sum()) for e in adapter.entries.values()))

    train(model, adapter, total, after=after)
    assert counts[:2] == [4, 4] and counts == sorted(counts) and counts[-3:] == [12, 12, 12]
    for entry in adapter.entries.values():
        kept = entry.tensors()["kept"]
        assert int(torch.linalg.matrix_rank(entry.delta().detach())) <= int(kept.sum())
        assert not entry.tensors()["E"].detach()[~kept].any()


def test_salora_draws_gates_in_training_and_closes_them_in_use():
    model, x = stack(), batch()
    adapter = scatter_trained(lorry.attach(model, lorry.SALoRA(rank=4)))
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    model.eval()
    closed = torch.tensor([-9.0, -9.0, 9.0, 9.0])
    set_tensors(adapter, {f"{path}.gate": closed for path in adapter.entries})
    for entry in adapter.entries.values():
        gates = entry.method.gates(entry.tensors())
        assert gates.tolist() == [0.0, 0.0, 1.0, 1.0]
        assert int(torch.linalg.matrix_rank(entry.delta().detach())) == 2
    loss = lorry.auxiliary_loss(model, "default")
    loss.backward()
    assert all(e.tensors()["gate"].grad.gt(0).all() for e in adapter.entries.values())


def test_lora_dash_launches_along_the_directions_that_changed_most():
    model = stack()
    adapter = lorry.attach(model, lorry.LoRADash(rank=2, directions=3, launch=3))
    train(model, adapter, 2, after=lambda step: finish_step(adapter, step, 9))
    assert not any(e.tensors()["dash"].any() for e in adapter.entries.values())
    chosen = {}
    for path, entry in adapter.entries.items():
        u, s, vt = torch.linalg.svd(entry.site.matrix(), full_matrices=False)
        change = torch.diagonal(u.T @ entry.delta().detach() @ vt.T).abs() / s
        chosen[path] = vt[change.topk(3).indices]
    finish_step(adapter, 3, 9)
    for path, entry in adapter.entries.items():
        torch.testing.assert_close(entry.tensors()["right"], chosen[path], atol=1e-5, rtol=1e-4)
    train(model, adapter, 1, after=lambda step: finish_step(adapter, 4, 9))
    assert all(e.tensors()["dash"].any() for e in adapter.entries.values())


# -- mixtures


@pytest.mark.parametrize(
    "shape, experts", [("inverted-triangle", [1, 2, 8, 16]), ("triangle", [16, 8, 2, 1]), ("hourglass", [16, 1, 1, 16])]
)
def test_mola_counts_experts_by_depth_and_makes_them(shape, experts, tmp_path):
    model = stack(4)
    adapter = scatter_trained(lorry.attach(model, lorry.MoLA(rank=1, shape=shape)))
    found = {path.split(".")[1]: len(e.tensors()["A"]) for path, e in adapter.entries.items()}
    assert list(found.values()) == experts
    adapter.save(tmp_path)
    other = stack(4)
    lorry.load(other, tmp_path)
    assert torch.equal(other(batch()), model(batch()))


@pytest.mark.parametrize("slug", ["loramoe", "goat"])
def test_gates_are_a_softmax_over_the_chosen_experts_in_both_orders(slug):
    model, x = stack(1), batch()
    adapter = scatter_trained(lorry.attach(model, {"method": slug, "rank": 2, "alpha": 2.0}, targets="up"), std=1.0)
    (entry,) = adapter.entries.values()
    layer, t = model.layers[0]["up"], {n: v.detach() for n, v in entry.tensors().items()}
    lorry.activate(model, None)
    bare = layer(x)
    lorry.activate(model, "default")
    logits = x @ t["router"].T
    least = logits.topk(2).values[:, -1:]
    gates = torch.where(logits >= least, logits, -torch.inf).softmax(-1)  # both orders are the same numbers
    wanted = bare.clone()
    for e in range(4):
        part = slice(2 * e, 2 * e + 2)
        update = t["B"][:, part] @ t["A"][part]
        if slug == "goat":
            update = update - t["B0"][:, part] @ t["A0"][part]
        wanted = wanted + gates[:, e : e + 1] * (x @ update.T)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


def test_goat_starts_its_experts_at_segments_of_the_spectrum_and_exactly_at_the_base():
    model, x = stack(1), batch()
    before = model(x)
    adapter = lorry.attach(model, lorry.GOAT(rank=2, experts=4, rho=5.0), targets="up")
    assert torch.allclose(model(x), before, atol=1e-6)
    (entry,) = adapter.entries.values()
    values, t = torch.linalg.svdvals(entry.site.matrix()), entry.tensors()
    assert entry.method.scale(entry.site) == pytest.approx(math.sqrt(3 * 16 / 2))
    for e in range(4):
        product = t["B"][:, 2 * e : 2 * e + 2] @ t["A"][2 * e : 2 * e + 2]
        found = torch.linalg.svdvals(product.detach())[:2] * entry.method.scale(entry.site) * 5.0
        torch.testing.assert_close(found, values[4 * e : 4 * e + 2], atol=1e-4, rtol=1e-4)


def test_the_balance_loss_leaves_padding_out():
    model, ids = llama(1), tokens()
    lorry.attach(model, lorry.LoRAMoE(rank=2, load_balance=1.0), targets="q_proj")
    model.train()

    def loss(ids, mask=None):
        with lorry.context(model, padding_mask=mask):
            model(ids)
            return float(lorry.auxiliary_loss(model).detach())

    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -2:] = False
    other = torch.where(mask, ids, (ids + 7) % 40)
    assert loss(ids, mask) == pytest.approx(loss(other, mask)) and loss(ids) != pytest.approx(loss(other))


# -- curves and shapes


def test_the_spline_is_a_partition_of_unity_and_smooth():
    u = torch.linspace(-1, 1, 101, dtype=torch.float64)
    basis = cubic_basis(u, 5)
    assert basis.shape == (101, 8) and (basis >= 0).all()
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(u))
    line = basis @ ((torch.arange(-1, 7) / 2.5) - 1).double()  # linear coefficients give back the line
    torch.testing.assert_close(line, u)


def test_sinter_bends_the_output_and_never_fuses():
    model, x = stack(1), batch()
    adapter = scatter_trained(lorry.attach(model, lorry.LoRAN(rank=2, alpha=6.0, amplitude=0.5), targets="up"))
    (entry,) = adapter.entries.values()
    t, layer = entry.tensors(), model.layers[0]["up"]
    z = x @ t["A"].T @ t["B"].T
    wanted = x @ layer.weight.T + layer.bias + 3.0 * (z + 0.5 * torch.sin(1000.0 * z) * z)
    torch.testing.assert_close(layer(x), wanted, atol=1e-3, rtol=1e-3)
    with pytest.raises(lorry.AdapterError, match="depend"):
        adapter.fuse()


def test_mora_adds_up_inputs_of_equal_index_and_rotation_turns_each_piece():
    model = stack(1)
    adapter = scatter_trained(lorry.attach(model, lorry.MoRA(rank=2), targets="up"))
    (entry,) = adapter.entries.values()
    m, delta = entry.tensors()["M"], entry.delta()
    size = len(m)
    assert size == math.isqrt(40 * 2)
    assert all(torch.equal(delta[i, j], m[i % size, j % size]) for i in range(24) for j in range(16))
    turned = rotations(3, 6)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(6).double().expand(3, 6, 6))
    assert torch.equal(turned[0], torch.eye(6).double()) and not torch.allclose(turned[1], turned[2])


def test_chunks_are_rolled_along_the_ranks():
    adapter = scatter_trained(
        lorry.attach(stack(1), lorry.PROLoRA(rank=5, unshared=1, repeats=4, output_repeats=2), targets="up")
    )
    (entry,) = adapter.entries.values()
    t = entry.tensors()
    a, b = entry.method.factors(t, entry.site)
    assert a.shape == (5, 16) and b.shape == (24, 5) and torch.equal(a[:1], t["A"])
    for i in range(4):
        assert torch.equal(a[1:, 4 * i : 4 * i + 4], t["chunk_A"].roll(i, 0))
    for i in range(2):
        assert torch.equal(b[12 * i : 12 * i + 12, 1:], t["chunk_B"].roll(2 * i, 1))


def test_what_is_shared_is_counted_once():
    def count(method):
        return lorry.plan(stack(3), method).trained

    plain = count(lorry.LoRA(rank=3))
    assert plain == 3 * 2 * 3 * 40
    assert count(lorry.RaSA(rank=3, shared_rank=1)) == plain + 6 * (2 + 3)
    assert count(lorry.TiedLoRA(rank=3)) == 2 * 3 * 40 + 3 * (24 + 16 + 6)
    assert count(lorry.ShareLoRA(rank=3)) == 3 * 3 * 40 + 3 * 40
    assert count(lorry.ShareLoRA(rank=3, share="both")) == 2 * 3 * 40
    assert count(lorry.DenseLoRA(rank=3)) == 2 * 3 * 40 + 6 * 9
    assert count(lorry.BSLoRA(rank=1, intra_rank=2, inter_rank=3)) == 6 * 40 + (3 * 2 + 3) * 48
    assert count(lorry.NoRA(rank=4, inner_rank=2)) == 6 * 16


# -- in a fleet

#: What changes outside the gradient, draws in training, or is decided by calibration.
STATEFUL = {
    "increlora": {"initial_rank": 1, "target_rank": 2, "most_rank": 3},
    "lora-dash": {"rank": 2, "directions": 2, "launch": 3},
    "salora": {"rank": 2},
    "d-ralora": {"rank": 2},
    "goat": {"rank": 2, "experts": 2, "eta": 0.02},
    "bslora": {},
}


def test_runs_of_variants_are_resumed_exactly_and_are_alone_what_they_are_in_company(tmp_path):
    options = {"steps": 4, "batch_size": 2, "calibration": 2, "targets": "attention"}

    def jobs():
        return [Job(s, token_rows(8, (5, 9), 1), {"method": s, **more}, **options) for s, more in STATEFUL.items()]

    whole = train_jobs(tiny_llama(), None, jobs(), tmp_path / "whole")
    first = Fleet(tiny_llama(), None, jobs(), tmp_path / "part")
    with first.base.mode(training=True):
        first._tick()
        first._tick()
    first.save_checkpoint()
    second = train_jobs(tiny_llama(), None, jobs(), tmp_path / "part", resume=True)
    for slug in STATEFUL:
        pairs = zip(whole.adapters[slug].named_tensors(), second.adapters[slug].named_tensors(), strict=True)
        assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in pairs), slug
    for job in jobs()[1:4]:
        alone = train_jobs(tiny_llama(), None, job, tmp_path / job.name)
        pairs = zip(whole.adapters[job.name].named_tensors(), alone.adapters[job.name].named_tensors(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for (_, a, _), (_, b, _) in pairs), job.name
