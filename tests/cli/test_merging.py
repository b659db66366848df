"""Adapters with each other on the command line: recipes and comparison."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorry as package
from lorry import merging


@pytest.fixture
def pair(base: Path, tmp_path: Path) -> list[Path]:
    folders = []
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(base)
        adapter = package.attach(model, package.LoRA(rank=2), name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapter.save(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


def test_a_recipe_gives_an_ordinary_adapter_and_a_receipt(lorry, base: Path, pair: list[Path], tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "inputs": {p.name: {"path": str(p), "weight": w} for p, w in zip(pair, (1.0, -0.5), strict=True)},
                "method": "cat",
            }
        )
    )
    result = lorry("merge", recipe, "--out", tmp_path / "both", "--json")
    assert result.exit_code == 0, result.stderr
    assert "one" in result.stdout and "two" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(6)[None]
    for path in (*pair, tmp_path / "both"):
        package.load(model, path, name=path.name)
    package.activate(model, {"one": 1.0, "two": -0.5})
    wanted = model(ids).logits
    package.activate(model, "both")
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_recipe_takes_no_adapters_beside_it(lorry, pair: list[Path], tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("inputs: {}\n")
    result = lorry("merge", recipe, "--adapter", pair[0], "--out", tmp_path / "x")
    assert result.exit_code == 2 and "names the adapters itself" in result.stderr


@pytest.mark.parametrize("method", ["comol", "lora-mixer", "cat"])
def test_adapters_are_merged_with_each_other_by_flags(lorry, base: Path, pair: list[Path], tmp_path: Path, method: str):
    """A mixture or a plain merge: the same as the function of Python with the same weights."""
    options = [] if method == "cat" else ["-o", "router_std=0"]
    goal = tmp_path / "both"
    given = ["merge", "-m", method, *options, "-a", f"{pair[0]}:0.75", "-a", f"{pair[1]}:0.25", "--out", goal]
    result = lorry(*given)
    assert result.exit_code == 0, result.stderr
    assert method in result.stdout and "both" in {p.name for p in tmp_path.iterdir()}
    weights = {"one": 0.75, "two": 0.25}
    inputs = {p.name: p for p in pair}
    if method == "cat":
        made = merging.merge(inputs, method=method, weights=weights)
    else:
        made = merging.mix(inputs, {"method": method, "router_std": 0}, weights=weights)
    ids = torch.arange(6)[None]
    logits = []
    for attach in (lambda model: package.load(model, goal), made.attach):
        model = AutoModelForCausalLM.from_pretrained(base)
        attach(model)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits)
    again = lorry(*given)
    assert again.exit_code != 0 and lorry(*given, "--overwrite").exit_code == 0


def test_flags_of_a_merge_that_do_not_go_together(lorry, pair: list[Path], tmp_path: Path):
    for arguments, words in (
        (["merge", "pocket", "-m", "comol", "-a", pair[0], "--out", tmp_path / "x"], "no place beside"),
        (["merge", "-m", "comol", "--out", tmp_path / "x"], "at least one --adapter"),
        (["merge", "-m", "comul", "-a", pair[0], "--out", tmp_path / "x"], "comol"),
    ):
        result = lorry(*arguments)
        assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "x").exists()


def test_comparison_as_table_data_and_picture(lorry, run_json, pair: list[Path], tmp_path: Path):
    assert "cos" in lorry("compare", *pair, "--heatmap", tmp_path / "c.png").stdout.lower()
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert {"one", "two"} <= set(json.dumps(run_json("compare", *pair)).replace('"', " ").split())
