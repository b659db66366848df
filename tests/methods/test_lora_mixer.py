"""The checks of LoRA-Mixer's definition, and of mixtures made from adapters that exist."""

import math

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, same_bytes, tokens, unchanged
from torch import nn

import lorry
from lorry.merging.mixture import from_adapters
from lorry.methods.lora_mixer import LoRAMixer


def layer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    adapter = lorry.attach(model, LoRAMixer(**{"experts": 4, "rank": 3, "shared_router": False, **options}))
    return model, adapter, adapter.entries["0"].tensors()


def inputs(rows=12):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(2))


def base(model, x):
    return F.linear(x, model[0].weight, model[0].bias)


def deltas(model, tensors, x, rank=3):
    """What each expert adds, ``(rows, experts, out)``."""
    return torch.stack(
        [x @ a.T @ b.T for a, b in zip(tensors["A"].split(rank), tensors["B"].split(rank, 1), strict=True)], 1
    )


@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_identity_at_the_start_for_any_router(mode):
    model, adapter, tensors = layer(training_mode=mode, inference_mode=mode)
    with torch.no_grad():
        tensors["router"].normal_()
    assert torch.equal(model(inputs()), base(model, inputs()))
    assert adapter.count() == 4 * 3 * (24 + 20) + 4 * 24


def test_modes_are_those_of_the_definition():
    model, adapter, tensors = layer(alpha=6.0)
    off_zero(adapter, std=0.4)
    x = inputs()
    p = (x @ tensors["router"].T).softmax(-1)
    each = 2.0 * deltas(model, tensors, x)
    kept = torch.zeros_like(p).scatter(1, p.topk(3).indices, p.topk(3).values)
    tasks = torch.arange(12) % 4
    gates = {
        ("soft", False): p,
        ("sparse", False): kept,
        ("sparse", True): kept / kept.sum(1, keepdim=True),
        ("hard", False): F.one_hot(tasks, 4).float(),
    }
    for (mode, renormalized), gate in gates.items():
        adapter.configure(training_mode=mode, inference_mode=mode, renormalize_topk=renormalized)
        expected = base(model, x) + (gate.unsqueeze(-1) * each).sum(1)
        for training in (True, False):
            model.train(training)
            with lorry.context(model, task_ids=tasks):
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_sparse_with_all_kept_is_soft():
    model, adapter, _ = layer(top_k=4)
    off_zero(adapter)
    x = inputs()
    assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_one_expert_is_a_lora_in_every_mode_and_merges(mode):
    model, adapter, tensors = layer(experts=1, top_k=1, alpha=6.0, training_mode=mode, inference_mode=mode)
    off_zero(adapter)
    expected = base(model, inputs()) + 2.0 * inputs() @ tensors["A"].T @ tensors["B"].T
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(inputs()), expected)
    adapter.fuse()
    torch.testing.assert_close(model(inputs()), expected, atol=1e-5, rtol=1e-5)


def test_permuting_experts_with_their_router_rows_changes_nothing():
    model, adapter, tensors = layer()
    off_zero(adapter, std=0.4)
    before = model(inputs()).detach()
    order = torch.tensor([2, 0, 3, 1])
    ranks = (order[:, None] * 3 + torch.arange(3)).flatten()
    with torch.no_grad():
        tensors["A"].copy_(tensors["A"][ranks].clone())
        tensors["B"].copy_(tensors["B"][:, ranks].clone())
        tensors["router"].copy_(tensors["router"][order].clone())
    torch.testing.assert_close(model(inputs()).detach(), before)


def test_queries_keys_and_values_share_a_router_and_its_loss():
    model = llama()
    adapter = lorry.attach(model, LoRAMixer(rank=2), targets="attention")
    assert set(adapter.shared.specs) == {
        f"model.layers.{i}.self_attn.{n}.router" for i in (0, 1) for n in ("qkv", "o_proj")
    }
    model.train()
    with lorry.context(model) as context:
        model(tokens())
    assert len(context.losses) == 4
    assert adapter.count() == sum(4 * 2 * (s.out_features + s.in_features) for s in adapter.sites) + 4 * 4 * 64
    apart = lorry.attach(llama(), LoRAMixer(rank=2, shared_router=False), targets="attention")
    assert apart.shared is None


