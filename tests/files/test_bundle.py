"""One adapter over several roots in one file: all of it is loaded, or nothing."""

import json

import pytest
import torch
from files.tiny_models import close, llama, output, stir, unet
from safetensors.torch import load_file, save_file

import lorry
from lorry.formats.bundle import load_bundle, save_bundle


def text_encoder(seed=7, width=8):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=30,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return CLIPTextModel(config).eval()


def encoded(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 4, 9, 2]])).last_hidden_state


def pipeline():
    return {"unet": unet(), "text_encoder": text_encoder(), "language": llama()}


SEES = {"unet": output, "text_encoder": encoded, "language": output}


def attached(roots):
    return {
        "unet": stir(lorry.attach(roots["unet"], lorry.LoRA(rank=2, alpha=3), targets=["to_q", "conv1"])),
        "text_encoder": stir(lorry.attach(roots["text_encoder"], lorry.DoRA(rank=2), targets=["q_proj"])),
        "language": stir(lorry.attach(roots["language"], {"method": "vera", "rank": 4}, targets=["q_proj", "v_proj"])),
    }


@pytest.fixture
def saved(tmp_path):
    roots = pipeline()
    adapters = attached(roots)
    receipt = save_bundle(adapters, tmp_path / "a", name="style", metadata={"parent": "someone"})
    return tmp_path / "a", {r: SEES[r](m) for r, m in roots.items()}, adapters, receipt


def test_a_bundle_gives_every_root_its_adapter(saved):
    folder, wanted, adapters, receipt = saved
    assert receipt.sites == sum(len(a.entries) for a in adapters.values())
    roots = pipeline()
    loaded = load_bundle(roots, folder)
    assert {a.name for a in loaded.values()} == {"style"} and loaded.keys() == roots.keys()
    for root, model in roots.items():
        assert torch.equal(SEES[root](model), wanted[root])
        assert loaded[root].receipt.fingerprint == "match"
        assert loaded[root].receipt.tensors_applied == loaded[root].receipt.tensors_total
        loaded[root].detach()
        assert torch.equal(SEES[root](model), SEES[root](pipeline()[root]))


def test_a_bundle_as_data(saved):
    folder, wanted, adapters, _ = saved
    with lorry.open(folder) as file:
        assert list(file.components) == list(adapters) and file.metadata == {"parent": "someone"}
        path = next(iter(adapters["unet"].entries))
        own = adapters["unet"].entries[path].tensors()["A"]
        assert torch.equal(file.tensor(f"unet.{path}", "A"), own)
        assert torch.equal(file.components["unet"].tensor(path, "A"), own)
        fingerprint = file.components["text_encoder"].fingerprint
        assert fingerprint is not None and fingerprint.digest == adapters["text_encoder"].fingerprint.digest
        model = unet()
        file.components["unet"].load(model, name="alone")
        assert torch.equal(output(model), wanted["unet"])
        file.save(folder.parent / "again")
    roots = pipeline()
    load_bundle(roots, folder.parent / "again")
    assert all(torch.equal(SEES[r](m), wanted[r]) for r, m in roots.items())


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda roots: roots.pop("language"), lorry.CheckpointError, "the root 'language', which was not given"),
        (lambda roots: roots.update(language=llama(seed=5)), lorry.FingerprintError, "was made for the base"),
        (lambda roots: roots.update(language=llama(num_hidden_layers=2)), lorry.CheckpointError, "no such site"),
        (lambda roots: lorry.attach(roots["language"], name="style"), lorry.AdapterError, "attached already"),
    ],
)
def test_a_failure_at_the_last_root_leaves_the_first_ones_as_they_were(saved, change, error, match):
    folder, _, _, _ = saved
    roots = pipeline()
    change(roots)
    before = {r: lorry.adapters(m) for r, m in roots.items()}
    outputs = {r: SEES[r](m) for r, m in roots.items()}
    with pytest.raises(error, match=match):
        load_bundle(roots, folder)
    assert {r: lorry.adapters(m) for r, m in roots.items()} == before
    assert all(torch.equal(SEES[r](m), outputs[r]) for r, m in roots.items())


