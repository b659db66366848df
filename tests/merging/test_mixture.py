"""Adapters that become one that chooses among them: from Python without a model, by a recipe, and what is refused."""

import pytest
import torch
import yaml
from core.tiny import llama, off_zero, tokens

import lorry
from lorry.core.errors import AdapterError, CheckpointError, FingerprintError, OptionError
from lorry.formats.mixture import adopting
from lorry.merging import Mixture, from_adapters, merge, merge_methods, merge_recipe, mix

FLY = {"method": "flylora", "rank": 8, "top_k": 2}
MIXERS = {
    "lora-mixer": {"router_std": 0, "inference_mode": "soft"},
    "comol": {"router_std": 0},
    "flylora": {},
}


def saved(folder, methods, targets="attention", **more):
    """Adapters in files, with all their tensors off zero; A is another one in each."""
    for seed, (name, method) in enumerate(methods.items()):
        adapter = lorry.attach(llama(), method, targets=targets, name=name, seed=seed, **more)
        off_zero(adapter, seed=seed, std=0.2)
        for entry in adapter.entries.values():
            if "bias" in entry.tensors():
                entry.tensors()["bias"].uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(seed))
        adapter.save(folder / name)
    return {name: folder / name for name in methods}


@pytest.fixture
def loras(tmp_path):
    return saved(tmp_path, {n: {"method": "lora", "rank": r, "alpha": 4} for n, r in (("math", 2), ("story", 4))})


@pytest.fixture
def flies(tmp_path):
    return saved(tmp_path, {n: {**FLY, "alpha": a} for n, a in (("one", 8), ("two", 16), ("three", None))})


def updates(adapters, inputs):
    """What the update of each adapter, alone, adds to the output of the first layer that it sits on."""
    found = {}
    for name, path in adapters.items():
        model = llama()
        adapter = lorry.load(model, path)
        found[name] = added(model, adapter, inputs)
    return found


def added(model, adapter, inputs):
    layer = model.get_submodule(next(iter(adapter.entries)))
    with torch.no_grad():
        lorry.activate(model, adapter.name)
        with_it = layer(inputs)
        lorry.activate(model, None)
        return with_it - layer(inputs)


def inputs():
    return torch.randn(3, 5, llama().config.hidden_size, generator=torch.Generator().manual_seed(5))


def recipe(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def test_methods_that_take_adapters_in_are_found_and_clash_with_no_merge_method():
    assert set(MIXERS) <= set(adopting())
    assert not set(adopting()) & set(merge_methods())
    assert "lora" not in adopting()


@pytest.mark.parametrize("weights", [None, {"one": 0.5, "two": 0.2, "three": -0.1}])
def test_flylora_averages_what_its_adapters_compute(flies, weights):
    """Each adapter keeps its own projection and its own choice of units, so the sum is exact for every token."""
    merged = mix(flies, "flylora", weights=weights)
    model, x = llama(), inputs()
    found = added(model, merged.attach(model), x)
    parts = updates(flies, x)
    weights = weights or dict.fromkeys(flies, 1 / 3)
    torch.testing.assert_close(found, sum(weights[n] * parts[n] for n in flies), atol=1e-5, rtol=1e-4)
    assert merged.adapter.method.tasks == 3 and merged.receipt.relative_error == 0.0


def test_flylora_without_the_choice_is_the_papers_formula(flies, tmp_path):
    """``Σ w scale B A`` is a plain update, which PEFT's format holds; the sum of what was trained it is not."""
    merged = mix(flies, {"method": "flylora", "select": "all"})
    expected = {}
    for path in flies.values():
        for site, entry in lorry.load(llama(), path).entries.items():
            a, b = entry.method.factors(entry.tensors(), entry.site)
            expected[site] = expected.get(site, 0) + entry.method.scale(entry.site) * (b @ a).detach() / 3
    merged.save(tmp_path / "dense", overwrite=False)
    again = lorry.load(llama(), tmp_path / "dense")
    for site, update in expected.items():
        torch.testing.assert_close(again.entries[site].delta().detach(), update, atol=1e-6, rtol=1e-5)
    x = inputs()
    model = llama()
    parts = updates(flies, x)
    dense = added(model, merged.attach(model), x)
    assert float((dense - sum(parts.values()) / 3).norm() / dense.norm()) > 0.1


def test_merged_flylora_can_be_merged_again(flies):
    names = list(flies)
    first = mix({n: flies[n] for n in names[:2]}, "flylora", name="both")
    model, x = llama(), inputs()
    adapter = first.attach(model, trainable=True)
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"B"}
    whole = mix({"both": first.file(), "three": flies["three"]}, "flylora", weights={"both": 2 / 3, "three": 1 / 3})
    other = llama()
    found = added(other, whole.attach(other), x)
    torch.testing.assert_close(found, sum(updates(flies, x).values()) / 3, atol=1e-5, rtol=1e-4)