@pytest.mark.parametrize(("sign", "entropy"), [("paper_formula", math.log(6)), ("specialise", 0.0)])
def test_the_sign_of_the_entropy_decides_between_flat_and_selective(sign, entropy):
    """The printed loss makes routing flat, against its text; the other sign makes it selective."""
    method = LoRAMixer(experts=6, load_balance=1.0, entropy=0.1, entropy_sign=sign)
    logits = torch.randn(256, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        method.loss(logits.softmax(-1), None).backward()
        optimizer.step()
    p = logits.detach().softmax(-1)
    assert float(torch.special.entr(p).sum(1).mean()) == pytest.approx(entropy, abs=0.05)
    assert 0.13 < float(p.mean(0).min()) and float(p.mean(0).max()) < 0.21


@pytest.mark.parametrize("load", ["top1", "mass"])
def test_the_loss_is_the_formula(load):
    method = LoRAMixer(load_balance=0.7, entropy=0.3, load=load, top_k=2)
    p = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    if load == "top1":
        f = F.one_hot(p.argmax(1), 4).float().mean(0)
    else:
        best = torch.zeros_like(p).scatter(1, p.topk(2).indices, p.topk(2).values)
        f = best.sum(0) / best.sum()
    expected = 0.7 * (p.mean(0) * f).sum() + 0.3 * torch.special.entr(p).sum(1).mean()
    torch.testing.assert_close(method.loss(p, None), expected)
    even = torch.eye(4)
    assert LoRAMixer(load_balance=1.0, entropy=0.0).loss(even, None) == pytest.approx(1 / 4)


def test_preserved_experts_have_the_gradient_of_the_penalty():
    model, adapter, tensors = layer(preserve=0.5, load_balance=0.0, entropy=0.0)
    off_zero(adapter)
    model.train()
    model(inputs())
    lorry.auxiliary_loss(model).backward()
    for name in ("A", "B"):
        torch.testing.assert_close(tensors[name].grad, 2 * 0.5 * (tensors[name] - tensors[f"{name}0"]).detach())
    assert not any(n.endswith("0") for n, _ in adapter.named_parameters())


def test_a_large_penalty_holds_experts_at_their_start():
    distances = []
    for preserve in (0.0, 50.0):
        model, adapter, tensors = layer(preserve=preserve or 1e-9, load_balance=0.0, entropy=0.0)
        start = {n: tensors[n].detach().clone() for n in ("A", "B")}
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.005)
        model.train()
        for _ in range(50):
            optimizer.zero_grad()
            (model(inputs()).square().sum() + lorry.auxiliary_loss(model)).backward()
            optimizer.step()
        distances.append(sum(float((tensors[n].detach() - start[n]).norm()) for n in start))
    assert distances[1] < 0.2 * distances[0]


def test_labels_train_their_own_expert_alone():
    model, adapter, tensors = layer(training_mode="hard")
    off_zero(adapter)
    model.train()
    with lorry.context(model, task_ids=torch.tensor([2] * 12)):
        model(inputs()).square().sum().backward()
        assert lorry.auxiliary_loss(model) is None
    used = tensors["A"].grad.abs().sum(1) > 0
    assert used.tolist() == [False] * 6 + [True] * 3 + [False] * 3
    with pytest.raises(lorry.AdapterError, match="found none"):
        model(inputs())
    with (
        pytest.raises(lorry.AdapterError, match=r"below 4.*found \[4\]"),
        lorry.context(model, task_ids=torch.full((12,), 4)),
    ):
        model(inputs())


@pytest.fixture
def files(tmp_path):
    """Two LoRAs of different ranks and scales, as files; one in PEFT's form."""
    model = llama()
    for seed, (name, rank, alpha) in enumerate((("math", 2, 6), ("story", 4, 4))):
        adapter = lorry.attach(model, {"method": "lora", "rank": rank, "alpha": alpha}, targets="attention", name=name)
        off_zero(adapter, seed=seed, std=0.2).save(tmp_path / name)
    return tmp_path


