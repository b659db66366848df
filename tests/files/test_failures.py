"""Loading is exact or it fails, each failure with its own message, and the model is as it was."""

import copy
import json
import shutil

import pytest
import torch
from files.tiny_models import llama, output, peft_folder, stir
from safetensors.torch import load_file, save_file

import lorry
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS
from lorry.formats.save import sealed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter in three forms: Lorry's own layout, PEFT's layout with a manifest, and without one."""
    root = tmp_path_factory.mktemp("saved")
    adapter = stir(
        lorry.attach(llama(), lorry.LoRA(rank=4, alpha=8), targets=["q_proj", "down_proj"], train_also=["lm_head"])
    )
    adapter.save(root / "lorry", format="lorry")
    adapter.save(root / "both", format="peft")
    adapter.save(root / "peft", format="peft")
    (root / "peft" / MANIFEST).unlink()
    return root


def refused(folder, error, match, model=None, **options):
    """Assert that loading fails with a message, and that the model shows no trace of it."""
    model = model or llama()
    before, classes = output(model), [type(m) for m in model.modules()]
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        lorry.load(model, folder, **options)
    assert torch.equal(output(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    assert lorry.adapters(model) == {}


def changed(saved, form, tmp_path, change, **files):
    """Copy a form with its tensors and JSON files changed, sealed as a save would."""
    folder = tmp_path / "changed"
    shutil.copytree(saved / form, folder)
    tensors = load_file(folder / TENSORS)
    change(tensors)
    blob, digest, checksums = sealed(tensors)
    (folder / TENSORS).write_bytes(blob)
    if (folder / MANIFEST).exists():
        values = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**values, "digest": digest, "checksums": checksums}))
    for name, edit in files.items():
        path = folder / {"manifest": MANIFEST, "config": PEFT_CONFIG}[name]
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
    return folder


def key_of(tensors, part):
    return next(k for k in tensors if part in k and "1.self_attn.q_proj" in k)


FORMS = [("lorry", ".A", ".B"), ("both", "lora_A", "lora_B"), ("peft", "lora_A", "lora_B")]


@pytest.mark.parametrize("form, a, b", FORMS)
def test_missing_tensor(saved, form, a, b, tmp_path):
    edit = {} if form == "peft" else {"manifest": lambda v: v.update(tensors=v["tensors"] - 1)}
    folder = changed(saved, form, tmp_path, lambda t: t.pop(key_of(t, b)), **edit)
    refused(folder, lorry.CheckpointError, "lacks .*B.*1.self_attn.q_proj|lacks the tensor .*q_proj.B")


def test_missing_count(saved, tmp_path):
    folder = changed(saved, "both", tmp_path, lambda t: t.pop(key_of(t, "lora_B")))
    refused(folder, lorry.CheckpointError, "holds 12 tensors, its manifest names 13")


def test_missing_site_of_peft(saved, tmp_path):
    def cut(tensors):
        for part in ("lora_A", "lora_B"):
            tensors.pop(key_of(tensors, part))

    folder = changed(saved, "peft", tmp_path, cut)
    refused(folder, lorry.CheckpointError, "targets 1 sites .*1.self_attn.q_proj.*incomplete")


def test_missing_module_to_save(saved, tmp_path):
    folder = changed(saved, "peft", tmp_path, lambda t: t.pop("base_model.model.lm_head.weight"))
    refused(folder, lorry.CheckpointError, "modules_to_save but holds no tensors for 'lm_head'")


@pytest.mark.parametrize("form, a, b", FORMS)
def test_surplus_tensor(saved, form, a, b, tmp_path):
    edit = {} if form == "peft" else {"manifest": lambda v: v.update(tensors=v["tensors"] + 1)}
    folder = changed(saved, form, tmp_path, lambda t: t.update({"model.norm.extra": torch.ones(2)}), **edit)
    refused(folder, lorry.CheckpointError, "model.norm.extra")


@pytest.mark.parametrize("form, a, b", FORMS)
def test_misshapen_tensor(saved, form, a, b, tmp_path):
    folder = changed(saved, form, tmp_path, lambda t: t.update({key_of(t, a): torch.ones(4, 15)}))
    refused(folder, lorry.CheckpointError, r"q_proj.A' must be of shape \(4, 16\) in this model, found \(4, 15\)")


@pytest.mark.parametrize("form, a, b", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(saved, form, a, b, value, tmp_path):
    folder = changed(saved, form, tmp_path, lambda t: t[key_of(t, b)].view(-1)[5:6].fill_(value))
    refused(folder, lorry.CheckpointError, "NaN or infinite values in 1 of 13 tensors.*1.self_attn.q_proj")


def test_large_finite_values_whose_sum_overflows_are_accepted(saved, tmp_path):
    folder = changed(saved, "both", tmp_path, lambda t: t[key_of(t, "lora_A")].fill_(3e38))
    assert lorry.load(llama(), folder, activate=False).receipt.tensors_applied == 13


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -500])
def test_truncated_file(saved, size, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(saved / "both", folder)
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:size])
    refused(folder, lorry.CheckpointError, "truncated|damaged|no safetensors")


def test_trailing_and_damaged_bytes(saved, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(saved / "both", folder)
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content + b"xx")
    refused(folder, lorry.CheckpointError, "trailing bytes")
    (folder / TENSORS).write_bytes(content[:8] + b"[" + content[9:])
    refused(folder, lorry.CheckpointError, "not JSON")
    (folder / TENSORS).write_bytes(content)
    (folder / MANIFEST).write_text("{")
    refused(folder, lorry.CheckpointError, "lorry.json' cannot be read as JSON")


def test_wrong_base_names_both_and_can_be_overridden(saved):
    other = llama(seed=9)
    other.config._name_or_path = "someone/other-base"
    refused(saved / "both", lorry.FingerprintError, "LlamaForCausalLM.*someone/other-base.*6 of 6 sites", other)
    adapter = lorry.load(other, saved / "both", check_base=False)
    assert adapter.receipt.fingerprint == "ignored"
    assert adapter.fingerprint.base == "LlamaForCausalLM"  # still of the base that it was made for
    assert lorry.load(llama(), saved / "both", check_base=False).receipt.fingerprint == "match"
    assert lorry.load(llama(), saved / "peft").receipt.fingerprint == "unknown"
    half = llama().to(torch.bfloat16)
    assert lorry.load(half, saved / "both").receipt.fingerprint == "match"


def test_another_architecture(saved):
    refused(saved / "peft", lorry.CheckpointError, "has no such site", llama(num_hidden_layers=2))
    refused(saved / "both", lorry.CheckpointError, "has no such site", llama(num_hidden_layers=2))
    refused(saved / "both", lorry.FingerprintError, "was made for the base", llama(hidden_size=32))
    refused(saved / "both", lorry.CheckpointError, "must be of shape", llama(hidden_size=32), check_base=False)


@pytest.mark.parametrize(
    "edit, match",
    [
        (lambda v: v["method"].update(method="lorra"), "no method 'lorra'.*'lora'"),
        (lambda v: v["method"].update(gate="sigmoid"), "no option 'gate'"),
        (lambda v: v["method"].update(rank=-1), "rank"),
        (lambda v: v.update(format=7, readable_by=6), "format 7.*needs a reader of format 6.*Update Lorry"),
        (lambda v: (v.update(format=7), v.pop("readable_by")), "needs a reader of format 7"),
        (lambda v: v.update(gates=[1]), r"unknown fields \['gates'\]"),
        (lambda v: v["sites"]["lm_head"].update(gate=1), r"'lm_head' has the unknown fields \['gate'\]"),
        (lambda v: v.update(layout="odd"), "unknown layout 'odd'"),
        (lambda v: v.update(digest="0"), "was not written with the tensors beside it"),
        (lambda v: v.pop("sites"), "damaged"),
        (lambda v: v.pop("format"), "no format number"),
        (lambda v: v["sites"].pop("lm_head"), "1 tensors that belong to none of its sites.*lm_head"),
        (lambda v: v["sites"]["lm_head"].update(kind="conv"), "lm_head"),
    ],
)
def test_manifest_that_this_version_does_not_understand(saved, edit, match, tmp_path):
    folder = changed(saved, "both", tmp_path, lambda t: None, manifest=edit)
    refused(folder, lorry.CheckpointError, match)


def test_harmless_field_of_a_newer_version_is_a_note(saved, tmp_path):
    folder = changed(
        saved,
        "both",
        tmp_path,
        lambda t: None,
        manifest=lambda v: v.update(format=7, readable_by=1, colour="blue"),
    )
    assert "colour" in lorry.load(llama(), folder).receipt.notes[0]


@pytest.mark.parametrize(
    "edit, match",
    [
        (dict(lora_bias=True), "lacks lora_bias of"),
        (dict(bias="some"), "bias='some'"),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "names trained tokens, but holds no rows"),
        (dict(use_qalora=True), "use_qalora"),
        (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (dict(init_lora_weights="corda"), "init_lora_weights='corda', which changed the base weight"),
        (dict(init_lora_weights="novel"), "init_lora_weights='novel', which is unknown"),
        (dict(use_rslorra=True), "unknown option use_rslorra=True.*'use_rslora'"),
        (dict(peft_type="VERA"), "PEFT cannot read .* as VERA"),
        (dict(r=3), "must be of shape"),
        (dict(rank_pattern={"(": 3}), "rank_pattern.*wrong regular expression"),
    ],
)
def test_peft_options_that_change_the_arithmetic(saved, edit, match, tmp_path):
    folder = changed(saved, "peft", tmp_path, lambda t: None, config=lambda v: v.update(edit))
    refused(folder, lorry.CheckpointError, match)


def test_unknown_option_that_is_off_is_a_note(saved, tmp_path):
    folder = changed(
        saved, "peft", tmp_path, lambda t: None, config=lambda v: v.update(use_novelty=False, new_config=None)
    )
    notes = " ".join(lorry.load(llama(), folder).receipt.notes)
    assert "use_novelty" in notes and "new_config" in notes


def test_whole_config_of_the_real_peft_is_understood_without_notes(tmp_path):
    peft_folder(llama(), tmp_path / "a", r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = lorry.load(llama(), tmp_path / "a")
    assert adapter.receipt.notes == () and adapter.metadata["task_type"] == "CAUSAL_LM"


def test_pickles_are_never_opened(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (tmp_path / "a").mkdir()
    torch.save(Bomb(), tmp_path / "a" / "adapter_model.bin")
    shutil.copy(saved / "peft" / PEFT_CONFIG, tmp_path / "a")
    refused(tmp_path / "a", lorry.CheckpointError, "is a pickle.*save_file")
    for name in ("x.pt", "x.ckpt"):
        shutil.copy(tmp_path / "a" / "adapter_model.bin", tmp_path / name)
        refused(tmp_path / name, lorry.CheckpointError, "is a pickle")


def test_paths(saved, tmp_path):
    refused(tmp_path / "nothing", lorry.CheckpointError, "no adapter at")
    refused(saved / "lory", lorry.CheckpointError, "Did you mean 'lorry'")
    refused(saved / "both" / TENSORS, lorry.CheckpointError, "load the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", lorry.CheckpointError, "holds no adapter_model.safetensors")
    shutil.copy(saved / "both" / TENSORS, tmp_path / "empty")
    refused(tmp_path / "empty", lorry.CheckpointError, "neither lorry.json nor adapter_config.json")
    refused("a\0b", lorry.CheckpointError, "NUL")


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_links_that_leave_the_folder(saved, name, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(saved / "both", folder)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    refused(folder, lorry.CheckpointError, "link that leads out of its folder")
    (folder / name).unlink()
    (tmp_path / "outside").rename(folder / "inside")
    (folder / name).symlink_to("inside")
    lorry.load(llama(), folder)


def test_links_of_the_download_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (saved / "both").iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert lorry.load(llama(), snapshot).receipt.fingerprint == "match"


def test_expected_method_names_and_doubles(saved):
    refused(saved / "both", lorry.CheckpointError, "method 'lora', expected was 'dora'", expect="dora")
    refused(saved / "both", lorry.CheckpointError, "no method 'dorra'", expect="dorra")
    refused(saved / "both", lorry.AdapterError, "name consists of", name="a/b")
    model = llama()
    first = lorry.load(model, saved / "both", expect="lora")
    wanted = output(model)
    with pytest.raises(lorry.AdapterError, match="attached already"):
        lorry.load(model, saved / "both")
    assert lorry.adapters(model) == {"default": first} and torch.equal(output(model), wanted)


def test_saved_embedding_of_another_size_and_of_another_base(tmp_path):
    folder = tmp_path / "a"
    peft_folder(llama(), folder, r=2, target_modules=["q_proj"], save=dict(save_embedding_layers=True))
    key = "base_model.model.model.embed_tokens.weight"
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, key: torch.ones(50, 16)}, folder / TENSORS)
    refused(folder, lorry.CheckpointError, r"resize_token_embeddings\(50\)")
    other = tensors[key] + 1
    save_file({**tensors, key: other}, folder / TENSORS)
    model = llama()
    adapter = lorry.load(model, folder)
    assert torch.equal(dict((n, t) for n, t, _ in adapter.named_tensors())["model.embed_tokens.weight"], other)
    twin = llama()
    twin.model.embed_tokens.weight.data.copy_(other)
    lorry.load(twin, folder)
    assert torch.allclose(output(model), output(twin), atol=1e-6)


def test_dtype_training_and_names(saved, tmp_path):
    model = llama()
    adapter = lorry.load(model, saved / "both", name="b", dtype=torch.bfloat16, trainable=True, activate=False)
    assert {t.dtype for _, t, _ in adapter.named_tensors()} == {torch.bfloat16}
    assert all(p.requires_grad for p in adapter.parameters()) and list(lorry.adapters(model)) == ["b"]
    assert torch.equal(output(model), output(llama()))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lorry_" not in n)
    twin = copy.deepcopy(saved / "both")
    assert lorry.load(model, twin, name="c").name == "c"


def test_eight_bit_factors_are_computed_in_sixteen_bits(tmp_path):
    model, folder = llama(), tmp_path / "a"
    adapter = stir(lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj"]))
    adapter.save(folder, format="peft")
    (folder / MANIFEST).unlink()
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)
    loaded = lorry.load(llama(), folder)
    values = {t.dtype for _, t, _ in loaded.named_tensors()}
    assert values == {torch.bfloat16}
    rounded = {t.float().sum().item() for t in tensors.values()}
    assert {t.float().sum().item() for _, t, _ in loaded.named_tensors()} == rounded


def test_scales_that_single_precision_does_not_hold(saved, tmp_path):
    folder = changed(saved, "peft", tmp_path, lambda t: None, config=lambda v: v.update(lora_alpha=1e300))
    refused(folder, lorry.CheckpointError, "scales the update at .* by 2.5e.299, which single precision")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("readable_by", "1", "readable_by must be a whole number"),
        ("readable_by", True, "readable_by must be a whole number"),
        ("fingerprint", [], "fingerprint must be of type dict"),
        ("fingerprint", {"sites": {"a": 1}}, "fingerprint must be of type str"),
        ("metadata", "x", "metadata must be of type dict"),
        ("sites", [], "sites must be of type dict"),
        ("shared", "x", "shared must be of type list"),
        ("tensors", "13", "tensors must be a whole number"),
        ("method", "lora", "a method must be an object"),
        ("digest", 1, "digest must be of type str"),
        ("checksums", None, "checksums"),
        ("checksums", {"x": "y"}, "checksums of 1 tensors, the file holds 13"),
    ],
)
def test_wrong_types_in_the_manifest(saved, field, value, words, tmp_path):
    folder = changed(saved, "both", tmp_path, lambda t: None, manifest=lambda v: v.update({field: value}))
    refused(folder, lorry.CheckpointError, words)


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_modules", 3),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", [8]),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 1.5}),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", ["1"]),
        ("use_dora", "yes"),
    ],
)
def test_wrong_types_in_pefts_config(saved, field, value, tmp_path):
    folder = changed(saved, "peft", tmp_path, lambda t: None, config=lambda v: v.update({field: value}))
    refused(folder, lorry.CheckpointError, f"{field} must be")


def header(saved, tmp_path, edit):
    """A copy of PEFT's folder whose tensor header was edited as an object or as text."""
    folder = tmp_path / "a"
    shutil.copytree(saved / "peft", folder)
    content = (folder / TENSORS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = edit(json.loads(content[8 : 8 + size]))
    text = text if isinstance(text, str) else json.dumps(text)
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + size :])
    return folder


