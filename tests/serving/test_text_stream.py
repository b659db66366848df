"""Tokens to text, piece by piece: nothing lost, nothing early, stopped at the right place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.tokenizers_of_tests import byte_level, pocket, stories

from lorry.serving.sampling import TextStream

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
EMOJI = "a🙂b é日"


@pytest.fixture(scope="session", params=["pocket", "stories", "byte_level"])
def tokenizer(request):
    if request.param == "stories":
        return stories(request.getfixturevalue("shared"))
    return {"pocket": pocket, "byte_level": byte_level}[request.param]()


def streamed(tokenizer, tokens, stop=(), chunk=1, **options):
    stream = TextStream(tokenizer, stop, **options)
    pieces = [stream.push(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    return "".join([*pieces, stream.finish()]), stream.stopped


@QUICK
@given(data=st.data(), skip=st.booleans(), chunk=st.integers(1, 5))
def test_pieces_joined_are_the_decoded_whole(tokenizer, data, skip, chunk):
    # tokens beyond the tokenizer's are entries of padded logits
    near = st.integers(0, min(len(tokenizer) + 3, 270))
    tokens = data.draw(st.lists(near | st.integers(0, len(tokenizer) + 3), max_size=24))
    whole = tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert streamed(tokenizer, tokens, chunk=chunk, skip_special_tokens=skip) == (whole, None)


@QUICK
@given(data=st.data(), chunk=st.integers(1, 5), stop=st.lists(st.text("ab {", min_size=1, max_size=4), max_size=3))
def test_stops_at_the_text_that_is_complete_first_however_it_is_cut(tokenizer, data, chunk, stop):
    text = data.draw(st.text("ab {é", max_size=30))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    expected = (text, None) if not ends else (text[: min(ends)[0] + min(ends)[1]], min(ends)[2])
    assert streamed(tokenizer, tokens, tuple(stop), chunk) == expected


def test_a_character_comes_whole(tokenizer):
    tokens = tokenizer(EMOJI, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_comes_at_the_end():
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    half = tokenizer("🙂", add_special_tokens=False)["input_ids"][:1]
    half = half if tokenizer.decode(half) == "\ufffd" else tokenizer.convert_tokens_to_ids(["ð", "Ł"])
    assert stream.push(half) == ""
    assert stream.finish() == tokenizer.decode(half)


def test_text_comes_as_soon_as_it_cannot_be_a_stop_text():
    tokenizer = pocket()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stream = TextStream(tokenizer, ("END", "ENOUGH"))
    assert [stream.push(ids(c)) for c in "xENyEEN"] == ["x", "", "", "ENy", "", "E", ""]
    assert stream.push(ids("D and more")) == ""
    assert stream.stopped == "END"
    assert (stream.push(ids("z")), stream.finish()) == ("", "")


def test_no_stop_text_counts_within_the_least_number_of_tokens():
    tokenizer = pocket()
    tokens = tokenizer("abcabcab", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, tokens, ("bc",), min_tokens=2) == ("a", "bc")
    assert streamed(tokenizer, tokens, ("bc",), min_tokens=3) == ("abca", "bc")
    assert streamed(tokenizer, tokens, ("bc",), min_tokens=6) == ("abcabcab", None)
