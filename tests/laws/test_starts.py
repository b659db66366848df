"""The laws that every registered start keeps; a new start is tested by existing."""

from __future__ import annotations

import pytest
import torch
from core.tiny import same_bytes, snapshot, unchanged
from methods.small import batch, stack
from safetensors.torch import save_file
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.formats.export import export_plain
from lorry.training import Fleet, Job
from lorry.training.starts import STARTS, apply_start

BATCHES = [batch(40, seed=s) * torch.linspace(3, 0.1, 16) + 0.3 for s in (1, 2)]
STRUCTURES = ("lora", "rslora", "dora", "lora-fa", "mos-lora", "lora-xs")


def full_weights(folder, base):
    """A file with the weights from which a base may have been quantised."""
    draw = torch.Generator().manual_seed(8)
    noisy = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in base.state_dict().items()}
    save_file({n: t.contiguous() for n, t in noisy.items()}, folder / "full.safetensors")
    return str(folder / "full.safetensors")


def another_adapter(folder, base):
    """A saved adapter on the base, of the rank that these tests use."""
    lorry.attach(base, {"method": "lora", "rank": 3}, name="other", seed=77).save(folder / "other")
    return str(folder / "other")


#: Options without which a start cannot be made, from a folder and the base.
NEEDS = {"loftq": {"original": full_weights}, "shared-down": {"adapter": another_adapter, "sites": "*"}}
over_starts = pytest.mark.parametrize("start", list(STARTS))


def loss(model, x):
    return (model(x) - x.roll(1, -1)).square().mean()


def made(start, tmp_path, base=None):
    """The start with what it needs for this base (a model of random weights)."""
    options = NEEDS.get(start, {})
    return STARTS[start](**{k: v(tmp_path, base) if callable(v) else v for k, v in options.items()})


def structures(start):
    """The methods that take a start; every start takes at least one."""
    for structure in STRUCTURES:
        adapter = lorry.attach(stack(), {"method": structure, "rank": 3}, name="a")
        try:
            for entry in adapter.entries.values():
                start.check_entry(entry)
        except lorry.SiteError as refused:
            assert start.name in str(refused) and structure.replace("rslora", "lora") in str(refused)
            continue
        yield structure


def started(start, structure, seed=1, **options):
    model = stack()
    adapter = lorry.attach(model, {"method": structure, "rank": 3, **options}, name="a", seed=5)
    apply_start(start, adapter, BATCHES, loss, seed)
    return model, adapter


def tensors(adapter):
    return {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}


