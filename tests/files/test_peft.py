"""PEFT's folders, both ways, against the real PEFT."""

import copy
import json

import pytest
import torch
from files.tiny_models import (
    Attention,
    classifier,
    close,
    gpt2,
    llama,
    mixtral,
    output,
    peft_folder,
    stir,
    through_peft,
    unet,
)

import lorry
from lorry.formats.export import export_plain

pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FROM_PEFT = {
    "lora": (llama, dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])),
    "regex": (llama, dict(r=4, lora_alpha=8, target_modules=r".*layers\.[02]\..*(q|v)_proj")),
    "rslora": (llama, dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])),
    "dora": (llama, dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "up_proj"])),
    "dropout": (llama, dict(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj"])),
    "patterns": (
        llama,
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.1.self_attn.v_proj": 2, "q_proj": 6},
            alpha_pattern={r"layers\.[01]\..*q_proj": 3},
        ),
    ),
    "layers_to_transform": (llama, dict(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2])),
    "exclude": (
        llama,
        dict(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["1.self_attn.v_proj"]),
    ),
    "pissa": (
        llama,
        dict(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]),
    ),
    "olora": (
        llama,
        dict(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["q_proj", "up_proj"]),
    ),
    "embedding": (llama, dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"])),
    "embedding dora": (llama, dict(r=4, use_dora=True, target_modules=["embed_tokens"])),
    "saved embeddings": (llama, dict(r=4, target_modules=["v_proj"], save=dict(save_embedding_layers=True))),
    "modules_to_save": (llama, dict(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"])),
    "head": (classifier, dict(r=4, task_type="SEQ_CLS", target_modules=["v_proj"])),
    "conv1d": (gpt2, dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d dora": (gpt2, dict(r=4, use_dora=True, target_modules=["c_fc"], fan_in_fan_out=True)),
    "conv": (unet, dict(r=4, lora_alpha=8, target_modules=["conv1", "to_q", "proj_in", "conv_in"])),
    "conv dora": (unet, dict(r=4, lora_alpha=8, use_dora=True, target_modules=["conv2", "to_out.0"])),
    "experts": (mixtral, dict(r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "one bank": (mixtral, dict(r=2, lora_alpha=8, target_modules=[], target_parameters=EXPERTS[1:])),
    "attention module": (Attention, dict(r=4, lora_alpha=8, target_modules=["attn", "out"])),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_what_peft_saves_loads_with_equal_outputs(case, tmp_path):
    make, config = FROM_PEFT[case]
    base = make()
    before, wanted = output(base), peft_folder(base, tmp_path / "adapter", **copy.deepcopy(config))
    assert float((before - wanted).abs().max()) > 1e-3
    adapter = lorry.load(base, tmp_path / "adapter")
    close(output(base), wanted)
    assert adapter.receipt.tensors_applied == adapter.receipt.tensors_total > 0
    adapter.detach()
    assert torch.equal(output(base), before)


ALL = ["embed_tokens", "q_proj", "down_proj"]
TO_PEFT = {
    "lora": (llama, lorry.LoRA(rank=4, alpha=8), dict(targets="all-linear")),
    "rslora": (llama, lorry.LoRA(rank=4, alpha=8, rank_stabilized=True), dict(targets=["q_proj"])),
    "dora": (llama, lorry.DoRA(rank=4, alpha=8), dict(targets=["q_proj", "down_proj"])),
    "one layer": (llama, lorry.LoRA(rank=4), dict(targets=["model.layers.1.self_attn.q_proj"])),
    "by site": (
        llama,
        lorry.LoRA(rank=4),
        dict(
            targets=["q_proj", "v_proj"],
            site_options={"layers.1.*.q_proj": {"rank": 2, "alpha": 7}, "v_proj": {"rank": 3}},
        ),
    ),
    "mixed scales": (
        llama,
        lorry.LoRA(rank=4),
        dict(targets=["q_proj", "v_proj"], site_options={"v_proj": {"rank_stabilized": True, "alpha": 3}}),
    ),
    "embedding": (llama, lorry.LoRA(rank=4, alpha=8), dict(targets=ALL)),
    "embedding dora": (llama, lorry.DoRA(rank=4, alpha=8), dict(targets=ALL)),
    "head": (classifier, lorry.LoRA(rank=4), dict(targets=["v_proj"], train_also=["score"])),
    "conv1d": (gpt2, lorry.LoRA(rank=4), dict(targets="all-linear")),
    "conv1d dora": (gpt2, lorry.DoRA(rank=4), dict(targets=["c_attn", "c_fc"])),
    "conv": (unet, lorry.LoRA(rank=3), dict(targets=["kind:conv", "to_q"])),
    "conv dora": (unet, lorry.DoRA(rank=3), dict(targets=["conv1", "to_k"])),
    "experts": (mixtral, lorry.LoRA(rank=2, alpha=5), dict(targets=["q_proj", "experts"])),
    "one bank": (mixtral, lorry.LoRA(rank=2, alpha=5), dict(targets=["down_proj"])),
    "attention module": (Attention, lorry.LoRA(rank=4), dict(targets=["in_proj_weight", "out_proj", "out"])),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_what_lorry_saves_loads_in_peft_with_equal_outputs(case, tmp_path):
    make, method, options = TO_PEFT[case]
    model, folder = make(), tmp_path / "adapter"
    adapter = stir(lorry.attach(model, method, **options))
    receipt = adapter.save(folder, format="peft")
    wanted = output(model)
    assert receipt.tensors_applied == receipt.tensors_total > 0
    close(through_peft(make(), folder), wanted)
    # the same folder read back by Lorry, with its own manifest and as PEFT's
    for manifest in (True, False):
        if not manifest:
            (folder / "lorry.json").unlink()
        again = make()
        loaded = lorry.load(again, folder)
        close(output(again), wanted, 1e-6 if manifest else 1e-5)
        assert [s.path for s in loaded.sites] == [s.path for s in adapter.sites] or not manifest
        assert {s.path for s in loaded.sites} == {s.path for s in adapter.sites}


@pytest.mark.parametrize(
    "method, options",
    [
        (lorry.LoRA(rank=4, alpha=3, dropout=0.1), dict(site_options={"q_proj": {"rank": 2}})),
        (lorry.LoRA(rank=4), dict(train_also=["lm_head"])),
        (lorry.DoRA(rank=4), {}),
        (lorry.PiSSA(rank=4), {}),
        (lorry.PiSSA(rank=4), dict(train_also=["lm_head", "norm"])),
    ],
)
@pytest.mark.parametrize("format", ["auto", "lorry"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_the_identity(method, options, format, dtype, tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, method, name="it", dtype=dtype, **options))
    adapter.metadata["facts"] = {"steps": 3}
    adapter.save(tmp_path / "a", format=format)
    again = llama()
    loaded = lorry.load(again, tmp_path / "a")
    assert loaded.name == "it" and loaded.metadata == adapter.metadata and loaded.method == adapter.method
    assert [(e.site.path, e.method) for e in loaded.entries.values()] == [
        (e.site.path, e.method) for e in adapter.entries.values()
    ]
    mine, theirs = ({n: t for n, t, _ in a.named_tensors()} for a in (adapter, loaded))
    assert mine.keys() == theirs.keys()
    assert all(t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in mine.items())
    assert torch.equal(output(model), output(again))
    assert loaded.receipt.fingerprint == "match"
    loaded.save(tmp_path / "b", format=format)
    for name in ("adapter_model.safetensors", "lorry.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_targets_are_exact_where_names_are_ambiguous(tmp_path):
    """A path at the root is also the end of another path, so that only a regular expression tells them
    apart."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = torch.nn.Linear(16, 16)
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(16, 16)})

        def forward(self, x):
            return self.inner["fc"](self.fc(x))

    from peft import PeftModel

    model, x = Model(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    stir(lorry.attach(model, lorry.LoRA(rank=2), targets=["fc"], exclude=["inner.fc"])).save(
        tmp_path / "a", format="peft"
    )
    wrapped = PeftModel.from_pretrained(Model(), str(tmp_path / "a"))
    assert sum("lora_A" in n for n, _ in wrapped.named_parameters()) == 1
    close(wrapped(x), model(x))


def test_converted_pissa_is_a_plain_lora_of_twice_the_rank(tmp_path):
    from files.tiny_models import stir_peft
    from peft import LoraConfig, get_peft_model

    base = llama()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, init_lora_weights="pissa", target_modules=["q_proj"]))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    wanted = output(stir_peft(model))
    model.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = lorry.load(base, tmp_path / "a")
    assert adapter.method == lorry.LoRA(rank=6, alpha=16)
    close(output(base), wanted)


def test_export_of_pissa_is_exact_and_peft_reads_it(tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, lorry.PiSSA(rank=3, alpha=5), targets=["q_proj", "down_proj"]))
    receipt = export_plain(adapter, tmp_path / "a")
    assert receipt.relative_error == 0 and receipt.sites == 6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["lora_alpha"] == 10
    close(through_peft(llama(), tmp_path / "a"), output(model))
    assert not (tmp_path / "a" / "lorry.json").exists()


def test_export_of_dora_is_approximate_and_says_so(tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, lorry.DoRA(rank=2), targets=["q_proj"]))
    with pytest.raises(lorry.AdapterError, match="give a rank"):
        export_plain(adapter, tmp_path / "a")
    coarse = export_plain(adapter, tmp_path / "a", rank=3)
    assert 0 < coarse.relative_error < 1 and len(coarse.notes) == 3
    full = export_plain(adapter, tmp_path / "b", rank=16)
    assert full.relative_error < 1e-6
    close(through_peft(llama(), tmp_path / "b"), output(model))
    deltas = dict((s.path, d) for s, d in adapter.deltas())
    other = llama()
    got = dict((s.path, d) for s, d in lorry.load(other, tmp_path / "a").deltas())
    lost = sum(float((deltas[p] - got[p]).square().sum()) for p in deltas) / sum(
        float(d.square().sum()) for d in deltas.values()
    )
    assert lost**0.5 == pytest.approx(coarse.relative_error, rel=1e-4)


def test_methods_that_depend_on_the_token_are_refused_by_name(tmp_path):
    class Gated(lorry.LoRA):
        def mid(self, h, call, tensors):
            return h * (h > 0)

    adapter = lorry.attach(llama(), Gated(rank=2), targets=["q_proj"])
    with pytest.raises(lorry.AdapterError, match="Gated depends on the input"):
        export_plain(adapter, tmp_path / "a", rank=2)
    assert not (tmp_path / "a").exists()


def test_other_tuners_come_through_pefts_own_conversion(tmp_path):
    from files.tiny_models import stir_peft
    from peft import LoKrConfig, get_peft_model

    from lorry.formats.peft_tuners import convert

    base = llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = stir_peft(get_peft_model(copy.deepcopy(base), LoKrConfig(r=2, target_modules=["q_proj", "down_proj"])))
    model.save_pretrained(str(tmp_path / "lokr"))
    exact = lorry.load(base, tmp_path / "lokr")
    assert exact.method.info.slug == "lokr"
    close(output(base), output(model))
    exact.detach()
    receipt = convert(tmp_path / "lokr", base, tmp_path / "lora", rank=16)
    assert receipt.relative_error < 1e-5 and receipt.sites == 6
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    lorry.load(base, tmp_path / "lora")
    close(output(base), output(model))


def test_a_tuner_without_conversion_is_refused_by_name(tmp_path):
    from peft import IA3Config, get_peft_model

    from lorry.formats.peft_tuners import convert

    base = llama()
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(lorry.AdapterError, match="IA3"):
        convert(tmp_path / "ia3", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [lorry.PiSSA(rank=2), lorry.LoRA(rank=2)])
def test_an_adapter_made_under_one_head_fits_the_same_body_under_another(method, tmp_path):
    from transformers import LlamaModel

    whole = llama()
    stir(lorry.attach(whole, method, targets=["q_proj", "v_proj"])).save(tmp_path / "a")
    body = LlamaModel(whole.config).eval()
    body.load_state_dict(whole.model.state_dict())
    plain = output(body)
    with torch.no_grad():
        wanted = whole.model(torch.tensor([[3, 7, 11, 2, 40, 5], [9, 1, 0, 47, 20, 6]])).last_hidden_state
    adapter = lorry.load(body, tmp_path / "a")
    close(output(body), wanted)
    assert float((plain - wanted).abs().max()) > 1e-4
    assert adapter.receipt.fingerprint == "match" and "prefix 'model.'" in adapter.receipt.notes[0]
    # and back: made on the body, loaded under the head
    adapter.save(tmp_path / "b")
    again = llama()
    loaded = lorry.load(again, tmp_path / "b")
    close(output(again), output(whole))
    assert loaded.receipt.fingerprint == "match"
    if not isinstance(method, lorry.PiSSA):
        (tmp_path / "b" / "lorry.json").unlink()
        third = llama()
        lorry.load(third, tmp_path / "b")
        close(output(third), output(whole))
