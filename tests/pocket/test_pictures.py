"""The world of pictures: rendering, captions, tokenizers."""

import hashlib
import random

import pytest
import torch

from lorry.pocket.diffusion import BASE, NOVEL, TRIGGERS, Scene, Thing, caption, draw, pictures, render, restyle
from lorry.pocket.diffusion.tokenizer import TOKENS, clip_tokenizer, t5_tokenizer
from lorry.pocket.diffusion.world import vocabulary

#: Of the pictures of the first hundred scenes below: integers alone make them, so no machine may differ.
DIGEST = "5316dfed6146bf49fe5296227d75d61c38536ecd8a28533af6db094d0d8b85f9"


def scenes(count, seed=0, **choices):
    rng = random.Random(seed)
    return [draw(rng, choices=choices) for _ in range(count)]


def all_words(name):
    return {name: [*BASE[name], *NOVEL[name]]}


def test_pictures_are_the_same_bytes_everywhere():
    shown = pictures(scenes(100, **all_words("texture"), **all_words("background"), **all_words("style")))
    assert shown.dtype == torch.uint8 and shown.shape == (100, 3, 32, 32)
    assert hashlib.sha256(shown.numpy().tobytes()).hexdigest() == DIGEST


@pytest.mark.parametrize("attribute", ["shape", "colour", "texture", "background", "style"])
def test_every_word_makes_another_picture(attribute):
    start = Scene((Thing("square", "red", "plain"),), "white", "middle")
    words = [*BASE[attribute], *NOVEL[attribute]]
    shown = {render(restyle(start, attribute, word)).numpy().tobytes() for word in words}
    assert len(shown) == len(words)


def test_a_scene_is_drawn_where_its_layout_says():
    white = torch.full((3, 32, 32), 245, dtype=torch.uint8)
    for layout, (down, across) in {"left": (16, 10), "right": (16, 22), "top": (10, 16), "bottom": (22, 16)}.items():
        inked = (render(Scene((Thing("square", "red", "plain"),), "white", layout)) != white).any(0).nonzero().float()
        assert (inked.mean(0) - torch.tensor([down - 0.5, across - 0.5])).abs().max() < 0.01
    pair = Scene((Thing("circle", "red", "plain"), Thing("circle", "blue", "plain")), "white", "beside")
    assert render(pair)[:, 16, 8].tolist() == [220, 40, 40] and render(pair)[:, 16, 24].tolist() == [50, 80, 220]


def test_captions_say_what_is_there_and_leave_out_what_is_asked():
    pair = Scene((Thing("ring", "orange", "striped"), Thing("cross", "blue", "plain")), "sky", "beside")
    assert caption(pair) == "an orange striped ring left of a blue plain cross on a sky background"
    assert caption(pair, ("colour", "background")) == "a striped ring left of a plain cross"
    one = Scene((Thing("moon", "red", "plain"),), "grey", "top", "framed")
    assert caption(one) == "a red plain moon at the top on a grey background in framed style"
    assert caption(one, ("shape", "layout", "style")) == "a red plain shape on a grey background"


def test_draws_refuse_what_the_world_does_not_know():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="found mauve"):
        draw(rng, choices={"colour": ["mauve"]})
    with pytest.raises(ValueError, match="layout of 3 things"):
        draw(rng, things=3)
    with pytest.raises(ValueError, match="2 things for the layout beside"):
        render(Scene((Thing("ring", "red", "plain"),), "sky", "beside"))


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_every_word_is_one_token_and_captions_have_no_unknown_ones(make):
    tokenizer = make()
    words = vocabulary()
    ends = len(tokenizer("").input_ids)
    assert all(len(tokenizer(word).input_ids) == 1 + ends for word in (*words, *TRIGGERS))
    assert len({tuple(tokenizer(word).input_ids) for word in words}) == len(words)
    for scene in scenes(200, **all_words("shape"), **all_words("colour"), **all_words("style")):
        text = caption(scene)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + ends and len(ids) <= TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_words_from_outside_are_spelled():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    assert clip.convert_ids_to_tokens(clip("xyl").input_ids)[1:-1] == ["x", "y", "l</w>"]
    assert t5.unk_token_id not in t5("a [v] xylograph, 42").input_ids
