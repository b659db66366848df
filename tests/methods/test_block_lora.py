import pytest
import torch
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train

import lorry


def pair(rank, blocks, **options):
    """A Block-LoRA and a LoRA of rank/blocks with the same scale, from the same start."""
    models = stack(), stack()
    block = lorry.attach(models[0], lorry.BlockLoRA(rank=rank, blocks=blocks, **options))
    scale = rank**0.5 / (rank // blocks) ** 0.5
    lora = lorry.attach(models[1], lorry.LoRA(rank=rank // blocks, alpha=1.0 / scale, rank_stabilized=True))
    set_tensors(lora, {k: v for k, v in copies(block).items() if k.endswith(".A")})
    return models, block, lora


def test_identity_at_start():
    x, model = batch(), stack()
    before = model(x)
    lorry.attach(model, lorry.BlockLoRA())
    assert torch.equal(model(x), before)
    other = stack()
    lorry.attach(other, lorry.BlockLoRA(b_std=0.1))
    assert torch.allclose(other(x), before, atol=1e-6)


@pytest.mark.parametrize("partition", ["rank", "input"])
@pytest.mark.parametrize(("rank", "blocks"), [(2, 2), (8, 4), (8, 1), (8, 8)])
def test_count(rank, blocks, partition):
    method = lorry.BlockLoRA(rank=rank, blocks=blocks, partition=partition)
    assert lorry.plan(stack(), method).trained == 2 * (rank * (24 + 16) + rank * (16 + 24) // blocks)


def test_one_block_is_lora():
    models, block, lora = pair(4, 1)
    x = batch()
    losses = [train(m, a, 4) for m, a in zip(models, (block, lora), strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(models[0](x), models[1](x), atol=1e-6)


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_sum_form_is_the_block_form(partition):
    adapter = scatter_trained(lorry.attach(stack(), lorry.BlockLoRA(rank=4, blocks=2, partition=partition)))
    entry = adapter.entries["layers.0.up"]
    a, b = entry.tensors()["A"], entry.tensors()["B"]
    if partition == "rank":
        whole = torch.cat(list(b), 1) @ torch.cat([a, a], 0)
    else:
        whole = b[0] @ torch.cat([a, a], 1)
    assert torch.allclose(entry.delta(), whole / 2, atol=1e-6)


def test_rank_of_the_two_readings():
    for partition, expected in (("rank", 2), ("input", 4)):
        adapter = scatter_trained(lorry.attach(stack(), lorry.BlockLoRA(rank=4, blocks=2, partition=partition)))
        assert {int(torch.linalg.matrix_rank(d)) for _, d in adapter.deltas()} == {expected}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_arms_stay_equal_and_train_as_lora_of_the_block_rank(kind):
    models, block, lora = pair(4, 2)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]
    rate = 0.05 if kind == "sgd" else 0.01

    def faster_b(parameters):
        named = dict(lora.named_parameters())
        groups = [[p for n, p in named.items() if n.endswith(f".{f}")] for f in "AB"]
        return make([{"params": groups[0]}, {"params": groups[1], "lr": 2 * rate}], lr=rate)

    first = train(models[0], block, 10, optimizer=lambda p: make(p, lr=rate))
    second = train(models[1], lora, 10, optimizer=faster_b)
    assert first == pytest.approx(second, rel=1e-5)
    arms = block.entries["layers.0.up"].tensors()["B"]
    assert torch.equal(arms[0], arms[1]) and arms.abs().sum() > 0


def test_merged_equals_unmerged():
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.BlockLoRA(rank=4, partition="input")))
    before = model(x)
    adapter.fuse()
    assert torch.allclose(model(x), before, atol=1e-5)


def test_bad_options():
    with pytest.raises(lorry.OptionError, match="blocks must divide rank, found rank 3 and blocks 2"):
        lorry.BlockLoRA(rank=3)
    with pytest.raises(lorry.OptionError, match="cancel"):
        lorry.BlockLoRA(b_std=0.1, partition="input")
    with pytest.raises(lorry.SiteError, match="blocks must divide"):
        lorry.attach(stack(), lorry.BlockLoRA(blocks=5, partition="input"))