def test_two_roots_that_are_one_model_are_refused(saved, tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj"]))
    save_bundle({"first": adapter, "second": adapter}, tmp_path / "b")
    fresh = llama()
    with pytest.raises(lorry.AdapterError, match="are one model"):
        load_bundle({"first": fresh, "second": fresh}, tmp_path / "b")
    assert lorry.adapters(fresh) == {}
    inner = stir(lorry.attach(llama().model, lorry.LoRA(rank=2), targets=["q_proj"]))
    save_bundle({"outer": adapter, "inner": inner}, tmp_path / "c")
    with pytest.raises(lorry.SiteError, match="a part or a parent"):
        load_bundle({"outer": fresh, "inner": fresh.model}, tmp_path / "c")
    assert lorry.adapters(fresh) == {} and lorry.adapters(fresh.model) == {}


def test_misuse_is_said(saved, tmp_path):
    folder, _, adapters, _ = saved
    with pytest.raises(lorry.CheckpointError, match="over the roots 'unet', 'text_encoder', 'language'"):
        lorry.load(unet(), folder)
    adapters["language"].save(tmp_path / "one")
    with pytest.raises(lorry.CheckpointError, match="of one model; load it with lorry.load"):
        load_bundle(pipeline(), tmp_path / "one")
    for wrong in ({}, {"a/b": adapters["unet"]}, {"": adapters["unet"]}):
        with pytest.raises(lorry.AdapterError, match="at least one root"):
            save_bundle(wrong, tmp_path / "b")
    with pytest.raises(lorry.CheckpointError, match="spans several models"):
        lorry.open(folder).save(tmp_path / "b", format="peft")
    assert json.loads((folder / "lorry.json").read_text())["readable_by"] == 2


def test_a_tensor_of_no_root_is_refused(saved):
    folder, _, _, _ = saved
    from lorry.formats.save import sealed

    tensors = {**load_file(folder / "adapter_model.safetensors"), "vae/x.A": torch.ones(2)}
    blob, digest, checksums = sealed(tensors)
    (folder / "adapter_model.safetensors").write_bytes(blob)
    values = json.loads((folder / "lorry.json").read_text())
    values.update(digest=digest, checksums=checksums, tensors=len(tensors))
    (folder / "lorry.json").write_text(json.dumps(values))
    with pytest.raises(lorry.CheckpointError, match="belong to none of its roots: 'vae/x.A'"):
        lorry.open(folder)


def plain_pipeline():
    roots = {"unet": unet(), "text_encoder": text_encoder()}
    adapters = {
        "unet": stir(
            lorry.attach(
                roots["unet"],
                lorry.LoRA(rank=2, alpha=3),
                targets=["to_q", "conv1", "to_out.0"],
                site_options={"conv1": {"rank": 3}},
            )
        ),
        "text_encoder": stir(lorry.attach(roots["text_encoder"], {"method": "pissa", "rank": 2}, targets=["q_proj"])),
    }
    return roots, adapters


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_single_files_are_written_and_read_as_bundles(format, tmp_path):
    roots, adapters = plain_pipeline()
    save_bundle(adapters, tmp_path / "folder")
    path = tmp_path / "style.safetensors"
    lorry.open(tmp_path / "folder").save(path, format=format)
    fresh = {"unet": unet(), "text_encoder": text_encoder()}
    loaded = load_bundle(fresh, path)
    assert loaded.keys() == fresh.keys() and lorry.open(path).format == format
    for root, model in fresh.items():
        close(SEES[root](model), SEES[root](roots[root]), 2e-6)
        assert loaded[root].receipt.tensors_applied == loaded[root].receipt.tensors_total
    with pytest.raises(lorry.CheckpointError, match="exists"):
        adapters["unet"].save(path, format=format, overwrite=False)
    with pytest.raises(lorry.CheckpointError, match=r"must end in .safetensors"):
        adapters["unet"].save(tmp_path / "style", format=format)


def test_the_real_diffusers_reads_the_single_file(tmp_path):
    roots, adapters = plain_pipeline()
    adapters["unet"].save(tmp_path / "a.safetensors", format="diffusers")
    model = unet()
    model.load_lora_adapter(str(tmp_path / "a.safetensors"), prefix="unet")
    close(output(model), output(roots["unet"]), 2e-6)
    told = unet()
    told.load_lora_adapter(str(tmp_path), weight_name="a.safetensors", prefix="unet")
    close(output(told), output(roots["unet"]), 2e-6)


def test_what_single_files_cannot_say_is_refused(tmp_path):
    model = llama()
    embedding = lorry.attach(model, lorry.LoRA(rank=2), targets=["embed_tokens"], name="e")
    with pytest.raises(lorry.CheckpointError, match="'model.embed_tokens' .embedding. has no place"):
        embedding.save(tmp_path / "a.safetensors", format="diffusers")
    dora = lorry.attach(model, lorry.DoRA(rank=2), targets=["q_proj"], name="d")
    with pytest.raises(lorry.CheckpointError, match="DoRA at .* is not scale"):
        dora.save(tmp_path / "a.safetensors", format="kohya")
    assert list(tmp_path.iterdir()) == []


def test_components_of_a_pipelines_file_by_diffusers_names(tmp_path):
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8, 2)
    flat = path.replace(".", "_")
    save_file(
        {f"lora_te1_{flat}.lora_down.weight": a, f"lora_te1_{flat}.lora_up.weight": b}, tmp_path / "k.safetensors"
    )
    assert list(lorry.open(tmp_path / "k.safetensors").components) == ["text_encoder"]
    encoder = text_encoder()
    if path in dict(encoder.named_modules()):
        load_bundle({"text_encoder": encoder}, tmp_path / "k.safetensors")
        assert not torch.equal(encoded(encoder), encoded(text_encoder()))
