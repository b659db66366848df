"""Opening adapters without a model, and saving from sharded training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files.tiny_models import llama, mixtral, output, peft_folder, stir, unet

import lorry
from lorry import open as open_adapter


@pytest.mark.parametrize("format", ["auto", "lorry"])
@pytest.mark.parametrize(
    "make, method, options",
    [
        (
            llama,
            lorry.LoRA(rank=4),
            dict(targets=["q_proj", "v_proj"], site_options={"v_proj": {"rank": 2}}, train_also=["lm_head"]),
        ),
        (llama, lorry.PiSSA(rank=2), dict(targets=["embed_tokens"])),
        (mixtral, lorry.LoRA(rank=2), dict(targets="experts")),
        (unet, lorry.DoRA(rank=2), dict(targets=["conv1", "to_q"])),
    ],
)
def test_info_says_what_the_adapter_says(format, make, method, options, tmp_path):
    adapter = stir(lorry.attach(make(), method, name="it", **options))
    adapter.metadata["parent"] = "someone"
    adapter.save(tmp_path / "a", format=format)
    info = open_adapter(tmp_path / "a")
    assert (info.format, info.name, info.method) == ("lorry", "it", adapter.method)
    assert info.metadata == adapter.metadata and info.base == adapter.fingerprint.base
    assert info.fingerprint is not None and info.fingerprint.digest == adapter.fingerprint.digest
    assert list(info.sites) == list(adapter.entries)
    for path, entry in adapter.entries.items():
        assert info.sites[path].method == entry.method and info.sites[path].shape == entry.site.shape
        mine, theirs = entry.home.tensors(), info.tensors(path)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    with pytest.raises(lorry.CheckpointError, match="has no site 'nowhere'"):
        info.tensors("nowhere")


def test_info_of_pefts_folder(tmp_path):
    peft_folder(
        llama(),
        tmp_path / "a",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"1.self_attn.q_proj": 2},
    )
    info = open_adapter(tmp_path / "a")
    first = "model.layers.0.self_attn.q_proj"
    assert info.format == "peft" and info.fingerprint is None and info.method == lorry.LoRA(rank=4, alpha=6)
    assert info.ranks == {first: 4, first.replace("0", "1"): 2, first.replace("0", "2"): 4}
    assert info.tensors(first)["A"].shape == (4, 16) and info.tensors("lm_head")["weight"].shape == (48, 16)


def test_one_site_is_read_without_the_others(tmp_path):
    adapter = stir(lorry.attach(llama(), lorry.LoRA(rank=4), targets=["q_proj"]))
    adapter.save(tmp_path / "a")
    info = open_adapter(tmp_path / "a")
    file = info.path / "adapter_model.safetensors"
    key = info.sites["model.layers.0.self_attn.q_proj"].keys["A"]
    end = info.file.places[key].end + file.stat().st_size - max(p.end for p in info.file.places.values())
    os.truncate(file, end)  # everything behind this tensor is gone, and it is not missed
    wanted = dict((n, t) for n, t, _ in adapter.named_tensors())["model.layers.0.self_attn.q_proj.A"]
    assert torch.equal(info.read(key), wanted)


_SHARDED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
import lorry
from files.tiny_models import llama, stir
model = llama()
adapter = stir(lorry.attach(model, lorry.DoRA(rank=3), targets=["q_proj", "down_proj"]))
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(t, DTensor) for _, t, _ in adapter.named_tensors())
receipt = adapter.save(f"{folder}/a")
assert os.path.isfile(f"{folder}/a/lorry.json")
print(receipt.notes)
dist.destroy_process_group()
"""


def test_sharded_training_gathers_before_it_writes(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SHARDED, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert "first process" in results[1][0] and "first process" not in results[0][0]
    model, twin = llama(), llama()
    lorry.load(model, tmp_path / "a")
    stir(lorry.attach(twin, lorry.DoRA(rank=3), targets=["q_proj", "down_proj"]))
    assert torch.equal(output(model), output(twin))


def test_an_empty_tensor_is_never_written(tmp_path):
    model = llama()
    adapter = lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj"])
    adapter.train(False)
    next(iter(adapter.entries.values())).home.replace("A", torch.empty(0))
    with pytest.raises(lorry.CheckpointError, match="1 empty tensors of 6.*every process must call save"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_loading_many_walks_no_module_tree(tmp_path, monkeypatch):
    adapter = lorry.attach(llama(), lorry.LoRA(rank=2), targets="all-linear")
    adapter.save(tmp_path / "a")
    model = llama()
    lorry.load(model, tmp_path / "a", name="first")

    def walked(*args, **kwargs):
        raise AssertionError("the module tree was walked")

    monkeypatch.setattr(torch.nn.Module, "named_modules", walked)
    monkeypatch.setattr(torch.nn.Module, "named_parameters", walked)
    assert lorry.load(model, tmp_path / "a", name="second").receipt.sites == 21
    (tmp_path / "a" / "lorry.json").unlink()
    assert lorry.load(model, tmp_path / "a", name="third").receipt.sites == 21
