"""AuthenLoRA whole: what a run leaves, what it keeps private, and that it runs on a pipeline, too."""

import json

import pytest
import torch
from diffusion import tiny
from PIL import Image

import lorry
from lorry.core.errors import OptionError
from lorry.protection.bake import bake
from lorry.protection.messages import from_text
from lorry.systems import Run, run
from lorry.systems.authenlora.stages import BITS, OnPipeline, stage_for


def test_a_run_leaves_copies_proofs_and_pictures(tmp_path):
    outcome = run("authenlora", Run(tmp_path / "out", effort=0.004))
    assert {row[0] for row in outcome.rows} == {"nobody", "anna", "ben"} and len(outcome.rows) == 6
    assert all(0 <= row[2] <= 1 and 0 <= row[3] <= 1 for row in outcome.rows)
    for file in outcome.files:
        assert (tmp_path / "out" / file).exists(), file
    for user in ("anna", "ben"):
        secret = json.loads((tmp_path / "out" / "private" / f"{user}.json").read_text())["message"]
        copy = lorry.open(tmp_path / "out" / user)
        assert copy.method.info.slug == "lora"
        public = "".join(p.read_text(errors="ignore") for p in (tmp_path / "out" / user).iterdir())
        assert len(secret) == BITS and secret not in public
    again = run("authenlora", Run(tmp_path / "out", effort=0.004))
    assert again.rows == outcome.rows, "a second run replaces the first and finds the same"


def test_the_same_steps_on_a_pipeline(tmp_path):
    pipeline = tiny.pipeline("sd")
    records = [{"image": Image.new("RGB", (16, 16), c), "text": "a red square"} for c in ("red", "blue")]
    stage = OnPipeline(pipeline, records, torch.zeros(1, 3, 16, 16), {"steps": 2, "guidance": 2.0})
    done = []
    codec = stage.codec(2, 0, done.append)
    stage.train(codec, 1, 0, tmp_path / "run")
    try:
        assert done == [1, 2] and stage.draw(3, 0).shape == (3, 3, 16, 16)
    finally:
        for bundle in lorry.adapters(pipeline).values():
            bundle.detach()
    trained = lorry.open(tmp_path / "run" / "signed" / "adapter")
    assert bake(trained, from_text("11001010")).method.info.slug == "lora"


def test_a_real_checkpoint_needs_pictures(tmp_path):
    with pytest.raises(OptionError, match="give their folder, with captions, as --data"):
        stage_for(str(tmp_path), None, 0, 1)
