import pytest
import torch
from methods.small import batch, peft_model, scatter_trained, set_tensors, stack

import lorry


def test_identity_at_start_and_full_rank():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.HiRA(rank=2))
    assert torch.equal(model(x), before)
    assert {int(torch.linalg.matrix_rank(d)) for _, d in scatter_trained(adapter).deltas()} == {16}


def test_weight_of_ones_makes_a_lora():
    x, models = batch(), [stack(), stack()]
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.fill_(1)
    hira = scatter_trained(lorry.attach(models[0], lorry.HiRA(rank=2, alpha=3.0)))
    lora = lorry.attach(models[1], lorry.LoRA(rank=2, alpha=3.0))
    set_tensors(lora, {n: t.detach() for n, t, _ in hira.named_tensors()})
    assert torch.allclose(models[0](x), models[1](x), rtol=1e-4, atol=1e-4)


def test_merge_uses_the_unmerged_weight_and_unmerge_restores_it():
    x, model = batch(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.HiRA(rank=3)))
    output, before = model(x), model.layers[0]["up"].weight.clone()
    adapter.fuse()
    assert torch.allclose(model(x), output, atol=1e-5)
    adapter.unfuse()
    assert torch.equal(model.layers[0]["up"].weight, before) and torch.equal(model(x), output)


def test_same_as_peft():
    from peft import HiraConfig

    x, model = batch(), stack()
    peer = peft_model(stack(), HiraConfig(r=3, target_modules=["up", "down"]))
    adapter = lorry.attach(model, lorry.HiRA(rank=3))
    for path in adapter.entries:
        layer = peer.base_model.model.get_submodule(path)
        set_tensors(adapter, {f"{path}.{n}": getattr(layer, f"hira_{n}")["default"].detach() for n in "AB"})
    assert torch.allclose(model(x), peer(x), atol=1e-5)


def test_rank_above_the_width():
    with pytest.raises(lorry.SiteError, match="at most 16, found 17"):
        lorry.attach(stack(), lorry.HiRA(rank=17))
