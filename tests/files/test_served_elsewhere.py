"""Files for llama.cpp, Ollama and vLLM, checked by the gguf package's own reader and by PEFT."""

import json

import pytest
import torch
from files.tiny_models import close, llama, output
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lorry
from lorry import open as open_adapter
from lorry.core.errors import AdapterError, CheckpointError, OptionError
from lorry.formats.gguf import FAMILIES, interleaved_rows
from lorry.formats.uses import Exported, commands
from lorry.formats.vllm import RANKS

gguf = pytest.importorskip("gguf")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]


def trained(model: nn.Module, method="lora", targets=ALL, seed=5, **options) -> lorry.Adapter:
    """An adapter whose tensors all hold something."""
    adapter = lorry.attach(model, {"method": method, "rank": 3, **options}, targets=targets, name="mine", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def read(path):
    """Tensors and metadata of a GGUF file, by the package's reader."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        data = torch.from_numpy(t.data.copy())
        tensors[t.name] = data.view(torch.bfloat16) if t.tensor_type == gguf.GGMLQuantizationType.BF16 else data
    return tensors, {k: f.contents() for k, f in reader.fields.items()}


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A weight of q or k as llama.cpp keeps it, row by row."""
    size = weight.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in range(2)]
    return weight[order]


def base_name(name: str) -> str:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3).get_name(name)


