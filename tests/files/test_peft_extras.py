"""What PEFT keeps beside a LoRA's factors (biases, rows of embeddings, norms), and its tuners of these alone."""

import copy
import json

import peft
import pytest
import torch
from core.tiny import snapshot, unchanged
from files.tiny_models import Attention, gpt2, llama, mixtral, output, stir_peft, unet
from safetensors.torch import load_file, save_file

import lorry

LINEAR = ["q_proj", "v_proj", "down_proj"]
BANKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def biased():
    return llama(attention_bias=True)


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(6)
    sizes = dict(hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2, vocab_size=48)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4)
    heads |= dict(qk_nope_head_dim=4, v_head_dim=8)
    routes = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **routes, first_k_dense_replace=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def tied():
    return llama(tie_word_embeddings=True)


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": LINEAR, **options})


#: name: (base, config)
CASES = {
    "lora_only": (biased, lambda: lora(bias="lora_only")),
    "all": (biased, lambda: lora(bias="all")),
    "all, dora": (biased, lambda: lora(bias="all", use_dora=True)),
    "all, norms with biases": (gpt2, lambda: lora(bias="all", target_modules=["c_attn"])),
    "all, convolutions": (unet, lambda: lora(bias="all", target_modules=["conv1", "to_q", "to_out.0"])),
    "lora_bias": (biased, lambda: lora(lora_bias=True, use_rslora=True)),
    "lora_bias, convolutions": (unet, lambda: lora(lora_bias=True, target_modules=["conv1", "to_q"])),
    "lora_bias and all": (biased, lambda: lora(lora_bias=True, bias="all")),
    "tokens": (biased, lambda: lora(trainable_token_indices=[40, 3, 7])),
    "tokens, tied": (tied, lambda: lora(trainable_token_indices=[3, 40])),
    "tokens, tied, by name": (tied, lambda: lora(trainable_token_indices={"embed_tokens": [3, 40]})),
    "tokens of both ends": (biased, lambda: lora(trainable_token_indices={"lm_head": [9, 5], "embed_tokens": [3]})),
    "tokens and biases": (biased, lambda: lora(trainable_token_indices=[5], bias="all")),
    "ends of names saved": (llama, lambda: lora(modules_to_save=["norm"])),
    "patterns of parameters": (
        mixtral,
        lambda: lora(
            target_modules=[],
            target_parameters=BANKS,
            rank_pattern={"experts.gate_up_proj": 4},
            alpha_pattern={"experts.down_proj": 9},
        ),
    ),
    "a router": (mixtral, lambda: lora(target_modules=[], target_parameters=["mlp.gate.weight"])),
    "a router and banks": (
        deepseek,
        lambda: lora(
            target_modules=["o_proj"], target_parameters=["mlp.gate.weight", *BANKS], rank_pattern={"gate.weight": 3}
        ),
    ),
    "norm tuning": (gpt2, lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "norm tuning, head saved": (
        llama,
        lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"], modules_to_save=["lm_head"]),
    ),
    "token tuning": (llama, lambda: peft.TrainableTokensConfig(token_indices=[40, 3])),
    "token tuning, tied": (tied, lambda: peft.TrainableTokensConfig(token_indices=[3, 40])),
}


#: transformers multiplies banks of experts in single precision only.
SINGLE = ("patterns of parameters", "a router", "a router and banks")


def base(case):
    model = CASES[case][0]()
    return model if case in SINGLE else model.double()


def written(case, folder):
    """Save a stirred adapter of the real PEFT's; return base and output."""
    torch.manual_seed(0)
    model = base(case)
    peer = stir_peft(peft.get_peft_model(copy.deepcopy(model), CASES[case][1]()))
    peer = peer if case in SINGLE else peer.double()
    peer.save_pretrained(str(folder))
    return model, output(peer)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_does_trains_merges_and_survives_saving(case, tmp_path):
    model, wanted = written(case, tmp_path / "theirs")
    bare, before = output(model), snapshot(model)
    assert (wanted - bare).abs().max() > 1e-4, "the adapter does nothing"
    exact = 1e-5 if case in SINGLE else 1e-10
    adapter = lorry.load(model, tmp_path / "theirs", name="it", dtype=None if case in SINGLE else torch.float64)
    torch.testing.assert_close(output(model), wanted, atol=exact, rtol=exact)
    adapter.save(tmp_path / "ours")
    other = base(case)
    lorry.load(other, tmp_path / "ours")
    torch.testing.assert_close(output(other), output(model), atol=exact, rtol=exact)
    if any(entry.method.fusing == "never" for entry in adapter.entries.values()):
        with pytest.raises(lorry.AdapterError, match="cannot be fused: Full"):
            adapter.fuse()
    else:
        adapter.fuse()
        torch.testing.assert_close(output(model), wanted, atol=exact, rtol=exact)
        adapter.unfuse()
    adapter.train()
    assert adapter.trainable
    adapter.detach()
    assert unchanged(model, before) and torch.equal(output(model), bare)


def test_rows_of_a_batch_have_their_own_biases_and_tokens(tmp_path):
    model, wanted = written("tokens and biases", tmp_path)
    bare = output(model)
    lorry.load(model, tmp_path, name="it", dtype=torch.float64)
    with lorry.rows(model, ["it", None]):
        mixed = output(model)
    torch.testing.assert_close(mixed[:1], wanted[:1], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(mixed[1:], bare[1:], atol=1e-10, rtol=1e-10)


def test_without_the_model_nothing_is_said_of_what_depends_on_it(tmp_path):
    written("all", tmp_path)
    with lorry.open(tmp_path) as file:
        with pytest.raises(lorry.AdapterError, match="only the base tells"):
            file.delta("model.layers.0.self_attn.q_proj")
        with pytest.raises(lorry.AdapterError, match="Load it and save the adapter"):
            file.save(tmp_path / "copy")


def test_an_update_of_a_bias_is_not_dropped_by_what_works_on_weights(tmp_path):
    model, _ = written("all", tmp_path / "theirs")
    adapter = lorry.load(model, tmp_path / "theirs", name="it")
    adapter.save(tmp_path / "ours")
    with (
        lorry.open(tmp_path / "ours") as file,
        pytest.raises(lorry.AdapterError, match="changes the bias.*serve it beside"),
    ):
        file.delta("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "case, damage, message",
    [
        ("tokens", "trainable_tokens", "names trained tokens, but holds no rows"),
        ("all", "layers.1.self_attn.q_proj.base_layer.bias", "lacks that of 'model.layers.1.self_attn.q_proj'"),
        ("lora_bias", "layers.1.self_attn.q_proj.lora_B.bias", "lacks lora_bias"),
        ("token tuning", "trainable_tokens", "holds no"),
    ],
)
def test_a_file_that_lacks_them_is_refused(case, damage, message, tmp_path):
    model, _ = written(case, tmp_path)
    before = snapshot(model)
    place = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(place).items() if damage not in k} or {"x": torch.ones(1)}, place)
    with pytest.raises(lorry.CheckpointError, match=message):
        lorry.load(model, tmp_path)
    assert unchanged(model, before)


@pytest.mark.parametrize("tokens", [[48, 3], [3, 3], [-1, 3], [3], "3", {"embed_tokens": 3}])
def test_tokens_that_do_not_fit_are_refused(tokens, tmp_path):
    model, _ = written("tokens, tied", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": tokens}))
    with pytest.raises(lorry.LorryError):
        lorry.load(model, tmp_path)
    assert not lorry.adapters(model)


def test_biases_of_packed_attention_and_rows_under_an_adapted_head_are_refused_with_what_to_do(tmp_path):
    peer = peft.get_peft_model(Attention(), lora(target_modules=["attn"], bias="all"))
    stir_peft(peer).save_pretrained(str(tmp_path / "packed"))
    with pytest.raises(lorry.CheckpointError, match="has no bias that an adapter could carry.*merge_and_unload"):
        lorry.load(Attention(), tmp_path / "packed")
    both = lora(target_modules=["lm_head"], trainable_token_indices=[3])
    stir_peft(peft.get_peft_model(tied(), both)).save_pretrained(str(tmp_path / "head"))
    with pytest.raises(lorry.CheckpointError, match="another adapter sits on 'lm_head'.*merge_and_unload"):
        lorry.load(tied(), tmp_path / "head")
