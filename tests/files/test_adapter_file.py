"""An adapter as data: read, edited, rescaled, resized, merged and written without its model."""

import gc
import os

import pytest
import torch
from files.tiny_models import Attention, close, llama, mixtral, output, peft_folder, stir, through_peft, unet

import lorry
from lorry.formats.snapshot import as_file
from lorry.merging import compare, merge

CASES = {
    "lora": (llama, lorry.LoRA(rank=4, alpha=7), dict(targets=["q_proj", "down_proj"])),
    "rslora": (llama, lorry.LoRA(rank=3, alpha=7, rank_stabilized=True), dict(targets=["q_proj"])),
    "by site": (
        llama,
        lorry.LoRA(rank=4),
        dict(targets=["q_proj", "v_proj"], site_options={"v_proj": {"rank": 2, "alpha": 3}}),
    ),
    "embedding": (llama, lorry.LoRA(rank=3), dict(targets=["embed_tokens"])),
    "banks": (mixtral, lorry.LoRA(rank=2, alpha=5), dict(targets="experts")),
    "conv": (unet, lorry.LoRA(rank=3, alpha=1), dict(targets=["conv1", "to_q"])),
    "packed": (Attention, lorry.LoRA(rank=3), dict(targets=["in_proj_weight", "out_proj"])),
    "pissa": (llama, lorry.PiSSA(rank=2, alpha=3), dict(targets=["q_proj"])),
}


def saved(case, folder, format="auto", changes=()):
    make, method, options = CASES[case]
    model = make()
    adapter = stir(lorry.attach(model, method, name="it", **options))
    adapter.save(folder, format=format)
    return make, model, adapter


def exact(adapter):
    return {p: e.delta().detach().double() for p, e in adapter.entries.items()}


