"""Adapters with each other on the command line: recipes and comparison."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorry as package


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


def test_comparison_as_table_data_and_picture(lorry, run_json, pair: list[Path], tmp_path: Path):
    assert "cos" in lorry("compare", *pair, "--heatmap", tmp_path / "c.png").stdout.lower()
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert {"one", "two"} <= set(json.dumps(run_json("compare", *pair)).replace('"', " ").split())
