"""Regular expressions of files: the same answers as Python's, in bounded time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorry
from lorry.formats import patterns
from lorry.formats.patterns import Pattern

_ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "[a-c.]", "1", r"\b", "^", "$"]
_REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "*?"]


def _repeatable(atom):
    return atom not in (r"\b", "^", "$")


_tree = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.lists(st.tuples(inner, st.sampled_from(_REPEATS)), min_size=1, max_size=4).map(
            lambda parts: "".join(f"(?:{p}){r}" if _repeatable(p) and r else p for p, r in parts)
        ),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(text=_tree, path=st.text("ab.1_", max_size=7), followed=st.booleans())
def test_both_matchers_agree_with_python(text, path, followed):
    limit = patterns._MOST_WAYS
    patterns._MOST_WAYS = -1.0 if followed else limit
    try:
        found = Pattern(text).fullmatch(path)
    finally:
        patterns._MOST_WAYS = limit
    assert found == (re.fullmatch(text, path) is not None)


@pytest.mark.parametrize(
    "text", [r"(a+)+b", r"(a|a)*b", r"(a|aa)+b", r"(.*a){20}b", r"(a?){40}a{40}b", "a*" * 30 + "b", r"(?=(a+)+b)a"]
)
def test_patterns_that_python_would_never_finish_end_at_once(text):
    assert not Pattern(text).fullmatch("a" * 300)


@pytest.mark.parametrize(
    "text, words",
    [
        (r"(a)\1", r"'\\1'"),
        (r"(?<=a)b", r"'\(\?<='"),
        (r"(?i)a", r"'\(\?i\)'"),
        ("a{1,100000}", "more than 1000 repeats"),
        ("(a{900}){900}" + "(b+)+", "too large"),
        ("(" * 60 + "a" + ")" * 60, "nested groups"),
        ("(", "wrong regular expression"),
        ("a" * 300_000, "at most 200000 characters"),
    ],
)
def test_what_is_not_understood_is_refused(text, words):
    with pytest.raises(lorry.CheckpointError, match=words):
        Pattern(text)


def test_what_trainers_of_vision_models_write():
    text = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|ffn|dense).*?(?:k_proj|q_proj|v_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|q_proj|down_proj)))"
    )
    paths = [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.layers.11.mlp.down_proj",
        "model.layers.x.mlp.down_proj",
        "model.vision.blocks.0.attn.qkv",
    ]
    assert [Pattern(text).fullmatch(p) for p in paths] == [re.fullmatch(text, p) is not None for p in paths]
    assert [Pattern(text).fullmatch(p) for p in paths] == [True, True, False, False]
    ahead = Pattern(r"^(?!.*lm_head)(model\.language(?=\.).*\.(k_proj|q_proj))$")
    assert ahead.fullmatch("model.language.layers.0.q_proj") and not ahead.fullmatch("model.language.lm_head.q_proj")
