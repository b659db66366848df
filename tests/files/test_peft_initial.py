"""Adapters of the real PEFT whose start by data changed the base, with what was saved of them before training."""

import copy
import json

import pytest
import torch
from files.tiny_models import IDS, close, llama, output, stir_peft, through_peft

import lorry
from lorry.formats.peft_initial import with_initial


def trained(start, base, folder, **options):
    """Save an adapter of PEFT's before and after training; return its output after."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    model = copy.deepcopy(base)
    common = dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=start, **options)

    def run():
        for row in IDS.split(1):  # PEFT's CorDA takes one row at a time
            loss = model(input_ids=row, labels=row).loss
            if start == "lora_ga":
                loss.backward()

    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        config = LoraConfig(**common, corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(model, config, run_model=run)
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        config = LoraConfig(**common, lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, run)
    peer = get_peft_model(model, config)
    peer.save_pretrained(str(folder / "before"))
    wanted = output(stir_peft(peer))
    peer.save_pretrained(str(folder / "after"))
    return wanted


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_two_folders_make_a_plain_lora_of_twice_the_rank(start, rslora, tmp_path):
    base = llama()
    wanted = trained(
        start, base, tmp_path, use_rslora=rslora, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 7}
    )
    with pytest.raises(lorry.CheckpointError, match=f"{start}.*with_initial"):
        lorry.load(base, tmp_path / "after")
    receipt = with_initial(tmp_path / "after", tmp_path / "before", tmp_path / "plain")
    assert receipt.sites == 6
    adapter = lorry.load(base, tmp_path / "plain")
    close(output(base), wanted)
    assert {entry.method.rank for entry in adapter.entries.values()} == {4, 6}
    close(through_peft(llama(), tmp_path / "plain"), wanted)


def test_folders_that_do_not_belong_together_are_refused(tmp_path):
    base = llama()
    trained("corda", base, tmp_path / "a")
    trained("corda", base, tmp_path / "b", rank_pattern={"down_proj": 2})
    with pytest.raises(lorry.CheckpointError, match="not the adapter of.*rank_pattern.*before its first step"):
        with_initial(tmp_path / "a" / "after", tmp_path / "b" / "before", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(lorry.CheckpointError, match="no folder of PEFT's"):
        with_initial(tmp_path / "a" / "after", tmp_path / "a", tmp_path / "c")


def test_loftq_is_refused_with_what_to_do(tmp_path):
    base = llama()
    trained("corda", base, tmp_path)
    file = tmp_path / "after" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "init_lora_weights": "loftq"}))
    with pytest.raises(lorry.CheckpointError, match="loftq.*quantised.*save the base too"):
        lorry.load(base, tmp_path / "after")
    with pytest.raises(lorry.CheckpointError, match="loftq.*did not take a product"):
        with_initial(tmp_path / "after", tmp_path / "before", tmp_path / "c")
    file.write_text(json.dumps({**values, "init_lora_weights": True}))
    assert torch.isfinite(output(base)).all() and lorry.load(base, tmp_path / "after").receipt.sites == 6
