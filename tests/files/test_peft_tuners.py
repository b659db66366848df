"""Folders that the real PEFT writes for tuners beside LoRA: the same output in float64, and the whole life after."""

import copy

import peft
import pytest
import torch
from core.tiny import snapshot, unchanged
from files.tiny_models import llama, output, stir_peft, unet

import lorry

ALL = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
EVEN = ["q_proj", "o_proj"]
CONVS = ["conv1", "to_q", "conv_shortcut"]
#: name: (config, whether the base is a U-Net)
CASES = {
    "ia3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]),
    "ia3, convolutions": lambda: peft.IA3Config(target_modules=CONVS, feedforward_modules=["conv_shortcut"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ALL),
    "oft, exact and shared": lambda: peft.OFTConfig(
        r=2, oft_block_size=0, use_cayley_neumann=False, block_share=True, target_modules=ALL
    ),
    "oft, constrained": lambda: peft.OFTConfig(r=4, oft_block_size=0, coft=True, eps=0.05, target_modules=ALL),
    "oft, three terms": lambda: peft.OFTConfig(r=4, oft_block_size=0, num_cayley_neumann_terms=3, target_modules=ALL),
    "oft, two terms": lambda: peft.OFTConfig(r=4, oft_block_size=0, num_cayley_neumann_terms=2, target_modules=ALL),
    "oft, pointwise convolutions": lambda: peft.OFTConfig(
        r=2, oft_block_size=0, target_modules=["to_q", "conv_shortcut"]
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft, by number": lambda: peft.BOFTConfig(boft_block_num=2, boft_block_size=0, target_modules=ALL),
    "boft, convolutions": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=CONVS),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=ALL),
    "hra, odd": lambda: peft.HRAConfig(r=3, target_modules=ALL),
    "hra, orthogonal": lambda: peft.HRAConfig(r=3, apply_GS=True, target_modules=ALL),
    "hra, convolutions": lambda: peft.HRAConfig(r=2, target_modules=CONVS),
    "delora": lambda: peft.DeloraConfig(r=3, delora_lambda=5, target_modules=ALL, rank_pattern={"q_proj": 2}),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=7, target_modules=ALL),
    "randlora, drawn again": lambda: peft.RandLoraConfig(r=3, save_projection=False, target_modules=ALL),
    "miss": lambda: peft.MissConfig(r=5, target_modules=ALL),
    "miss, mini": lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=EVEN),
    "bat": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=ALL),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=ALL),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, scaling=9.0, target_modules=ALL),
    "loha, head saved": lambda: peft.LoHaConfig(r=2, target_modules=ALL, modules_to_save=["lm_head", "norm"]),
    "vera, head saved": lambda: peft.VeraConfig(r=3, target_modules=ALL, modules_to_save=["lm_head"]),
    "ia3, norms saved": lambda: peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["input_layernorm"]
    ),
}
#: PEFT computes these, or a part of them, in float32 whatever the model is.
SINGLE = ("c3a", "fourierft", "oft, constrained")


def base(case: str) -> torch.nn.Module:
    return (unet() if "convolutions" in case else llama(attention_bias=True, num_key_value_heads=2)).double()


@pytest.mark.parametrize("case", CASES)
def test_a_tuner_computes_what_peft_does_merges_and_survives_saving(case, tmp_path):
    torch.manual_seed(0)
    model = base(case)
    bare, before = output(model), snapshot(model)
    peer = stir_peft(peft.get_peft_model(copy.deepcopy(model), CASES[case]())).double()
    wanted = output(peer)
    assert (wanted - bare).abs().max() > 1e-4, "the adapter does nothing"
    peer.save_pretrained(str(tmp_path / "theirs"))
    adapter = lorry.load(model, tmp_path / "theirs", name="it", dtype=torch.float64)
    exact = 1e-5 if case.startswith(SINGLE) else 1e-10
    torch.testing.assert_close(output(model), wanted, atol=exact, rtol=exact)
    found = output(model)
    adapter.save(tmp_path / "ours")
    other = base(case)
    lorry.load(other, tmp_path / "ours")
    torch.testing.assert_close(output(other), found, atol=1e-12, rtol=1e-12)
    if "saved" not in case:
        adapter.fuse()
        torch.testing.assert_close(output(model), found, atol=1e-10, rtol=1e-10)
        adapter.unfuse()
    adapter.train()
    loss = model(**inputs(case)) if "convolutions" in case else model(torch.arange(6)[None]).logits
    (loss.sample if hasattr(loss, "sample") else loss).square().sum().backward()
    lacking = [n for n, p in adapter.named_parameters() if p.grad is None]
    assert not lacking
    adapter.detach()
    assert unchanged(model, before) and torch.equal(output(model), bare)


def inputs(case: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return {
        "sample": torch.randn(1, 4, 8, 8, **draw),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 8, **draw),
    }
