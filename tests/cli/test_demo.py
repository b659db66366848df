"""`lorry demo` on the pocket model, with few steps."""

from __future__ import annotations

import json
import math
import sys

import pytest

from lorry import pocket
from lorry.demo import drawing, page
from lorry.demo.job import Demo

pytestmark = pytest.mark.skipif(
    not (pocket.PATH / "model.safetensors").is_file(), reason="the pocket model's weights are not built"
)


def test_the_demo_writes_its_report(run_json, tmp_path):
    shown = run_json("demo", "--out", tmp_path, "--steps", 12, "--test-rows", 16, "--picture-steps", 0)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == shown
    assert report.keys() == {"adapters", "fuse", "peft_max_difference", "pictures", "seconds"}
    assert report["pictures"] is None
    assert len(report["adapters"]) == 4
    assert all(a.keys() == {"name", "before", "after"} for a in report["adapters"])
    assert report["fuse"]["base_restored"] is True
    assert all(r["tensors_applied"] == r["tensors_total"] for r in report["fuse"]["receipts"])
    assert report["fuse"]["max_difference_fused_composed"] < 1e-3
    if report["peft_max_difference"] is not None:
        assert math.isfinite(report["peft_max_difference"]) and report["peft_max_difference"] < 1e-4
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no pictures were asked for" in page
    for picture in ("before-after.png", "losses.png", "heat-map.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for row in report["adapters"]:
        assert (tmp_path / "adapters" / row["name"] / "adapter_config.json").is_file()


def test_the_grid_shows_every_prompt_under_every_composition(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("lorry_pocket")
    from lorry.diffusion import read_recipe

    said = []
    drawn = drawing.try_grid(tmp_path, 2, said.append, False)
    recipe = read_recipe(tmp_path / "pictures.png")
    assert recipe["columns"] == ["none", "shape", "colour", "shape+colour"] and len(recipe["rows"]) == 3
    cells = [(prompt, seed, column) for seed, prompt in enumerate(drawn.prompts) for column in recipe["columns"]]
    found = [(r["prompt"], r["seed"], r["adapters"]) for r in recipe["grid"]]
    assert [(p, s, set(c.split("+"))) for p, s, c in found] == [(p, s, set(c.split("+"))) for p, s, c in cells]
    for name in ("shape", "colour"):
        assert (tmp_path / "pictures" / name / "adapter" / "adapter_model.safetensors").is_file()
    assert drawn.seen.keys() == set(recipe["columns"]) and len(said) == 1
    text = "\n".join(page.pictures(Demo(tmp_path, pictures=drawn)))
    assert "(pictures.png)" in text and all(f"`{prompt}`" in text for prompt in drawn.prompts)


def test_without_the_weights_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lorry_pocket", None)
    said = []
    (tmp_path / "pictures.png").write_bytes(b"of an earlier run")
    left_out = drawing.try_grid(tmp_path, 2, said.append, False)
    assert "lorry-pocket" in left_out and left_out in said[0]
    assert left_out in "\n".join(page.pictures(Demo(tmp_path, pictures=left_out)))
    assert not (tmp_path / "pictures.png").exists()
