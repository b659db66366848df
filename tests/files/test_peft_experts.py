"""Adapters of models with experts, from the real PEFT and to it: what it moves, fuses and looks up by parameter."""

import copy
import json

import pytest
import torch
from files.tiny_models import close, mixtral, output, peft_folder, stir, through_peft
from torch import nn

import lorry

SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
BANKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    experts = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, num_key_value_heads=1)).eval()


def deepseek() -> nn.Module:
    """A dense layer, and a layer of experts beside shared ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(4)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1)
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    more = dict(moe_intermediate_size=12, first_k_dense_replace=1, num_key_value_heads=2)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **experts, **heads, **more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(weight.shape[-1]))
    return model


MODELS = {"mixtral": (mixtral, ["q_proj"]), "qwen3-moe": (qwen, ["q_proj"]), "deepseek": (deepseek, ["o_proj"])}
PATTERNS = {
    "alpha": dict(alpha_pattern={"experts.down_proj": 12}),
    "rank": dict(rank_pattern={"experts.gate_up_proj": 4}),
    "both, by layer": dict(rank_pattern={"gate_up_proj": 3}, alpha_pattern={r"1\.mlp\.experts\.down_proj": 7}),
    "a pattern of the module, which is none of the parameter": dict(alpha_pattern={"experts": 50}, rank_pattern={}),
}


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_rank_and_alpha_of_a_parameter_are_looked_up_by_its_name(name, patterns, tmp_path):
    make, modules = MODELS[name]
    base = make()
    bare = output(base)
    config = dict(r=2, lora_alpha=4, target_modules=modules, target_parameters=BANKS)
    wanted = peft_folder(base, tmp_path / "theirs", **config, **PATTERNS[patterns])
    adapter = lorry.load(base, tmp_path / "theirs")
    close(output(base), wanted)
    assert not torch.allclose(wanted, bare, atol=1e-3)
    adapter.save(tmp_path / "ours", format="peft")
    close(through_peft(make(), tmp_path / "ours"), wanted)


FUSED = {
    "mixtral": (mixtral, ["q_proj", "w1", "w2", "w3"]),
    "qwen3-moe": (qwen, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "deepseek": (deepseek, ["o_proj", "gate_proj", "up_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_adapters_that_peft_moves_to_fused_experts(name, tmp_path):
    make, modules = FUSED[name]
    base = make()
    wanted = peft_folder(base, tmp_path / "theirs", r=2, lora_alpha=6, target_modules=modules)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert "gate_up_proj" in config["target_parameters"] and 4 in config["rank_pattern"].values()
    adapter = lorry.load(base, tmp_path / "theirs")
    close(output(base), wanted)
    adapter.fuse()
    close(output(base), wanted)


def test_a_weight_of_a_layer_as_a_parameter(tmp_path):
    base = qwen()
    config = dict(target_parameters=["q_proj.weight"], alpha_pattern={"q_proj.weight": 9}, rank_pattern={"q_proj": 5})
    wanted = peft_folder(base, tmp_path / "theirs", r=2, lora_alpha=4, target_modules=["v_proj"], **config)
    lorry.load(base, tmp_path / "theirs")
    close(output(base), wanted)


@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("targets", ["all-linear", ["all-linear", "experts"], ["down_proj", "o_proj"], "all"])
def test_dense_layers_beside_experts_reach_peft(targets, layers, tmp_path):
    base = deepseek()
    method = {"method": "lora", "rank": 2, "alpha": 3, "dropout": 0.1}
    own = {"mlp*.gate_proj": {"alpha": 5}} if isinstance(targets, str) else None
    adapter = stir(lorry.attach(base, method, targets=targets, layers=layers, site_options=own))
    base.eval()
    receipt = adapter.save(tmp_path / "a", format="peft")
    close(through_peft(deepseek(), tmp_path / "a"), output(base))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    moved = [p for p in adapter.entries if p.endswith(("mlp.down_proj", "shared_experts.down_proj"))]
    if moved:
        assert config["lora_dropout"] == 0 and any("dropout 0.1" in note for note in receipt.notes)


def test_what_peft_has_nothing_for_beside_experts_is_said(tmp_path):
    base = deepseek()
    adapter = stir(lorry.attach(base, {"method": "dora", "rank": 2}, targets="all-linear"))
    with pytest.raises(lorry.CheckpointError, match="takes 'model.layers.0.mlp.gate_proj' for experts"):
        adapter.save(tmp_path / "a", format="peft")
    assert any("for experts" in note for note in adapter.save(tmp_path / "a").notes)
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    other = deepseek()
    lorry.load(other, tmp_path / "a")
    close(output(other), output(base))


def test_without_its_model_such_an_adapter_is_not_written_for_peft(tmp_path):
    base = deepseek()
    stir(lorry.attach(base, {"method": "lora", "rank": 2}, targets="all-linear")).save(tmp_path / "a", format="lorry")
    with lorry.open(tmp_path / "a") as file, pytest.raises(lorry.LorryError, match="only beside the model"):
        file.save(tmp_path / "b", format="peft")


def test_layers_that_peft_refuses_are_not_written_for_it(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    bare = copy.deepcopy(base)
    adapter = stir(lorry.attach(base, {"method": "lora", "rank": 2}, targets=["in_proj", "out_proj"]))
    with pytest.raises(lorry.CheckpointError, match="PEFT refuses '.*out_proj' in models of the type mamba"):
        adapter.save(tmp_path / "a", format="peft")
    adapter.detach()
    stir(lorry.attach(base, {"method": "lora", "rank": 2}, targets=["in_proj"])).save(tmp_path / "a", format="peft")
    close(through_peft(bare, tmp_path / "a"), output(base))
