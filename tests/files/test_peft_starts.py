"""Adapters of the real PEFT whose start changed the base weight, saved unconverted."""

import copy

import pytest
import torch
from files.tiny_models import close, llama, output, peft_folder
from torch import nn

import lorry

STARTS = ["pissa", "olora"]


def bert(cls: str = "BertForSequenceClassification", **changes) -> nn.Module:
    import transformers

    torch.manual_seed(6)
    sizes = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return getattr(transformers, cls)(transformers.BertConfig(**sizes, **changes)).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_a_layer_narrower_than_the_rank(start, rslora, tmp_path):
    base = bert(num_labels=2)
    config = dict(r=8, lora_alpha=12, use_rslora=rslora, init_lora_weights=start)
    wanted = peft_folder(base, tmp_path / "a", target_modules=["query", "classifier"], **config)
    before = output(base)
    adapter = lorry.load(base, tmp_path / "a")
    assert adapter.entries["classifier"].tensors()["A"].shape == (2, 16)
    close(output(base), wanted)
    assert not torch.allclose(wanted, before, atol=1e-4)
    adapter.save(tmp_path / "b")
    other = bert(num_labels=2)
    lorry.load(other, tmp_path / "b")
    close(output(other), wanted)


@pytest.mark.parametrize("start", STARTS)
def test_embeddings_have_no_start(start, tmp_path):
    base = llama(tie_word_embeddings=True)
    wanted = peft_folder(base, tmp_path / "a", r=4, init_lora_weights=start, target_modules=["q_proj", "embed_tokens"])
    lorry.load(base, tmp_path / "a")
    close(output(base), wanted)


@pytest.mark.parametrize("start", STARTS)
def test_a_base_weight_that_peft_saved_along_lacks_the_start(start, tmp_path):
    base = llama()
    wanted = peft_folder(base, tmp_path / "a", r=4, init_lora_weights=start, target_modules=["q_proj", "lm_head"])
    adapter = lorry.load(base, tmp_path / "a")
    close(output(base), wanted)
    assert any("lm_head" in note and "equals" in note for note in adapter.receipt.notes)
    other = llama(seed=1)
    with pytest.raises(lorry.CheckpointError, match="another base weight for 'lm_head'"):
        lorry.load(other, tmp_path / "a")
    assert not lorry.adapters(other)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "make, target",
    [(lambda: bert("BertForMaskedLM"), "decoder"), (lambda: llama(tie_word_embeddings=True), "lm_head")],
)
def test_a_start_on_a_tied_weight_is_refused(make, target, start, tmp_path):
    base = make()
    before = output(base)
    peft_folder(base, tmp_path / "a", r=4, init_lora_weights=start, target_modules=[target])
    with pytest.raises(lorry.CheckpointError, match=f"{target}.*shares.*tie_word_embeddings=False"):
        lorry.load(base, tmp_path / "a")
    assert torch.equal(output(base), before)


def test_a_start_by_a_randomised_decomposition_is_refused_unconverted_and_loads_converted(tmp_path):
    from files.tiny_models import stir_peft
    from peft import LoraConfig, get_peft_model

    base = llama()
    config = LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=["q_proj", "down_proj"])
    peer = get_peft_model(copy.deepcopy(base), config)
    peer.peft_config["default"].init_lora_weights = True
    peer.save_pretrained(str(tmp_path / "start"))
    peer.peft_config["default"].init_lora_weights = "pissa_niter_4"
    wanted = output(stir_peft(peer))
    peer.save_pretrained(str(tmp_path / "raw"))
    peer.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(lorry.CheckpointError, match="randomised SVD.*path_initial_model_for_weight_conversion"):
        lorry.load(base, tmp_path / "raw")
    lorry.load(base, tmp_path / "done")
    close(output(base), wanted)