def entry(**changes):
    """An edit of one entry of a header."""

    def edit(values):
        first = sorted((n for n in values if n != "__metadata__"), key=lambda n: values[n]["data_offsets"])[0]
        values[first] = {**values[first], **changes}
        return values

    return edit


def overlapping(values):
    first, second = [n for n in sorted(values) if "q_proj.lora_A" in n][:2]
    values[second]["data_offsets"] = values[first]["data_offsets"]
    return values


@pytest.mark.parametrize(
    "edit, words",
    [
        (overlapping, "shares bytes with another tensor|leaves bytes out"),
        (lambda v: json.dumps(v)[:-1] + ', "a": {}, "a": {}}', "the name 'a' comes twice"),
        (lambda v: "[" * 100_000, "is not JSON"),
        (entry(shape=[-1, -64]), "whole numbers of at least 0"),
        (entry(shape="4x16"), "is damaged"),
        (entry(dtype=["F32"]), "is damaged"),
        (entry(dtype="F4"), "is of dtype F4"),
        (entry(data_offsets=[0]), "is damaged"),
        (entry(data_offsets=[0.0, 256.0]), "is damaged"),
        (entry(extra=1), "is damaged"),
        (lambda v: {**v, "__metadata__": {"a": 1}}, "metadata of its header must be texts"),
        (lambda v: {**v, "__metadata__": []}, "metadata of its header must be texts"),
    ],
)
def test_damaged_headers(saved, edit, words, tmp_path):
    refused(header(saved, tmp_path, edit), lorry.CheckpointError, words)


def test_a_header_is_checked_before_anything_large_is_read(tmp_path):
    import resource

    path = tmp_path / "a.safetensors"
    text = json.dumps({"unet.x.lora_A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(2**36)  # sparse: 64 GiB that are not there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, lorry.CheckpointError, "trailing bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    with path.open("wb") as file:
        file.write((2**35).to_bytes(8, "little"))
        file.truncate(2**36)
    refused(path, lorry.CheckpointError, "truncated or no safetensors file")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_regular_expressions_of_a_file_end(saved, field, tmp_path):
    evil = r"(.*a*)*(.*e+)+(x|x)*!"
    value = {"rank_pattern": {evil: 2}, "modules_to_save": [evil]}.get(field, evil)
    folder = changed(saved, "peft", tmp_path, lambda t: None, config=lambda v: v.update({field: value}))
    try:
        lorry.load(llama(), folder)
    except lorry.CheckpointError as error:
        assert str(error)
