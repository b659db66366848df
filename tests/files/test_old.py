"""Folders that earlier versions wrote (format 1, without checksums) still load, and damage in them is noticed."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lorry

OLD = Path(__file__).parent / "old"


class Tower(nn.Module):
    """The base that the folders were made for; its weights are written down, not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 8, bias=False)
        self.down = nn.Linear(8, 6, bias=False)
        self.naïve = nn.Linear(6, 3)
        with torch.no_grad():
            for number, (_, p) in enumerate(self.named_parameters()):
                p.copy_((torch.arange(p.numel()) * (number + 3) % 11 - 5).view(p.shape) / 8)

    def forward(self, x):
        h = self.encode(x)
        return self.naïve(h + self.down(torch.relu(self.up(h))))


#: First outputs for the tokens 0 to 6, as the version that wrote the folder gave them.
OUTPUTS = {
    "both": [-0.12052632123231888, 0.04634079337120056, -0.09732228517532349, -0.10648684203624725],
    "own": [-0.16634151339530945, 0.7571675777435303, -0.5563943386077881, -0.7230564951896667],
    "pool": [-0.08245468139648438, 0.800250232219696, -0.4798703193664551, -1.2643349170684814],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_folders_of_format_one_load(name):
    model = Tower()
    adapter = lorry.load(model, OLD / name, check_base=False)
    assert adapter.receipt.tensors_applied == adapter.receipt.tensors_total > 0 and adapter.name == name
    found = model(torch.arange(7)[None]).flatten()[:4]
    torch.testing.assert_close(found, torch.tensor(OUTPUTS[name]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_flipped_bit_in_them_is_noticed(name, tmp_path):
    shutil.copytree(OLD / name, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(lorry.CheckpointError, match="was changed after it was written"):
        lorry.load(Tower(), tmp_path / "a", check_base=False)


@pytest.mark.parametrize("format", ["auto", "lorry"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_they_are_written_anew_with_checksums(name, format, tmp_path):
    with lorry.open(OLD / name) as file:
        file.save(tmp_path / "a", format=format)
    model, again = Tower(), lorry.open(tmp_path / "a")
    lorry.load(model, OLD / name, check_base=False, name="old")
    assert list(again) == list(lorry.adapters(model)["old"].entries)
    again.load(model, name="new", check_base=False, activate=False)
    old, new = lorry.adapters(model).values()
    wanted = {n: t for n, t, _ in old.named_tensors()}
    assert all(torch.equal(t, wanted[n]) for n, t, _ in new.named_tensors()) and new.method == old.method
    path = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(lorry.CheckpointError, match="its checksum is not the one in the manifest"):
        lorry.load(Tower(), tmp_path / "a", check_base=False)
