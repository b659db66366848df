"""`lorry train` and `lorry sample` on a folder with a pipeline."""

import json

import pytest
import yaml
from diffusion import tiny
from typer.testing import CliRunner

from lorry.cli.main import app
from lorry.diffusion import read_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_from_a_folder_of_pictures_to_a_grid(base, tmp_path):
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), (200, 20, 20)).save(data / "a.png")
    objective = {"objective": "diffusion", "trigger": "sks square", "resolution": 16}
    job = {"name": "red", "data": str(data), "objective": objective, "rank": 2, "targets": "attention", "steps": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "out": str(tmp_path / "out"), "jobs": [job]}))
    run("train", path)
    adapter = tmp_path / "out" / "red" / "adapter"
    out = tmp_path / "pictures"
    shown = run(
        "sample", base, "-a", f"red={adapter}", "-p", "a sks square", "-p", "a dog", "--use", "none", "--use",
        "red:0.7", "--seed", 3, "--grid", "adapters x prompts", "-o", out, "--steps", 2, "--height", 16, "--width", 16,
        "--json",
    )  # fmt: skip
    report = json.loads(shown.stdout)
    assert [p["adapters"] for p in report["pictures"]] == ["none", "red:0.7"] * 2
    recipe = read_recipe(out / "001.png")
    assert recipe["prompt"] == "a sks square" and recipe["adapters"] == "red:0.7" and recipe["seed"] == 3
    assert read_recipe(out / "grid.png")["rows"] == ["a sks square", "a dog"]


def test_misuse_is_said(base, tmp_path):
    assert "give --prompt" in run("sample", base, code=2).stderr
    assert "is no pipeline of diffusers" in run("sample", base / "unet", "-p", "a cat", code=2).stderr
    said = run("sample", base, "-p", "a", "--grid", "adapters x steps", code=2).stderr
    assert "adapters x prompts" in said
    said = run("sample", base, "-p", "a", "--use", "nobody", "-o", tmp_path / "out", code=2).stderr
    assert "'nobody'" in said and not (tmp_path / "out").exists()


def test_a_probe_says_what_each_block_does(base, tmp_path):
    picture = tmp_path / "map.png"
    options = ["--steps", 1, "--height", 16, "--width", 16, "--seed", 1, "--picture", picture]
    blocks = ["--block", "mid_block.attentions.0", "--block", "up_blocks.0.attentions.0"]
    shown = run("probe", base, "-p", "a cat => red square", *blocks, *options, "--json")
    (found,) = json.loads(shown.stdout)
    assert found["first"] == "a cat" and list(found["shares"]) == blocks[1::2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "found 'a cat'" in run("probe", base, "-p", "a cat", code=2).stderr


def test_samplers_are_named_with_their_options(base, tmp_path):
    one = tmp_path / "one"
    size = ("--steps", 2, "--height", 16, "--width", 16)
    how = ("--sampler", "switch", "--sampler-option", "period=1")
    report = json.loads(run("sample", base, "-p", "a cat", "-o", one, *size, *how, "--json").stdout)
    assert report["pictures"][0]["sampler"] == {"sampler": "switch", "period": 1}
    assert "switch" in run("sample", base, "-p", "a", "--sampler", "swich", "-o", tmp_path / "two", code=2).stderr
    said = run("sample", base, "-p", "a", "--sampler-option", "period=1", "-o", tmp_path / "two", code=2).stderr
    assert "--sampler" in said and not (tmp_path / "two").exists()


def test_a_pocket_model_is_a_base_with_a_recipe_of_its_own(tmp_path):
    pytest.importorskip("lorry_pocket")
    out = tmp_path / "out"
    report = json.loads(run("sample", "pocket-flux", "-p", "a red square", "-o", out, "--steps", 2, "--json").stdout)
    recipe = report["pictures"][0]
    assert (recipe["steps"], recipe["guidance"], recipe["height"]) == (2, 4.0, 32)
