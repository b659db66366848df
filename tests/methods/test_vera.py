import pytest
import torch
from methods.small import batch, copies, peft_model, round_trip, scatter_trained, set_tensors, stack, train

import lorry


def test_identity_at_start_and_count():
    x, model = batch(), stack()
    before = model(x)
    adapter = lorry.attach(model, lorry.VeRA(rank=32))
    assert torch.equal(model(x), before)
    assert adapter.count() == 2 * (24 + 32) + 2 * (16 + 32)


def test_projections_are_shared_and_frozen():
    model = stack()
    adapter = lorry.attach(model, lorry.VeRA(rank=5))
    before = copies(adapter)
    train(model, adapter, 3)
    after = copies(adapter)
    assert after["shared.projection_A"].shape == (5, 24) and after["shared.projection_B"].shape == (24, 5)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("shared.")


@pytest.mark.parametrize("saved", [False, True])
def test_round_trip_with_projections_drawn_again_or_saved(saved, tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.VeRA(rank=64, save_projection=saved), seed=5))
    loaded = round_trip(adapter, other, tmp_path / "a")
    assert all(torch.equal(v, copies(loaded)[k]) for k, v in copies(adapter).items())
    assert torch.equal(model(x), other(x))
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert (size > 64 * 48 * 4) == saved


def test_absorbed_vectors_make_a_lora():
    x, model, plain = batch(), stack(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.VeRA(rank=6)))
    lora = lorry.attach(plain, lorry.LoRA(rank=6))
    for path, entry in adapter.entries.items():
        a, b = (f.detach() for f in entry.method.factors(entry.tensors(), entry.site))
        set_tensors(lora, {f"{path}.A": a, f"{path}.B": b})
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_same_as_peft():
    from peft import VeraConfig

    x, model = batch(), stack()
    peer = peft_model(stack(), VeraConfig(r=7, target_modules=["up", "down"]))
    adapter = lorry.attach(model, lorry.VeRA(rank=7))
    base = peer.base_model
    set_tensors(
        adapter,
        {"shared.projection_A": base.vera_A["default"], "shared.projection_B": base.vera_B["default"]},
    )
    for path in adapter.entries:
        layer = base.model.get_submodule(path)
        vectors = {f"{path}.lambda_{n}": getattr(layer, f"vera_lambda_{n}")["default"].detach() for n in "bd"}
        set_tensors(adapter, vectors)
    assert torch.allclose(model(x), peer(x), atol=1e-5)


def test_bad_options():
    with pytest.raises(lorry.OptionError, match="rank"):
        lorry.VeRA(rank=0)
