import pytest
import torch
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train

import lorry


def test_one_block_is_lora():
    models = stack(), stack()
    small = lorry.attach(models[0], lorry.MELoRA(rank=4, blocks=1))
    lora = lorry.attach(models[1], lorry.LoRA(rank=4))
    set_tensors(lora, {k: v[0] for k, v in copies(small).items()})
    assert train(models[0], small, 4) == pytest.approx(train(models[1], lora, 4), rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_count_and_rank(blocks):
    adapter = scatter_trained(lorry.attach(stack(), lorry.MELoRA(rank=8, blocks=blocks)))
    assert adapter.count() == lorry.plan(stack(), lorry.LoRA(rank=8)).trained // blocks
    assert {int(torch.linalg.matrix_rank(d)) for _, d in adapter.deltas()} == {8}


def test_delta_is_block_diagonal():
    adapter = scatter_trained(lorry.attach(stack(), lorry.MELoRA(rank=4, blocks=2, alpha=8.0)))
    for entry in adapter.entries.values():
        a, b = entry.tensors()["A"], entry.tensors()["B"]
        assert torch.allclose(entry.delta(), 2 * torch.block_diag(*(b @ a)), atol=1e-6)


def test_identity_at_start_and_merge():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.MELoRA())
    assert torch.equal(model(x), before)
    output = (scatter_trained(adapter), model(x))[1]
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)


def test_blocks_that_do_not_divide():
    with pytest.raises(lorry.OptionError, match="rank 8 and blocks 3"):
        lorry.MELoRA(blocks=3)
    with pytest.raises(lorry.SiteError, match="must divide both"):
        lorry.attach(stack(1, 15), lorry.MELoRA())
