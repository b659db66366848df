"""Convolutions of the real PEFT's: equal outputs, or refused where its forward is no update of the weight."""

import copy
from collections import OrderedDict

import peft
import pytest
import torch
from files.tiny_models import close, stir_peft
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lorry

LAYERS = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 12, 3, stride=2),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "circular without a border": lambda: nn.Conv2d(8, 8, 3, padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(8, 12, 1, groups=1, dilation=2),
    "sequence": lambda: nn.Conv1d(8, 12, 3),
    "grouped sequence": lambda: nn.Conv1d(8, 8, 4, groups=2),
    "weight norm, grouped": lambda: weight_norm(nn.Conv1d(8, 8, 4, groups=2), dim=2),
}
TUNERS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["conv"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["conv"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["conv"]),
    "lokr": lambda: peft.LoKrConfig(r=1, target_modules=["conv"]),
    "lokr, dense": lambda: peft.LoKrConfig(r=9, target_modules=["conv"]),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=["conv"]),
}
#: What PEFT's own forward runs as something else than one update of the weight, and what it says instead.
REFUSED = {
    **{(tuner, layer): "groups" for tuner in ("lora", "dora") for layer in LAYERS if "grouped" in layer},
    **{(tuner, "dilated"): "dilation" for tuner in ("lora", "dora")},
    **{(tuner, "circular"): "mode 'circular'" for tuner in TUNERS},
    **{("lokr, dense", layer): "another update.*peft_tuners" for layer in LAYERS if "sequence" in layer},
    ("lokr, dense", "weight norm, grouped"): "another update",
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_convolution_is_equal_or_refused(layer, tuner, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(conv=LAYERS[layer]())).eval()
    x = torch.randn(2, 8, 9) if isinstance(base.conv, nn.Conv1d) else torch.randn(2, 8, 9, 9)
    try:
        peer = stir_peft(peft.get_peft_model(copy.deepcopy(base), TUNERS[tuner]()))
        wanted = peer(x).detach()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        pytest.skip(f"PEFT cannot make it: {error}")
    peer.save_pretrained(str(tmp_path / "a"))
    before = base(x).detach()
    if (tuner, layer) in REFUSED:
        with pytest.raises(lorry.CheckpointError, match=REFUSED[tuner, layer]):
            lorry.load(base, tmp_path / "a")
        assert torch.equal(base(x), before) and not lorry.adapters(base)
        return
    adapter = lorry.load(base, tmp_path / "a")
    close(base(x), wanted)
    assert not torch.allclose(wanted, before, atol=1e-4)
    if "norm" in layer:
        for keep in (True, False):
            with pytest.raises(lorry.AdapterError, match="weight norm.*remove_parametrizations"):
                adapter.fuse(keep=keep)
    else:
        adapter.fuse()
    close(base(x), wanted)
    adapter.detach()
    assert torch.equal(base(x), before)