def stirred(adapter):
    """Trained tensors moved off their start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@over_starts
def test_the_function_is_unchanged_and_the_base_untouched(start, tmp_path):
    x, start = batch(), made(start, tmp_path, stack())
    taken = list(structures(start))
    assert taken
    for structure in taken:
        plain = stack()
        before, expected = snapshot(plain), plain(x)
        model, adapter = started(start, structure, alpha=4.0)
        assert unchanged(model, before)
        moved = (model(x) - expected).abs().max()
        assert (moved < 1e-5) == start.keeps_function, f"{structure}: {moved}"
        model.train()
        assert torch.allclose(model(x), expected, atol=1e-5) == start.keeps_function
        adapter.detach()
        assert unchanged(model, before) and same_bytes(model(x), expected)


@over_starts
def test_the_seed_decides_and_nothing_else(start, tmp_path):
    start = made(start, tmp_path, stack())
    for structure in structures(start):
        first = tensors(started(start, structure)[1])
        torch.manual_seed(99)
        torch.rand(7)
        second = tensors(started(start, structure)[1])
        assert first.keys() == second.keys()
        assert all(torch.equal(t, second[n]) for n, t in first.items())


@over_starts
def test_saved_and_loaded_and_exported_as_plain_lora(start, tmp_path):
    x, start = batch(), made(start, tmp_path, stack())
    for structure in structures(start):
        model, adapter = started(start, structure, alpha=4.0)
        stirred(adapter).save(tmp_path / structure)
        other = stack()
        loaded = lorry.load(other, tmp_path / structure)
        assert torch.equal(other(x), model(x))
        assert all(torch.equal(t, tensors(adapter)[n]) for n, t in tensors(loaded).items())
        if "plain" in adapter.method.capabilities:
            export_plain(adapter, tmp_path / f"{structure}-plain")
            third = stack()
            plain = lorry.load(third, tmp_path / f"{structure}-plain")
            assert type(plain.method) is lorry.LoRA and plain.method.rank in (3, 6)
            assert torch.allclose(third(x), model(x), atol=1e-5)


@over_starts
def test_every_trained_tensor_and_no_other_gets_a_gradient(start, tmp_path):
    start = made(start, tmp_path, stack())
    for structure in structures(start):
        model, adapter = started(start, structure)
        stirred(adapter)
        loss(model, BATCHES[0]).backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{structure}: '{name}' gets no gradient"
        frozen = [t for n, t, spec in adapter.named_tensors() if not spec.trained]
        assert not any(t.requires_grad for t in frozen)


@over_starts
def test_alone_is_as_in_a_fleet(start, tmp_path):
    def jobs():
        needs = made(start, tmp_path, tiny_llama())
        structure = next(structures(needs))
        options = {"steps": 3, "batch_size": 3, "calibration": 4}
        method = {"method": structure, "rank": 3}
        yield Job("job", token_rows(12, (5, 14), 1), method, start=needs, seed=1, **options)
        yield Job("other", token_rows(12, (9, 20), 2), {"method": "dora", "rank": 2}, seed=2, **options)

    first, second = jobs()
    alone = Fleet(tiny_llama(), None, [first], tmp_path / "alone")
    together = Fleet(tiny_llama(), None, [second, first], tmp_path / "both")
    pair = alone.runs[0].adapter, together.runs[1].adapter
    begun = [tensors(adapter) for adapter in pair]
    assert all(torch.equal(t, begun[1][n]) for n, t in begun[0].items())
    assert alone.train().ok and together.train().ok
    for (name, one, spec), (_, two, _) in zip(*(a.named_tensors() for a in pair), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name
        assert spec.trained or torch.equal(one, begun[0][name])


def in_a_trainer(start, structure, folder, steps=4):
    """A Hugging Face Trainer with a start on a fresh adapter of a tiny Llama."""
    from training.test_huggingface import options
    from transformers import Trainer, TrainingArguments

    from lorry.training.huggingface import with_adapters

    model = tiny_llama()
    lorry.attach(model, {"method": structure, "rank": 3}, name="job", seed=1)
    data = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in token_rows(32, (12, 12), 1).rows]
    arguments = TrainingArguments(**options(folder, steps=steps, save_steps=2))
    return with_adapters(Trainer, start=start)(model, arguments, train_dataset=data)


@over_starts
def test_a_trainer_begins_with_it_and_resumes(start, tmp_path):
    start, before = made(start, tmp_path, tiny_llama()), snapshot(tiny_llama())
    structure = next(iter(structures(start)))
    (straight := in_a_trainer(start, structure, tmp_path / "run")).train()
    (plain := in_a_trainer(None, structure, tmp_path / "plain")).train()
    first, usual = (next(row["loss"] for row in t.state.log_history if "loss" in row) for t in (straight, plain))
    assert (abs(first - usual) < 1e-4) == start.keeps_function
    expected, other = (tensors(lorry.adapters(t.model)["job"]) for t in (straight, plain))
    assert any(n not in other or not torch.equal(t, other[n]) for n, t in expected.items())
    assert unchanged(straight.model, before)
    resumed = in_a_trainer(start, structure, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = tensors(lorry.adapters(resumed.model)["job"])
    assert all(torch.equal(t, found[n]) for n, t in expected.items())
    again = type(straight)(straight.model, straight.args, train_dataset=straight.train_dataset)
    with pytest.raises(lorry.AdapterError, match="begun with a start already"):
        again.train()
