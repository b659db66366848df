"""Folders that the real PEFT's other tuners write, loaded as Lorry's methods: same output."""

import json

import peft
import pytest
import torch
from methods.small import batch, peft_model, stack
from safetensors.torch import load_file, save_file
from torch import nn

import lorry
from lorry.formats import peft_native

TARGETS = ["up", "down"]
CONFIGS = {
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=TARGETS),
    "hira": peft.HiraConfig(r=3, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "loha by site": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, rank_pattern={"layers.0.up": 2}),
    "lokr": peft.LoKrConfig(r=1, alpha=4, target_modules=TARGETS),
    "lokr, both factored": peft.LoKrConfig(r=1, alpha=4, decompose_both=True, target_modules=TARGETS),
    "shira": peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=3),
    "uni-lora": peft.UniLoraConfig(r=3, theta_d_length=77, target_modules=TARGETS, unilora_dropout=0.0),
    "uni-lora, with indices": peft.UniLoraConfig(
        r=3, theta_d_length=77, target_modules=TARGETS, unilora_dropout=0.0, save_indices=True
    ),
    "vera": peft.VeraConfig(r=7, target_modules=TARGETS),
    "vera, drawn again": peft.VeraConfig(r=7, target_modules=TARGETS, save_projection=False),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_peft_gives_the_same_output_and_survives_saving(case, tmp_path):
    x, model = batch(), stack()
    before = model(x)
    peer = peft_model(stack(), CONFIGS[case])
    wanted = peer(x).detach()
    assert not torch.allclose(wanted, before, atol=1e-3)
    peer.save_pretrained(str(tmp_path / "theirs"))
    adapter = lorry.load(model, tmp_path / "theirs", name="it", check_base=case != "uni-lora")
    torch.testing.assert_close(model(x).detach(), wanted, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in adapter.parameters())
    adapter.save(tmp_path / "ours")
    other = stack()
    lorry.load(other, tmp_path / "ours")
    torch.testing.assert_close(other(x).detach(), wanted, atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert torch.equal(model(x), before)


def test_other_tuners_and_other_folders_are_refused_by_name(tmp_path):
    peft_model(stack(), peft.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(lorry.AdapterError, match="tuner LORA.*LOHA.*lorry.load"):
        peft_native.load(stack(), tmp_path / "lora")
    with pytest.raises(lorry.CheckpointError):
        peft_native.load(stack(), tmp_path)
    peft_model(stack(), CONFIGS["loha"]).save_pretrained(str(tmp_path / "loha"))
    with pytest.raises(lorry.CheckpointError, match="method 'loha', expected was 'lokr'"):
        lorry.load(stack(), tmp_path / "loha", expect="lokr")
    biased = peft.BOFTConfig(boft_block_size=4, target_modules=["up"], bias="boft_only")
    peft_model(stack(), biased).save_pretrained(str(tmp_path / "biased"))
    with pytest.raises(lorry.CheckpointError, match="bias='boft_only', which Lorry cannot carry for BOFT"):
        lorry.load(stack(), tmp_path / "biased")


@pytest.mark.parametrize("damage", ["missing", "surplus", "nan", "another base", "another tuner"])
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(damage, tmp_path):
    folder, model = tmp_path / "a", stack(layers=1) if damage == "another base" else stack()
    peft_model(stack(), CONFIGS["loha"]).save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    if damage == "missing":
        del tensors[first]
    elif damage == "surplus":
        tensors["base_model.model.layers.7.up.hada_w1_a"] = torch.ones(2, 2)
    elif damage == "nan":
        tensors[first] = tensors[first] * float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    if damage == "another tuner":
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "NOVEL"}))
    with pytest.raises(lorry.LorryError):
        lorry.load(model, folder)
    assert not lorry.adapters(model) and type(model.layers[0]["up"]) is nn.Linear


def test_an_adalora_whose_ranks_fell_in_training(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=8, tinit=1, tfinal=2, deltaT=1, total_step=10, target_modules=TARGETS
    )
    peer, x, target = peft_model(stack(), config).train(), batch(16), batch(16, seed=9)
    optimizer = torch.optim.Adam([p for p in peer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 11):
        (peer(x) - target).square().mean().backward()
        optimizer.step()
        peer.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    peer.eval().save_pretrained(str(tmp_path / "a"))
    model = stack()
    adapter = lorry.load(model, tmp_path / "a")
    assert sum(e.method.initial_rank for e in adapter.entries.values()) == 4 * 2
    torch.testing.assert_close(model(x), peer(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"layers": 1}, {"layers": 3}, {"width": 12}, {"inner": 20}])
def test_a_file_without_a_tensor_of_any_layer_is_loaded_onto_the_base_that_it_names_alone(sizes, tmp_path):
    peer = peft_model(stack(), CONFIGS["uni-lora"])
    peer.peft_config["default"].base_model_name_or_path = "small/stack"
    peer.save_pretrained(str(tmp_path / "a"))
    model = stack(**sizes)
    with pytest.raises(lorry.CheckpointError, match="any width and depth.*'small/stack'.*save_indices"):
        lorry.load(model, tmp_path / "a")
    assert not lorry.adapters(model)
    peft_model(stack(), CONFIGS["uni-lora, with indices"]).save_pretrained(str(tmp_path / "b"))
    if sizes:
        with pytest.raises(lorry.LorryError):
            lorry.load(model, tmp_path / "b")
        assert not lorry.adapters(model)
        return
    model.config = type("Config", (), {"_name_or_path": "small/stack"})()
    lorry.load(model, tmp_path / "a")
    torch.testing.assert_close(model(batch()), peer(batch()).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entry, value", [((0, 0), 10**6), ((0, 3), -1), ((1, 0), 10**6), ((1, 2), -1), ((1, 5), None)])
def test_positions_out_of_range_are_refused_in_loading(entry, value, tmp_path):
    peft_model(stack(), CONFIGS["shira"]).save_pretrained(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "shira_indices" in k)
    if value is None:  # the same place twice
        tensors[key][:, 5] = tensors[key][:, 4]
    else:
        tensors[key][entry] = value
    save_file(tensors, file)
    model = stack()
    with pytest.raises(lorry.CheckpointError, match="whole numbers|columns"):
        lorry.load(model, tmp_path / "a")
    assert not lorry.adapters(model) and type(model.layers[0]["up"]) is nn.Linear


@pytest.mark.parametrize("value", [10**6, -1])
@pytest.mark.parametrize(
    "method",
    [
        {"method": "shira"},
        {"method": "shira-dora", "rank": 2},
        {"method": "mos"},
        {"method": "uni-lora", "size": 77},
        {"method": "flylora", "rank": 4, "top_k": 2},
    ],
)
def test_positions_out_of_range_are_refused_in_our_own_folders(method, value, tmp_path):
    options = {**method, "save_indices": True} if method["method"] == "uni-lora" else method
    lorry.attach(stack(), options, targets="all-linear").save(tmp_path / "a")
    file = lorry.open(tmp_path / "a")
    path = next(iter(file))
    name = next(n for n, t in file.tensors(path).items() if t.dtype in (torch.int32, torch.int64))
    wrong = file.tensors(path)
    wrong[name] = wrong[name].clone()
    wrong[name].view(-1)[0] = value
    file.sites[path].values = wrong
    model = stack()
    with pytest.raises(lorry.CheckpointError, match="whole numbers from 0"):
        lorry.load(model, file)
    assert not lorry.adapters(model)
