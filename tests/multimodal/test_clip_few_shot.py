"""Few-shot adaptation of CLIP on folders of pictures: reading, shots, classes, Block-LoRA against LoRA."""

import json
import math

import pytest
import torch

import lorry
from lorry.core.errors import LorryError
from lorry.multimodal.clip import Recipe, accuracy, adapt, halves, linear_probe, load_base, read_folder, shots_of
from lorry.pocket import clip
from lorry.pocket.vision.albums import write_album
from lorry.systems import Run, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_album("shapes", tmp_path_factory.mktemp("album"), 4, seed=0)


@pytest.fixture(scope="module")
def data(folder):
    return read_folder(folder, clip.processor())


def recipe(method, **more):
    return Recipe(method, "a {}", **{"steps": 4, "rows": 6, "rate": 1e-2, **more})


def trained(data, method, **more):
    model, processor = clip.load()
    adapter = adapt(model, processor, data, recipe(method, **more), seed=1)
    return model, adapter


def test_a_folder_is_read_class_by_class(data):
    assert len(data) == 48 and data.pixels.shape[1:] == (3, 48, 48)
    assert data.names[:3] == ("arrow", "circle", "cross") and torch.bincount(data.labels).tolist() == [4] * 12
    some = data.of_classes(("star", "arrow"))
    assert some.names == ("star", "arrow") and sorted(some.labels.tolist()) == [0] * 4 + [1] * 4
    assert torch.equal(some.pixels[some.labels == 1], data.pixels[data.labels == 0])


def test_fewer_shots_are_among_more_and_none_is_tested(data):
    (few, rest), (more, _) = shots_of(data, 1, seed=3), shots_of(data, 3, seed=3)
    assert torch.bincount(few.labels).tolist() == [1] * 12 and len(rest) == 36
    rows = {row.numpy().tobytes() for row in more.pixels}
    assert all(row.numpy().tobytes() in rows for row in few.pixels)
    assert len(few) + len(rest) == len(data)
    assert halves(("a", "b", "c")) == (("a", "b"), ("c",))


def test_bad_input_is_refused(data, tmp_path):
    with pytest.raises(LorryError, match="leave no picture"):
        shots_of(data, 4, seed=0)
    with pytest.raises(LorryError, match="found 0"):
        read_folder(tmp_path, clip.processor())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no picture")
    with pytest.raises(LorryError, match="cannot be read as a picture"):
        read_folder(tmp_path, clip.processor())
    with pytest.raises(LorryError, match="one {} in the place"):
        Recipe(template="a photo")
    with pytest.raises(LorryError, match="found 'images'"):
        Recipe(encoder="images")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(LorryError, match="type 'llama'"):
        load_base(tmp_path)


def test_an_untrained_adapter_changes_nothing_and_both_encoders_have_it(data):
    model, processor = clip.load()
    before = model(**processor.tokenizer(["a ring"], return_tensors="pt"), pixel_values=data.pixels[:3])
    adapter = lorry.attach(model, {"method": "block-lora"}, targets=recipe({"method": "lora"}).targets)
    after = model(**processor.tokenizer(["a ring"], return_tensors="pt"), pixel_values=data.pixels[:3])
    assert torch.equal(before.logits_per_image, after.logits_per_image)
    # per layer rank x out and rank/blocks x in; 4 layers of one encoder, 3 of the other
    assert adapter.count() == 7 * 3 * (2 * 128 + 1 * 128)


def test_block_lora_is_lora_of_half_the_rank_with_twice_the_rate(data):
    """The symmetry theorem, without the weight decay that would tell them apart."""
    block, _ = trained(data, {"method": "block-lora", "rank": 4, "blocks": 2}, decay=0.0)
    half, _ = trained(data, {"method": "lora", "rank": 2, "alpha": 2 / math.sqrt(4)}, ratio=2.0, decay=0.0)
    texts = clip.processor().tokenizer(["a ring", "a star"], return_tensors="pt")
    with torch.no_grad():
        one, two = (model(**texts, pixel_values=data.pixels).logits_per_image for model in (block, half))
        base = clip.load()[0](**texts, pixel_values=data.pixels).logits_per_image
    assert torch.allclose(one, two, atol=1e-3) and (one - base).abs().max() > 0.1


def test_learning_helps_on_what_was_shown_and_fusing_keeps_it(data):
    model, adapter = trained(data, {"method": "block-lora"}, steps=40, rows=16)
    processor = clip.processor()
    before, after = accuracy(clip.load()[0], processor, data, "a {}"), accuracy(model, processor, data, "a {}")
    assert after > before + 0.1
    adapter.fuse()
    assert abs(accuracy(model, processor, data, "a {}") - after) < 0.05
    assert linear_probe(clip.load()[0], data, data) > 0.9


def test_the_system_runs_whole_on_a_folder_and_a_real_checkpoint(folder, tmp_path):
    outcome = run("block-lora-clip", Run(tmp_path / "own", effort=0.02))
    assert (tmp_path / "own" / "shots.png").stat().st_size > 1000
    assert [row[0] for row in outcome.rows][:2] == ["zero shots", "linear probe"] and len(outcome.rows) == 4
    given = Run(tmp_path / "given", effort=0.003, data=folder, base=str(clip.path()))
    assert len(run("block-lora-clip", given).rows[0]) == len(outcome.rows[0])