def test_experts_from_files_stay_untouched(files):
    paths = [files / "math", files / "story"]
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    model = llama()
    base_state = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = from_adapters(model, "lora-mixer", paths, name="mix")
    assert list(lorry.adapters(model)) == ["mix"] and adapter.metadata["experts"] == [str(p) for p in paths]
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"router"}
    twin = llama()
    sources = [lorry.load(twin, p) for p in paths]

    def experts_are_those_of_the_files():
        for path, entry in adapter.entries.items():
            tensors = entry.tensors()
            for source, a, b, scale in zip(
                sources,
                tensors["A"].split([2, 4]),
                tensors["B"].split([2, 4], 1),
                tensors["scales"],
                strict=True,
            ):
                own = source.entries[path]
                assert same_bytes(a, own.tensors()["A"]) and torch.equal(b, own.tensors()["B"])
                assert float(scale) == own.method.scale(own.site)

    experts_are_those_of_the_files()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    routers = [p.detach().clone() for p in adapter.parameters()]
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (model(tokens(), labels=tokens()).loss + lorry.auxiliary_loss(model)).backward()
        optimizer.step()
    assert all(not torch.equal(p, r) for p, r in zip(adapter.parameters(), routers, strict=True))
    experts_are_those_of_the_files()
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before
    adapter.detach()
    assert unchanged(model, base_state)


def test_a_router_that_takes_one_expert_is_that_lora(files):
    model = llama()
    lorry.load(model, files / "story", name="story")
    expected = model(tokens()).logits.detach()
    adapter = from_adapters(model, LoRAMixer(), [files / "math", "story"], name="mix")
    adapter.configure(training_mode="hard", inference_mode="hard")
    with lorry.context(model, task_ids=torch.ones(3, dtype=torch.long)):
        torch.testing.assert_close(model(tokens()).logits.detach(), expected, atol=1e-5, rtol=1e-5)
    assert adapter.method.top_k == 2 and adapter.method.sizes == (2, 4)


def test_experts_that_do_not_fit_are_refused(files):
    model = llama()
    lorry.attach(model, "lora", targets="q_proj", name="narrow")
    lorry.attach(model, "dora", targets="attention", name="dora")
    before = set(lorry.adapters(model))
    for experts, rule in (
        (["narrow", files / "math"], "same sites"),
        (["dora"], "not a product of two factors"),
        (["math"], "neither an adapter"),
        ([], "at least one"),
    ):
        with pytest.raises(lorry.AdapterError, match=rule):
            from_adapters(model, "lora-mixer", experts, name="mix")
        assert set(lorry.adapters(model)) == before
    with pytest.raises(lorry.AdapterError, match="cannot be made from other adapters"):
        from_adapters(model, "smora", [files / "math"], name="mix")


class Recurrence(nn.Module):
    """A toy linear recurrence: no attention, an input and an output projection."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        state, outputs = torch.zeros(x.shape[0], 16), []
        for step in self.in_proj(x).unbind(1):
            state = 0.9 * state + step
            outputs.append(state)
        return self.out_proj(torch.stack(outputs, 1))


def test_works_in_a_state_space_block():
    torch.manual_seed(0)
    model = nn.Sequential(Recurrence())
    x = torch.randn(2, 5, 8)
    before = model(x).detach()
    adapter = lorry.attach(model, LoRAMixer(rank=2), targets=["in_proj", "out_proj"])
    assert torch.equal(model(x), before)
    off_zero(adapter)
    (model.train()(x).sum() + lorry.auxiliary_loss(model)).backward()
    assert all(g.any() for g in gradients(adapter).values())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"experts": 2}, "top_k=3 and experts=2"),
        ({"ranks": (1, 2)}, "4 positive numbers"),
        ({"preserve": 0.1, "train_experts": False}, "needs train_experts=True"),
        ({"training_mode": "best"}, "must be one of"),
    ],
)
def test_bad_options(options, rule):
    with pytest.raises(lorry.OptionError, match=rule):
        LoRAMixer(**options)
