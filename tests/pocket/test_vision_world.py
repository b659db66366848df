"""The pictures with questions about them, the pocket CLIP, and what both processors make of pictures."""

import hashlib
import random

import pytest
import torch

from lorry.pocket import clip
from lorry.pocket.vision import questions as asking
from lorry.pocket.vision.glyphs import CHARACTERS, glyph
from lorry.pocket.vision.networks import clip_processor, pixels, vlm_processor
from lorry.pocket.vision.world import Page, Scene, Thing, caption, draw_page, draw_written, pictures, render

#: Of the pictures of the first three questions of each skill: integers alone make them, so no machine may differ.
DIGEST = "30135ac9b30cdf329a2a572026c7478356bc031fd8c36c5a3f0dfbe12e8257b6"


def test_pictures_are_the_same_bytes_everywhere():
    shown = pictures(one.picture for skill in asking.skills() for one in asking.questions(skill, "train", 3, seed=0))
    assert shown.shape == (60, 3, 48, 48) and shown.dtype == torch.uint8
    assert hashlib.sha256(shown.numpy().tobytes()).hexdigest() == DIGEST


def test_characters_differ_and_stay_in_their_cell():
    shapes = {glyph(one).numpy().tobytes() for one in CHARACTERS}
    assert len(shapes) == len(CHARACTERS) == 37
    with pytest.raises(ValueError, match="found 'ä'"):
        glyph("ä")


def test_a_page_shows_its_title_and_lines_where_they_belong():
    page = render(Page("abc", (("fox", 42),)))
    bright, dark = torch.tensor([240, 240, 230]), torch.tensor([30, 30, 30])
    assert torch.equal((page[:, :8, 8:16] == bright[:, None, None]).all(0), glyph("b"))
    assert torch.equal((page[:, 8:16, 32:40] == dark[:, None, None]).all(0), glyph("4"))
    with pytest.raises(ValueError, match="7 characters"):
        render(Page("toolong", ()))


def test_answers_are_true_of_their_pictures():
    for one in asking.questions("above", "test", 40, seed=1):
        asked = one.prompt.removeprefix("above:").removesuffix(">")
        here, other = sorted(one.picture.things, key=lambda thing: thing.shape != asked)
        assert one.answer == (other.shape if other.row < here.row else "none")
    for one in asking.questions("number", "test", 20, seed=1):
        word = one.prompt.removeprefix("number:").removesuffix(">")
        assert (word, int(one.answer)) in one.picture.lines
    for one in asking.questions("many", "train", 20, seed=1):
        colour = one.prompt.removeprefix("many:").removesuffix(">")
        assert int(one.answer) == sum(thing.colour == colour for thing in one.picture.things) > 0
    assert {one.answer for one in asking.questions("digit", "test", 80, seed=1)} == set("0123456789")


def test_questions_are_drawn_by_seed_and_split():
    first = asking.questions("core", "train", 5, seed=0)
    assert first == asking.questions("core", "train", 5, seed=0) != asking.questions("core", "train", 5, seed=1)
    titles = {
        split: {one.answer for one in asking.questions("title", split, 200, seed=0)} for split in ("train", "test")
    }
    assert not titles["train"] & titles["test"]
    rng = random.Random(0)
    assert all(draw_written(rng, "train").number < 110 <= draw_written(rng, "test").number for _ in range(50))
    with pytest.raises(KeyError, match="did you mean count"):
        asking.skill("cuont")
    with pytest.raises(ValueError, match="found 'dev'"):
        asking.questions("count", "dev", 1, seed=0)


def test_captions_name_what_is_there():
    rng = random.Random(0)
    scene = Scene((Thing("ring", "red", "dotted", 0), Thing("cross", "blue", "plain", 5)), "sand")
    text = caption(rng, scene, full=True)
    assert text == ("a red dotted ring at the top left and a blue plain cross at the middle right on a sand background")
    tokenizer = clip_processor().tokenizer
    assert len(tokenizer(text).input_ids) == len(text.split()) + 2 <= tokenizer.model_max_length
    assert draw_page(rng, lines=5).texts[0].isalpha()


def test_processors_read_files_as_the_training_read_pixels():
    from PIL import Image

    shown = pictures(one.picture for one in asking.questions("colour", "test", 2, seed=2))
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in shown]
    for processor in (clip_processor(), vlm_processor()):
        found = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        assert torch.allclose(found, pixels(shown), atol=1e-6)


def test_the_clip_knows_its_words_and_not_the_held_out_ones():
    model, processor = clip.load()
    assert type(model).__name__ == "CLIPModel" and not model.training
    found = clip.zero_shot(model, processor, 100, seed=5)
    assert found["shape"] >= 0.95 and found["colour"] >= 0.95 and found["background"] >= 0.95, found
    assert found["digit"] <= 0.6, found


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("lorry.pocket.vision.loading.weights", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="--parts pocket-clip"):
        clip.load()