def test_every_update_is_there_in_llama_cpps_layout(tmp_path):
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    adapter = trained(model, alpha=6.0)
    receipt = adapter.save(tmp_path / "a.gguf", format="gguf")
    tensors, facts = read(tmp_path / "a.gguf")
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == "llama" and facts["adapter.lora.alpha"] == 6.0
    assert receipt.tensors_applied == len(tensors) == 2 * len(adapter.entries)
    for path, delta in ((site.path, delta) for site, delta in adapter.deltas()):
        a, b = (tensors[f"{base_name(path)}.weight.lora_{x}"] for x in "ab")
        if path.endswith("embed_tokens"):
            assert a.shape == (48, 3)  # a row for each token
            a = a.mT
        found = (6.0 / b.shape[1]) * (b.double() @ a.double())
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        wanted = delta.double() if heads is None else neighbours(delta.double(), heads)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_the_order_of_rows_is_that_of_interleaved_rotation():
    """Scores of q and k with halves rotated equal those of the reordered rows with neighbours rotated."""
    generator = torch.Generator().manual_seed(0)
    heads, size, length = 3, 8, 5
    x = torch.randn(length, 16, generator=generator, dtype=torch.float64)
    wq, wk = (torch.randn(heads * size, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.outer(torch.arange(length).double(), 0.1 ** torch.arange(size // 2).double())

    def split(rows):
        return rows.view(length, heads, size).transpose(0, 1)[None]

    both = torch.cat([angle, angle], -1)[None]
    q, k = apply_rotary_pos_emb(split(x @ wq.T), split(x @ wk.T), both.cos(), both.sin())

    def turned(w):
        pairs = torch.view_as_complex(split(x @ interleaved_rows(w, heads).T).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    torch.testing.assert_close(turned(wq) @ turned(wk).mT, q @ k.mT)


def test_qwen_keeps_its_rows(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    adapter = trained(Qwen3ForCausalLM(config), targets=["q_proj"])
    adapter.save(tmp_path / "a.gguf", format="gguf")
    tensors, facts = read(tmp_path / "a.gguf")
    assert facts["general.architecture"] == "qwen3"
    b = dict(adapter.named_parameters())["model.layers.0.self_attn.q_proj.B"]
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], b)


def test_families_are_known_to_the_package():
    assert all(f.architecture in gguf.MODEL_ARCH.__members__ for f in FAMILIES.values())


def test_scales_that_differ_go_into_b(tmp_path):
    model = llama()
    adapter = lorry.attach(
        model, {"method": "lora", "rank": 4, "alpha": 8.0}, targets=["v_proj", "up_proj", "down_proj"], name="mine",
        site_options={"*.down_proj": {"rank": 2, "alpha": 3.0}},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    adapter.save(tmp_path / "a.gguf", format="gguf")
    adapter.save(tmp_path / "v", format="vllm")
    tensors, facts = read(tmp_path / "a.gguf")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    elsewhere = open_adapter(tmp_path / "v")
    for path, delta in ((site.path, delta) for site, delta in adapter.deltas()):
        a, b = (tensors[f"{base_name(path)}.weight.lora_{x}"] for x in "ab")
        found = facts["adapter.lora.alpha"] / a.shape[0] * (b.double() @ a.double())
        torch.testing.assert_close(found, delta.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(elsewhere.delta(path), delta.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types(tmp_path, dtype):
    adapter = trained(llama(), targets=["v_proj"])
    adapter.save(tmp_path / "a.gguf", format="gguf", dtype=dtype)
    tensors, _ = read(tmp_path / "a.gguf")
    b = dict(adapter.named_parameters())["model.layers.1.self_attn.v_proj.B"]
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_b"], b.detach().to(getattr(torch, dtype)))


def test_an_opened_file_needs_the_config_alone(tmp_path):
    model = llama()
    adapter = trained(model)
    adapter.save(tmp_path / "folder")
    adapter.save(tmp_path / "a.gguf", format="gguf")
    with pytest.raises(CheckpointError, match="needs the config of the base"):
        open_adapter(tmp_path / "folder").save(tmp_path / "b.gguf", format="gguf")
    open_adapter(tmp_path / "folder").save(tmp_path / "b.gguf", format="gguf", config=model.config)
    assert all(torch.equal(t, read(tmp_path / "b.gguf")[0][n]) for n, t in read(tmp_path / "a.gguf")[0].items())


def test_other_updates_are_approximated_with_the_error_said(tmp_path):
    adapter = trained(llama(), method="dora", targets=["v_proj"])
    for form, name in (("gguf", "a.gguf"), ("vllm", "v")):
        with pytest.raises(AdapterError, match="rank"):
            adapter.save(tmp_path / name, format=form)
        assert 0 < adapter.save(tmp_path / name, format=form, rank=4).relative_error < 1


@pytest.mark.parametrize("form, name", [("gguf", "a.gguf"), ("ollama", "o"), ("vllm", "v")])
def test_what_they_cannot_hold_is_refused_and_nothing_written(tmp_path, form, name):
    model = llama()
    options = {"model": "llama3"} if form == "ollama" else {}
    whole = lorry.attach(model, {"method": "lora", "rank": 2}, targets=["v_proj"], name="w", train_also=["model.norm"])
    with pytest.raises(CheckpointError, match=r"trained whole.*[Ff]use"):
        whole.save(tmp_path / name, format=form, **options)
    gated = lorry.attach(model, "flylora", targets=["up_proj"], name="g")
    with pytest.raises(AdapterError, match="input"):
        gated.save(tmp_path / name, format=form, **options)
    assert not list(tmp_path.iterdir())


def test_llama_cpp_refuses_by_name(tmp_path):
    from files.tiny_models import gpt2

    with pytest.raises(CheckpointError, match="GPT2LMHeadModel.*LlamaForCausalLM"):
        trained(gpt2(), targets=["c_attn"]).save(tmp_path / "a.gguf", format="gguf")
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head"):
        trained(tied, targets=["lm_head"]).save(tmp_path / "a.gguf", format="gguf")
    adapter = trained(llama(), targets=["v_proj"])
    with pytest.raises(CheckpointError, match=r"\.gguf"):
        adapter.save(tmp_path / "a.bin", format="gguf")
    with pytest.raises(OptionError, match="float16"):
        adapter.save(tmp_path / "a.gguf", format="gguf", dtype="float61")
    other = {**llama().config.to_dict(), "num_hidden_layers": 1}
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        adapter.save(tmp_path / "a.gguf", format="gguf", config=other)
    assert not list(tmp_path.iterdir())


def test_ollama_gets_a_modelfile_beside_the_adapter(tmp_path):
    adapter = trained(llama())
    with pytest.raises(CheckpointError, match="FROM|base"):
        adapter.save(tmp_path / "o", format="ollama")
    adapter.save(tmp_path / "o", format="ollama", model="llama3.2")
    assert (tmp_path / "o" / "Modelfile").read_text() == "FROM llama3.2\nADAPTER ./adapter.gguf\n"
    adapter.save(tmp_path / "a.gguf", format="gguf")
    assert (tmp_path / "o" / "adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    lines = commands("ollama", Exported(tmp_path / "o", "base", "mine"))
    assert lines[0] == f"ollama create mine -f {tmp_path / 'o' / 'Modelfile'}"


def test_a_folder_for_vllm_does_the_same_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    adapter = trained(model, targets=["q_proj", "down_proj"], rank_stabilized=True)
    expected = output(model)
    adapter.save(tmp_path / "v", format="vllm")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not {"use_dora", "modules_to_save", "init_lora_weights"} & config.keys()
    close(output(peft.PeftModel.from_pretrained(llama(), tmp_path / "v").eval()), expected)
    line = commands("vllm", Exported(tmp_path / "v", "base", "mine"))[0]
    assert "--max-lora-rank 8" in line and f"mine={tmp_path / 'v'}" in line


def test_vllm_refuses_a_rank_above_its_own(tmp_path):
    adapter = trained(llama(), targets=["v_proj"], rank=8)
    with pytest.raises(CheckpointError, match=r"ranks up to 4.*rank 8.*resize\(4\)"):
        adapter.save(tmp_path / "v", format="vllm", max_rank=4)
    assert adapter.save(tmp_path / "v", format="vllm", max_rank=RANKS[1]).tensors_applied == 6
