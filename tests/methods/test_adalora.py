import pytest
import torch
from methods.small import batch, copies, peft_model, scatter_trained, set_tensors, stack, train

import lorry
from lorry.core.life.calibrate import finish_step


def test_identity_at_start_and_full_budget_is_lora():
    x, models = batch(), [stack(), stack()]
    before = models[0](x)
    ada = lorry.attach(models[0], lorry.AdaLoRA(initial_rank=4, target_rank=4, alpha=8.0, orthogonality=0.0))
    assert torch.equal(models[0](x), before)
    scatter_trained(ada)
    lora = lorry.attach(models[1], lorry.LoRA(rank=4, alpha=8.0))
    for path, entry in ada.entries.items():
        a, b = (f.detach() for f in entry.method.factors(entry.tensors(), entry.site))
        set_tensors(lora, {f"{path}.A": a, f"{path}.B": b})
    assert torch.allclose(models[0](x), models[1](x), atol=1e-5)
    train(models[0], ada, 3, after=lambda step: finish_step(ada, step, 10))
    assert all(e.tensors()["kept"].all() for e in ada.entries.values())


@pytest.mark.parametrize("form", ["mean-norm", "sum-square"])
def test_penalty(form):
    model = stack()
    adapter = scatter_trained(lorry.attach(model, lorry.AdaLoRA(orthogonality=0.3, penalty_form=form)))
    values = copies(adapter)
    gaps = []
    for path in adapter.entries:
        a, b = values[f"{path}.A"], values[f"{path}.B"]
        gaps += [(m - torch.eye(12)).norm() for m in (a @ a.T, b.T @ b)]
    gaps = torch.stack(gaps)
    expected = 0.3 * (gaps.mean() if form == "mean-norm" else gaps.square().sum())
    loss = lorry.auxiliary_loss(model, "default")
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert adapter.entries["layers.0.up"].tensors()["A"].grad is not None
    adapter.train(False)
    assert lorry.auxiliary_loss(model) is None


def test_budget_falls_to_the_target_and_stays():
    model, total = stack(), 12
    method = lorry.AdaLoRA(initial_rank=6, target_rank=2, warmup=2, final=3)
    adapter = lorry.attach(model, method)
    counts = []

    def after(step):
        finish_step(adapter, step, total)
        counts.append(sum(int(e.tensors()["kept"].sum()) for e in adapter.entries.values()))

    train(model, adapter, total, after=after)
    assert counts[:2] == [24, 24] and counts[8:] == [8] * 4
    assert counts == sorted(counts, reverse=True)
    assert [method.budget(s, total, 4) for s in range(3, 10)] == counts[2:9]
    for entry in adapter.entries.values():
        assert not entry.tensors()["E"][~entry.tensors()["kept"]].any()


def test_allocation_same_as_peft():
    from peft import AdaLoraConfig

    total = 8
    names = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    config = AdaLoraConfig(
        init_r=5,
        target_r=2,
        lora_alpha=5,
        tinit=1,
        tfinal=2,
        deltaT=2,
        total_step=total,
        orth_reg_weight=0.5,
        target_modules=["up", "down"],
    )
    model, peer = stack(), peft_model(stack(), config)
    adapter = lorry.attach(model, lorry.AdaLoRA(initial_rank=5, target_rank=2, warmup=1, final=2, interval=2))
    for path in adapter.entries:
        layer = peer.base_model.model.get_submodule(path)
        values = {f"{path}.{n}": getattr(layer, p)["default"].detach() for n, p in names.items()}
        set_tensors(
            adapter,
            {k: v.reshape(dict((n, t.shape) for n, t, _ in adapter.named_tensors())[k]) for k, v in values.items()},
        )
    x, target = batch(16), batch(16, seed=9)
    assert torch.allclose(model(x), peer(x), atol=1e-4)
    theirs = [p for p in peer.parameters() if p.requires_grad]
    mine, other = torch.optim.SGD(adapter.parameters(), lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    for step in range(1, total + 1):
        for m, o in ((model, mine), (peer, other)):
            (m(x) - target).square().mean().backward()
            o.step()
        finish_step(adapter, step, total)
        peer.base_model.update_and_allocate(step)
        mine.zero_grad(), other.zero_grad()
        for path, entry in adapter.entries.items():
            e = peer.base_model.model.get_submodule(path).lora_E["default"].detach().view(-1)
            assert torch.allclose(entry.tensors()["E"], e, atol=1e-4), step
    assert sum(int((e.tensors()["E"] != 0).sum()) for e in adapter.entries.values()) == 8


def test_state_is_saved_so_that_training_goes_on_the_same(tmp_path):
    model, other = stack(), stack()
    adapter = lorry.attach(model, lorry.AdaLoRA(initial_rank=4, target_rank=2))
    train(model, adapter, 4, after=lambda s: finish_step(adapter, s, 12))
    adapter.save(tmp_path / "a")
    loaded = lorry.load(other, tmp_path / "a", trainable=True)
    for m, a in ((model, adapter), (other, loaded)):
        train(m, a, 4, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), after=lambda s, a=a: finish_step(a, s + 4, 12))
    assert all(torch.allclose(v, copies(loaded)[k], atol=1e-6) for k, v in copies(adapter).items())


def test_bad_options():
    with pytest.raises(lorry.OptionError, match="at most initial_rank 4, found 5"):
        lorry.AdaLoRA(initial_rank=4, target_rank=5)
    with pytest.raises(lorry.SiteError, match="initial_rank must be at most 16, found 17"):
        lorry.attach(stack(), lorry.AdaLoRA(initial_rank=17))