def test_flylora_refuses_what_it_cannot_average(flies, loras, tmp_path):
    wider = saved(tmp_path, {"wide": {**FLY, "top_k": 4}})
    with pytest.raises(AdapterError, match="top_k=4"):
        mix({"one": flies["one"], **wider}, "flylora")
    with pytest.raises(AdapterError, match="merges"):
        mix({"one": flies["one"], "math": loras["math"]}, "flylora")
    with pytest.raises(AdapterError, match="FlyLoRA"):
        mix(loras, "flylora")


def test_a_merge_of_gated_adapters_names_their_own_method(flies, loras):
    with pytest.raises(AdapterError, match="method='flylora'"):
        merge(flies)
    with pytest.raises(AdapterError) as refused:
        merge({"mixed": mix(loras, "lora-mixer").file()})
    assert "method='lora-mixer'" not in str(refused.value)  # it takes in LoRAs, not its own kind


def test_a_uniform_router_is_the_weighted_average(loras):
    x, parts = inputs(), updates(loras, inputs())
    for weights in (None, {"math": 0.9, "story": 0.3}):
        merged = mix(loras, {"method": "lora-mixer", **MIXERS["lora-mixer"]}, weights=weights)
        model = llama()
        shares = weights or dict.fromkeys(loras, 0.5)
        found = added(model, merged.attach(model), x)
        torch.testing.assert_close(found, sum(shares[n] * parts[n] for n in loras), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", MIXERS)
def test_without_a_model_it_is_the_same_as_on_one(method, loras, flies):
    given = flies if method == "flylora" else loras
    options = {"method": method, **MIXERS[method]}
    model, other = llama(), llama()
    ids = tokens()
    from_adapters(model, options, given, name="mix", seed=3)
    made = mix(given, options, seed=3)
    made.attach(other, "mix")
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert bool(made.receipt.relative_error > 1e-3) is (method == "comol")  # it keeps what lies in the first's spaces


@pytest.mark.parametrize("method", MIXERS)
def test_a_recipe_makes_a_mixture(method, loras, flies, tmp_path):
    given = flies if method == "flylora" else loras
    weights = {name: 0.2 * (place + 1) for place, name in enumerate(given)}
    path = recipe(
        tmp_path,
        inputs={n: {"path": n, "weight": weights[n]} for n in given},
        method=method,
        options=MIXERS[method],
        out="mixed",
    )
    made = merge_recipe(path)
    assert isinstance(made, Mixture) and made.receipt.notes
    model, other = llama(), llama()
    lorry.load(model, tmp_path / "mixed", name="mixed", expect=method)
    twin = from_adapters(other, {"method": method, **MIXERS[method]}, given, weights=weights)
    for place, entry in lorry.adapters(model)["mixed"].entries.items():
        for name, tensor in entry.tensors().items():
            assert torch.equal(tensor, twin.entries[place].tensors()[name])
    with pytest.raises(CheckpointError, match="recipe"):
        merge_recipe(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "lora-mixr"}, "lora-mixer"),
        ({"method": "lora"}, "comol, flylora, lora-mixer"),
        ({"options": {"experts_": 2}}, "experts"),
        ({"schedule": [{"layers": [0, 1]}]}, "no schedule"),
        ({"inputs": {"math": {"path": "math", "weight": [0.1, 0.2]}}}, "one number"),
    ],
)
def test_bad_recipes_are_refused(change, words, loras, tmp_path):
    path = recipe(tmp_path, **{"inputs": {n: n for n in loras}, "method": "lora-mixer", "out": "x", **change})
    with pytest.raises(OptionError, match=words):
        merge_recipe(path)
    assert not (tmp_path / "x").exists()


def test_experts_of_other_bases_and_sites_are_refused(loras, tmp_path):
    torch.manual_seed(9)
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    lorry.attach(model, "lora", targets="attention", name="strange").save(tmp_path / "strange")
    with pytest.raises(FingerprintError, match="one base"):
        mix({"math": loras["math"], "strange": tmp_path / "strange"}, "lora-mixer")
    mix({"math": loras["math"], "strange": tmp_path / "strange"}, "lora-mixer", check_base=False)
    narrow = saved(tmp_path, {"narrow": "lora"}, targets="q_proj")
    with pytest.raises(AdapterError, match="same sites"):
        mix({"math": loras["math"], **narrow}, "comol")
    with pytest.raises(OptionError, match="Weights must be given"):
        mix(loras, "comol", weights={"math": 1.0})