@pytest.mark.parametrize("format", ["auto", "lorry"])
@pytest.mark.parametrize("case", CASES)
def test_updates_from_the_file_are_those_on_the_model(case, format, tmp_path):
    _, _, adapter = saved(case, tmp_path / "a", format)
    wanted = exact(adapter)
    with lorry.open(tmp_path / "a") as file:
        assert list(file) == list(wanted) and file.name == "it" and file.method == adapter.method
        for path in file:
            a, b, error = file.factors(path)
            assert error == 0 and file.facts(path).shape == adapter.entries[path].site.shape
            torch.testing.assert_close(file.delta(path), wanted[path], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(b @ a, wanted[path], atol=1e-6, rtol=1e-5)
            assert torch.equal(file.tensor(path, "A"), adapter.entries[path].tensors()["A"])


def test_what_needs_the_base_says_so(tmp_path):
    model = llama()
    stir(lorry.attach(model, lorry.DoRA(rank=2), targets=["q_proj"])).save(tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        path = next(iter(file))
        for ask in (file.factors, file.delta):
            with pytest.raises(lorry.AdapterError, match="depends on the base weight"):
                ask(path)
    adapter = lorry.adapters(model)["default"]
    torch.testing.assert_close(as_file(adapter).delta(path), exact(adapter)[path], atol=1e-5, rtol=1e-4)


def test_what_depends_on_the_input_has_no_update(tmp_path):
    lorry.attach(llama(), "smora", targets=["q_proj"]).save(tmp_path / "a")
    with lorry.open(tmp_path / "a") as file, pytest.raises(lorry.AdapterError, match="depends on the input"):
        file.delta(next(iter(file)))


@pytest.mark.parametrize("case", CASES)
def test_a_larger_rank_keeps_the_function_and_the_scale(case, tmp_path):
    make, model, adapter = saved(case, tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        receipt = file.resize(7)
        assert receipt.relative_error == 0 and receipt.sites == len(adapter.entries) and set(file.ranks.values()) == {7}
        for path, entry in adapter.entries.items():
            assert file.sites[path].method.scale(entry.site) == entry.method.scale(entry.site)
        file.save(tmp_path / "b")
    again = make()
    loaded = lorry.load(again, tmp_path / "b")
    close(output(again), output(model), 2e-6)
    for path, delta in exact(loaded).items():
        torch.testing.assert_close(delta, exact(adapter)[path], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("case", ["lora", "rslora", "banks", "pissa"])
def test_a_smaller_rank_is_the_best_one_and_its_error_is_in_the_receipt(case, tmp_path):
    _, _, adapter = saved(case, tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        receipt = file.resize(1)
        lost = size = floor = worst = 0.0
        for path, delta in exact(adapter).items():
            gap = delta - file.delta(path)
            lost, size = lost + float(gap.square().sum()), size + float(delta.square().sum())
            floor += float(torch.linalg.svdvals(delta)[..., 1:].square().sum())
            worst = max(worst, float(gap.abs().max()))
    assert receipt.relative_error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert receipt.max_error == pytest.approx(worst, rel=1e-3)
    assert lost == pytest.approx(floor, rel=1e-4)


def test_drawn_rows_keep_the_function_and_get_gradients(tmp_path):
    make, model, _ = saved("lora", tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        file.resize(6, seed=3)
        trained = make()
        adapter = file.load(trained, trainable=True)
    close(output(trained), output(model), 2e-6)
    trained(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    gradients = [e.tensors()["B"].grad[:, 4:] for e in adapter.entries.values()]
    assert all(float(g.abs().sum()) > 0 for g in gradients)


@pytest.mark.parametrize("factor", [2.0, 0.3, -1.5, 0.0])
@pytest.mark.parametrize("case", ["lora", "rslora", "by site", "pissa"])
def test_rescaling_is_exact(case, factor, tmp_path):
    make, _, adapter = saved(case, tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        file.rescale(factor)
        file.save(tmp_path / "b")
    loaded = lorry.load(make(), tmp_path / "b")
    for path, entry in loaded.entries.items():
        mine, theirs = entry.tensors(), adapter.entries[path].tensors()
        assert torch.equal(mine["A"], theirs["A"])
        assert factor == 0 or torch.equal(mine["B"], theirs["B"] * (1 if factor > 0 else -1))
        scale = adapter.entries[path].method.scale(entry.site)
        assert entry.method.scale(entry.site) == pytest.approx(abs(factor) * scale if factor else scale, rel=1e-15)
        torch.testing.assert_close(entry.delta().double(), exact(adapter)[path] * factor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "method, targets, change, match",
    [
        (lorry.DoRA(rank=2), ["q_proj"], lambda f: f.rescale(2), "not proportional to an option alpha"),
        ({"method": "loha", "rank": 2}, ["q_proj"], lambda f: f.resize(3), "not a product of two factors"),
        ({"method": "vera", "rank": 2}, ["q_proj"], lambda f: f.resize(3), "share tensors"),
        (lorry.LoRA(rank=2), ["q_proj"], lambda f: f.resize(17), "from 1 to 16, found 17"),
        (lorry.LoRA(rank=2), ["q_proj"], lambda f: f.resize(0), "found 0"),
        (lorry.LoRA(rank=2), ["q_proj"], lambda f: f.rescale(float("nan")), "finite number"),
        ("smora", ["q_proj"], lambda f: f.resize(3), "not a product of two factors"),
    ],
)
def test_changes_that_do_not_fit_are_refused_and_nothing_is_changed(method, targets, change, match, tmp_path):
    stir(lorry.attach(llama(), method, targets=targets)).save(tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        before = {p: (m, file.tensors(p)) for p, m in file.methods.items()}
        with pytest.raises(lorry.AdapterError, match=match):
            change(file)
        for path, (old, tensors) in before.items():
            assert file.sites[path].method == old
            assert all(torch.equal(t, file.tensors(path)[n]) for n, t in tensors.items())


def test_a_weight_delta_with_an_alpha_is_rescaled(tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, {"method": "loha", "rank": 2}, targets=["q_proj"]))
    adapter.save(tmp_path / "a")
    with lorry.open(tmp_path / "a") as file:
        file.rescale(3)
        for path, delta in exact(adapter).items():
            torch.testing.assert_close(file.delta(path), 3 * delta, atol=1e-6, rtol=1e-5)


def test_tensors_and_metadata_are_edited_and_the_file_stays(tmp_path):
    make, model, adapter = saved("lora", tmp_path / "a")
    file = lorry.open(tmp_path / "a")
    path = next(iter(file))
    shape = file.tensor(path, "B").shape
    file.edit(path, {"B": torch.zeros(shape)})
    file.metadata["note"] = "zeroed"
    for wrong, match in (
        ({"B": torch.zeros(2, 2)}, "must be of the shapes"),
        ({"C": torch.zeros(2)}, "must be of the shapes"),
        ({"B": torch.full(shape, float("nan"))}, "NaN or infinite"),
    ):
        with pytest.raises(lorry.CheckpointError, match=match):
            file.edit(path, wrong)
    file.edit(path, {"A": torch.ones(2, 16), "B": torch.ones(16, 2)}, method=lorry.LoRA(rank=2))
    file.save(tmp_path / "b")
    again = make()
    loaded = lorry.load(again, tmp_path / "b")
    assert loaded.metadata["note"] == "zeroed" and loaded.entries[path].method == lorry.LoRA(rank=2)
    assert torch.equal(loaded.entries[path].delta(), torch.full((16, 16), 2.0))
    untouched = make()
    lorry.load(untouched, tmp_path / "a")
    assert torch.equal(output(untouched), output(model))
    with pytest.raises(lorry.CheckpointError, match="no tensor 'C'"):
        file.tensor(path, "C")


def test_an_opened_file_is_loaded_onto_two_models_that_share_nothing(tmp_path):
    saved("lora", tmp_path / "a")
    first, second = llama(), llama()
    with lorry.open(tmp_path / "a") as file:
        one = file.load(first, trainable=True)
        two = lorry.load(second, file, name="other")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert two.name == "other"
    wanted = llama()
    lorry.load(wanted, tmp_path / "a")
    assert torch.equal(output(second), output(wanted))


def test_a_replaced_folder_is_read_as_it_was_opened(tmp_path):
    _, _, adapter = saved("lora", tmp_path / "a")
    file = lorry.open(tmp_path / "a")
    other = stir(lorry.attach(llama(), lorry.LoRA(rank=2), targets=["q_proj"]), seed=9)
    other.save(tmp_path / "a")
    for path, entry in adapter.entries.items():
        assert torch.equal(file.tensor(path, "B"), entry.tensors()["B"])
    file.close()
    with pytest.raises(lorry.CheckpointError, match="cannot be read any more"):
        file.tensor(path, "B")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_files_are_given_back(tmp_path):
    saved("lora", tmp_path / "a")
    model = llama()

    def handles():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = handles()
    lorry.load(model, tmp_path / "a", name="one")
    compare([tmp_path / "a", tmp_path / "a"])
    merge([tmp_path / "a", tmp_path / "a"])
    with lorry.open(tmp_path / "a"):
        assert handles() == before + 1
    lorry.open(tmp_path / "a")
    assert handles() == before


PEFT = {
    "patterns": (
        llama,
        dict(r=4, lora_alpha=8, target_modules=r".*layers\.[02]\..*(q|v)_proj", rank_pattern={"v_proj": 2}),
    ),
    "whole": (llama, dict(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"])),
    "saved embeddings": (llama, dict(r=4, target_modules=["v_proj"], save=dict(save_embedding_layers=True))),
    "dora": (llama, dict(r=4, use_dora=True, target_modules=["q_proj"])),
    "conv": (unet, dict(r=4, target_modules=["conv1", "to_q"])),
}


@pytest.mark.parametrize("format", ["peft", "lorry"])
@pytest.mark.parametrize("case", PEFT)
def test_folders_of_peft_are_written_again_without_a_model(case, format, tmp_path):
    pytest.importorskip("peft")
    make, config = PEFT[case]
    wanted = peft_folder(make(), tmp_path / "a", **config)
    with lorry.open(tmp_path / "a") as file:
        file.save(tmp_path / "b", format=format)
    model = make()
    lorry.load(model, tmp_path / "b")
    close(output(model), wanted)
    assert (tmp_path / "b" / "adapter_config.json").exists() == (format == "peft")
    if format == "peft" and case != "saved embeddings":
        close(through_peft(make(), tmp_path / "b"), wanted)


def test_resized_folders_of_peft_load_in_peft(tmp_path):
    pytest.importorskip("peft")
    wanted = peft_folder(
        llama(), tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with lorry.open(tmp_path / "a") as file:
        with pytest.raises(lorry.AdapterError, match="'lm_head' of .* was trained whole"):
            file.resize(6)
    wanted = peft_folder(llama(), tmp_path / "c", r=4, lora_alpha=8, target_modules=r".*1\..*q_proj")
    with lorry.open(tmp_path / "c") as file:
        file.resize(6)
        file.save(tmp_path / "b", format="peft")
    close(through_peft(llama(), tmp_path / "b"), wanted)


def test_files_are_merged_and_compared_as_data_and_the_result_is_data(tmp_path):
    _, first, one = saved("lora", tmp_path / "a")
    other = stir(lorry.attach(first, lorry.LoRA(rank=2), targets=["q_proj"], name="b", activate=False), seed=5)
    with lorry.open(tmp_path / "a") as file:
        file.rescale(2)
        merged = merge({"a": file, "b": other}, weights={"a": 0.5, "b": 1.0})
        result = merged.file()
        result.resize(12)
        for path in result:
            wanted = exact(one)[path] + (exact(other)[path] if path in other.entries else 0)
            torch.testing.assert_close(result.delta(path), wanted, atol=1e-6, rtol=1e-5)
        twice = merge([result, file])
        assert set(twice.sites) == set(result.sites)
        assert compare({"x": file, "y": result}).overall["x|y"] != 0


def test_a_snapshot_does_not_follow_training(tmp_path):
    adapter = stir(lorry.attach(llama(), lorry.LoRA(rank=2), targets=["q_proj"]))
    file = as_file(adapter)
    path = next(iter(file))
    before = file.tensor(path, "B").clone()
    with torch.no_grad():
        adapter.parameters()[1].add_(1)
    assert torch.equal(file.tensor(path, "B"), before) and file.format == "memory"
    model = llama()
    loaded = file.load(model)
    assert torch.equal(loaded.entries[path].tensors()["B"], before)
    assert loaded.receipt.tensors_applied == loaded.receipt.tensors_total == 6


def test_a_tuner_of_pefts_says_that_it_needs_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "a"))
    with lorry.open(tmp_path / "a") as file:
        assert file.format == "peft-tuner" and file.sites == {}
        with pytest.raises(lorry.AdapterError, match="read onto its model"):
            file.delta("model.layers.0.self_attn.q_proj")
        assert len(file.load(llama()).entries) == 3
