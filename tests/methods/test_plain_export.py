"""What is exactly a plain LoRA is exported as one: our loader and peft give the same outputs from the folder."""

from __future__ import annotations

import pytest
import torch
from methods.small import batch, scatter_trained, stack

import lorry
from lorry.formats.export import export_plain
from lorry.methods.parts.nested import cut

EXACT = [
    {"method": "uni-lora"},
    {"method": "mos", "private": 1},
    {"method": "block-lora", "rank": 4},
    {"method": "block-lora", "rank": 4, "partition": "input"},
    {"method": "matryoshka-lora", "rank": 8},
    {"method": "vera", "rank": 12},
    {"method": "melora", "rank": 4},
    {"method": "lora-fa", "rank": 4},
    {"method": "mos-lora", "rank": 4},
    {"method": "lora-xs", "rank": 4},
    {"method": "olora", "rank": 4},
    {"method": "adalora", "initial_rank": 4, "target_rank": 2},
]


@pytest.mark.parametrize("options", EXACT, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_exported_exactly(options, tmp_path):
    from peft import PeftModel

    x, model = batch(), stack(3)
    adapter = scatter_trained(lorry.attach(model, options))
    receipt = export_plain(adapter, tmp_path / "a")
    assert receipt.relative_error == 0
    other = stack(3)
    loaded = lorry.load(other, tmp_path / "a")
    assert isinstance(loaded.method, lorry.LoRA)
    assert torch.allclose(other(x), model(x), atol=1e-4)
    peer = PeftModel.from_pretrained(stack(3), tmp_path / "a").eval()
    assert torch.allclose(peer(x), model(x), atol=1e-4)


@pytest.mark.parametrize("rule", ["P", "rank"])
def test_matryoshka_is_exported_at_its_cut(rule, tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = scatter_trained(lorry.attach(model, lorry.Matryoshka(rank=8, scaling="sqrt")))
    cut(adapter, 3, rule)
    export_plain(adapter, tmp_path / "a")
    loaded = lorry.load(other, tmp_path / "a")
    assert loaded.method.rank == 3
    assert torch.allclose(other(x), model(x), atol=1e-5)


@pytest.mark.parametrize("slug", ["shira", "loha", "lokr", "hira"])
def test_weight_deltas_need_a_rank_and_say_their_error(slug, tmp_path):
    x, model, other = batch(), stack(), stack()
    adapter = scatter_trained(lorry.attach(model, {"method": slug, **({} if slug == "shira" else {"rank": 2})}))
    with pytest.raises(lorry.AdapterError, match="rank"):
        export_plain(adapter, tmp_path / "a")
    receipt = export_plain(adapter, tmp_path / "a", rank=16)
    assert receipt.relative_error < 1e-5
    lorry.load(other, tmp_path / "a")
    assert torch.allclose(other(x), model(x), atol=1e-4)
    assert export_plain(adapter, tmp_path / "b", rank=1).relative_error > 0.01
