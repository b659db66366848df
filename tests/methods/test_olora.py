import torch
from methods.small import batch, round_trip, scatter_trained, set_tensors, stack

import lorry


def test_identity_at_start_and_base_untouched():
    x, model = batch(), stack()
    before, weight = model(x), model.layers[0]["up"].weight.clone()
    adapter = lorry.attach(model, lorry.OLoRA(rank=4))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert torch.equal(model.layers[0]["up"].weight, weight)
    b = adapter.entries["layers.0.up"].tensors()["B"]
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)
    assert adapter.count() == lorry.plan(stack(), lorry.LoRA(rank=4)).trained


def test_same_start_and_same_output_as_peft():
    from peft import LoraConfig, get_peft_model

    x, model = batch(), stack()
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["up", "down"])
    peer = get_peft_model(stack(), config).eval()
    adapter = lorry.attach(model, lorry.OLoRA(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    for path, entry in adapter.entries.items():
        layer = peer.base_model.model.get_submodule(path)
        for name, weight in (("A", layer.lora_A["default"].weight), ("B", layer.lora_B["default"].weight)):
            assert torch.allclose(entry.tensors()[name], weight, atol=1e-5)
            moved = weight.detach() + 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data.copy_(moved)
            set_tensors(adapter, {f"{path}.{name}": moved})
    assert torch.allclose(model(x), peer(x), atol=1e-4)


def test_round_trip_keeps_the_offset(tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.OLoRA(rank=4)))
    round_trip(adapter, other, tmp_path / "a")
    assert torch.allclose(model(x), other(x), atol=1e-6)
