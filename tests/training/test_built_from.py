"""Jobs whose adapter is made from other adapters: from flags and YAML alike, resumed, and what is refused."""

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import AdapterError, OptionError
from lorry.formats.mixture import from_adapters
from lorry.training import Job, train


@pytest.fixture
def experts(tmp_path):
    """Two LoRAs on the attention of the tiny base."""
    paths = []
    for seed, name in enumerate(("math", "story")):
        adapter = lorry.attach(
            tiny_llama(), {"method": "lora", "rank": 2 + seed}, targets="attention", name=name, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapter.save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def job(experts, method="lora-mixer", **more):
    options = {"steps": 3, "batch_size": 3, "seed": 1, "learning_rate": 1e-2, **more}
    return Job("router", token_rows(12, (5, 14), 1), method, built_from=experts, **options)


@pytest.mark.parametrize("method", ["lora-mixer", "comol"])
def test_a_job_trains_what_the_method_leaves_free(experts, method, tmp_path):
    made = train(tiny_llama(), None, [job([str(p) for p in experts], method)], tmp_path / "run")
    assert made.ok
    adapter = made.adapters["router"]
    start = from_adapters(tiny_llama(), method, experts, name="router", seed=1)
    assert set(adapter.entries) == set(start.entries)
    trained = {n for n, _ in adapter.named_parameters()}
    assert any(n.endswith("router") for n in trained)
    for name, tensor, _ in start.named_tensors():
        now = dict((n, t) for n, t, _ in adapter.named_tensors())[name]
        assert torch.equal(tensor, now) is (name not in trained)
    again = lorry.load(tiny_llama(), tmp_path / "run" / "router" / "adapter")
    for name, tensor, _ in again.named_tensors():
        assert torch.equal(tensor, dict((n, t) for n, t, _ in adapter.named_tensors())[name])


def test_weights_and_names_of_the_experts(experts, tmp_path):
    given = {"a": {"path": str(experts[0]), "weight": 1.5}, "b": {"path": str(experts[1]), "weight": 0.25}}
    adapter = train(tiny_llama(), None, [job(given)], tmp_path / "run").adapters["router"]
    scales = next(iter(adapter.entries.values())).tensors()["scales"]
    torch.testing.assert_close(scales, torch.tensor([3.0, 0.5]))


def test_a_resumed_job_goes_on_as_if_it_had_not_stopped(experts, tmp_path):
    whole = train(tiny_llama(), None, [job(experts, steps=4)], tmp_path / "whole").adapters["router"]
    train(tiny_llama(), None, [job(experts, steps=4)], tmp_path / "parts", checkpoint_every=2)
    newest = max((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    if len(list((tmp_path / "parts" / "checkpoints").iterdir())) > 1:
        for file in sorted(newest.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        newest.rmdir()
    again = train(tiny_llama(), None, [job(experts, steps=4)], tmp_path / "parts", resume=True).adapters["router"]
    for (name, one, _), (_, other, _) in zip(whole.named_tensors(), again.named_tensors(), strict=True):
        assert torch.equal(one, other), name


def test_what_a_job_cannot_be_built_from(experts, tmp_path):
    paths = [str(p) for p in experts]
    for change, words in (
        ({"method": "lora"}, "comol, flylora, lora-mixer"),
        ({"targets": "q_proj"}, "targets has no place"),
        ({"layers": (0,)}, "layers has no place"),
    ):
        with pytest.raises(OptionError, match=words):
            job(paths, **change)
    with pytest.raises(OptionError, match="path, weight"):
        job({"a": {"path": paths[0], "wait": 1}})
    with pytest.raises(OptionError, match="none have|have none"):
        job({"a": {"path": paths[0], "weight": 1}, "b": paths[1]})
    with pytest.raises(OptionError, match="nothing left to train"):
        train(tiny_llama(), None, [job(paths[:1])], tmp_path / "run")
    with pytest.raises(AdapterError, match="neither an adapter"):
        train(tiny_llama(), None, [job([*paths, "nowhere"])], tmp_path / "run")
