import pytest
import torch
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train
from torch import nn

import lorry

UP, DOWN = "layers.*.up[24x16]", "layers.*.down[16x24]"


def test_identity_at_start():
    x, model = batch(), stack()
    before = model(x)
    lorry.attach(model, lorry.MoS())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("rank", "private", "shards"), [(2, 0, 1), (8, 0, 4), (5, 1, 2), (2, 2, 8), (1, 1, 2)])
def test_count_is_that_of_the_budget(rank, private, shards):
    method = lorry.MoS(budget=2, rank=rank, private=private, shards=shards)
    assert lorry.plan(stack(4), method).trained == lorry.plan(stack(4), lorry.LoRA(rank=2)).trained


def test_count_at_llama_2_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008))
    assert lorry.plan(model, lorry.MoS(budget=2, rank=8, private=1)).trained == 4_997_120
    assert lorry.plan(model, lorry.MoS(budget=8, rank=16)).trained == 19_988_480


def test_built_by_explicit_concatenation():
    adapter = scatter_trained(lorry.attach(stack(3), lorry.MoS(budget=2, rank=4, private=1, shards=4)))
    pools = adapter.shared.tensors()
    for path, entry in adapter.entries.items():
        name = UP if path.endswith("up") else DOWN
        a, b = entry.method.factors(entry.tensors(), entry.site)
        for factor, built in (("A", a), ("B", b.T)):
            index = entry.tensors()[f"index_{factor}"]
            for t in range(4):
                rows = [pools[f"{name}.{factor}"][index[t * 4 + i]] for i in range(4)]
                assert torch.equal(built[t], torch.cat(rows))


def test_private_only_is_independent_loras():
    x = batch()
    model, plain = stack(3), stack(3)
    mos = scatter_trained(lorry.attach(model, lorry.MoS(budget=2, rank=2, private=2, shards=2)))
    lora = lorry.attach(plain, lorry.LoRA(rank=2))
    for path, entry in mos.entries.items():
        a, b = (f.detach() for f in entry.method.factors(entry.tensors(), entry.site))
        set_tensors(lora, {f"{path}.A": a, f"{path}.B": b})
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    seen = [set(e.tensors()["index_A"].tolist()) for p, e in mos.entries.items() if p.endswith("up")]
    assert not seen[0] & seen[1] and not seen[1] & seen[2]
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for number, path in enumerate(["layers.0.up", "layers.1.up", "layers.2.up"]):
        grad = mos.shared.tensors()[f"{UP}.A"].grad[number * 4 : number * 4 + 4].reshape(2, 16)
        assert torch.allclose(grad, lora.entries[path].tensors()["A"].grad, atol=1e-5)


def test_pure_sharing_gives_one_update_to_all():
    adapter = scatter_trained(lorry.attach(stack(3), lorry.MoS(budget=1, rank=3, shards=1, dissociated=False)))
    deltas = {site.path: delta for site, delta in adapter.deltas()}
    assert torch.allclose(deltas["layers.0.up"], deltas["layers.2.up"], atol=1e-6)
    entry = adapter.entries["layers.0.up"]
    assert "index_B" not in entry.tensors()
    entry.tensors()["index_A"].copy_(entry.tensors()["index_A"].flip(0))
    assert torch.allclose(entry.delta(), deltas["layers.0.up"], atol=1e-6)


class Square(nn.Module):
    """Blocks whose projections have equal shapes and names that differ in digits."""

    def __init__(self, names: tuple[str, ...], layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for _ in range(layers))


@pytest.mark.parametrize("names", [("w1", "w3"), ("fc1", "fc2"), ("wi_0", "wi_1"), ("0", "2")])
def test_only_numbers_of_layers_make_a_type(names):
    """Between projections nothing is shared, whatever digits their names have."""
    adapter = lorry.attach(Square(names), lorry.MoS(budget=2))
    pools = adapter.shared.tensors()
    assert len(pools) == 2 * len(names)
    assert all(len(p) == 2 * 3 * 4 for p in pools.values())
    scatter_trained(adapter)
    site = adapter.entries[f"layers.1.{names[0]}"]
    site.delta().sum().backward()
    used = {key for key, pool in pools.items() if pool.grad is not None and pool.grad.any()}
    assert len(used) == 2 and all(f".{names[0]}[" in key for key in used)


def test_layers_that_are_projections_themselves_share():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    assert set(lorry.attach(model, lorry.MoS(budget=2)).shared.tensors()) == {"*[8x8].A", "*[8x8].B"}


def test_rank_exceeds_the_budget():
    adapter = scatter_trained(lorry.attach(stack(4), lorry.MoS(budget=2, rank=8, shards=4)))
    assert {int(torch.linalg.matrix_rank(d)) for _, d in adapter.deltas()} == {8}


def test_public_rows_are_drawn_without_repetition():
    adapter = lorry.attach(stack(4), lorry.MoS(budget=2, rank=5, shards=4, private=1))
    for entry in adapter.entries.values():
        tensors = entry.tensors()
        public = tensors["index_A"][:16]
        assert len(set(public.tolist())) == 16 and int(public.max()) < 16
        assert not torch.equal(tensors["index_A"], tensors["index_B"])
        assert torch.equal(tensors["index_A"][16:], tensors["index_B"][16:])
        assert tensors["index_A"].dtype == torch.int64


def test_privacy():
    model = stack(2)
    adapter = lorry.attach(model, lorry.MoS(budget=2, rank=3, private=1, shards=1))
    scatter_trained(adapter)
    before = copies(adapter)[f"shared.{UP}.A"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model.layers[0]["up"](batch()).square().sum().backward()
    optimizer.step()
    after = copies(adapter)[f"shared.{UP}.A"]
    changed = (after != before).any(1)
    assert not changed[3] and changed[2] and changed[:2].any()


def test_indices_survive_casting_and_round_trip(tmp_path):
    x, model = batch(), stack(3)
    adapter = lorry.attach(model, lorry.MoS(private=1))
    train(model, adapter, 3)
    adapter.save(tmp_path / "a")
    other = stack(3)
    loaded = lorry.load(other, tmp_path / "a")
    assert all(torch.equal(v, copies(loaded)[k]) for k, v in copies(adapter).items())
    assert torch.equal(model(x), other(x))
    adapter.to(torch.bfloat16)
    assert adapter.entries["layers.0.up"].tensors()["index_A"].dtype == torch.int64


def test_merged_equals_unmerged():
    x, model = batch(), stack(3)
    adapter = scatter_trained(lorry.attach(model, lorry.MoS()))
    before = model(x)
    adapter.fuse()
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"private": 3}, "private must be at most"),
        ({"private": 2, "rank": 3}, "rank must be 2"),
        ({"alpha": 4.0}, "explicit rank"),
    ],
)
def test_options_that_contradict(options, words):
    with pytest.raises(lorry.OptionError, match=words):
        lorry.MoS(**options)


def test_sites_that_do_not_fit():
    with pytest.raises(lorry.SiteError, match="shards must divide"):
        lorry.attach(stack(), lorry.MoS(shards=5))
    with pytest.raises(lorry.SiteError, match="allow rank 3 at most"):
        lorry.attach(stack(2), lorry.MoS(budget=2, private=1, rank=4))
