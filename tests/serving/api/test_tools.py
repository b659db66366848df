"""Calls of functions in answers, in the formats that models write, however they are cut into pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.api.running import TEMPLATE

from lorry import pocket
from lorry.core.errors import OptionError
from lorry.serving.http.bodies import ChatBody
from lorry.serving.http.prompts import Prompts
from lorry.serving.http.tools import Call, Reader, grammar_of, tools_of

NAMES = ["add", "find"]
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}'
FIND = '{"name": "find", "parameters": {"text": "</x>"}}'
ADD_ARGUMENTS, FIND_ARGUMENTS = {"a": 1, "b": [2, {"c": "}"}]}, {"text": "</x>"}
SAID = [
    ("nothing of the kind", "nothing of the kind", []),
    (f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", ADD_ARGUMENTS)]),
    (f"Let me see.\n<tool_call>{ADD}</tool_call>\n<tool_call>{FIND}</tool_call>", "Let me see.",
     [("add", ADD_ARGUMENTS), ("find", FIND_ARGUMENTS)]),
    (f"<tool_call>{ADD}</tool_call>\n\nDone. ", "Done. ", [("add", ADD_ARGUMENTS)]),
    (f"<tool_call>{ADD}", "", [("add", ADD_ARGUMENTS)]),
    (ADD, "", [("add", ADD_ARGUMENTS)]),
    (f"<|python_tag|>{FIND}", "", [("find", FIND_ARGUMENTS)]),
    (f"{ADD}; {FIND}", "", [("add", ADD_ARGUMENTS), ("find", FIND_ARGUMENTS)]),
    (f"[{ADD}, {FIND}]", "", [("add", ADD_ARGUMENTS), ("find", FIND_ARGUMENTS)]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", {"a": 1})]),
    ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
    ('{"answer": 3}', '{"answer": 3}', []),
    ("[1, 2", "[1, 2", []),
    ("a < b <tool", "a < b <tool", []),
    ("<tool_call>rubbish</tool_call> and more", "<tool_call>rubbish</tool_call> and more", []),
]  # fmt: skip


def read(pieces, **options):
    reader = Reader(NAMES, **options)
    parts = [part for piece in pieces[:-1] for part in reader.feed(piece)]
    parts += reader.feed(pieces[-1], ended=True)
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [part for part in parts if isinstance(part, Call)]
    assert calls == reader.calls and len({call.id for call in calls}) == len(calls)
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("answer", "text", "calls"), SAID)
def test_calls_are_told_from_text(answer, text, calls):
    assert read([answer]) == (text, calls)
    assert read(list(answer)) == (text, calls)


@given(st.sampled_from(SAID), st.lists(st.integers(0, 100), max_size=6))
@settings(max_examples=60, deadline=None)
def test_pieces_make_no_difference(case, cuts):
    answer, text, calls = case
    at = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    pieces = [answer[a:b] for a, b in zip(at, at[1:], strict=False)]
    assert read(pieces) == (text, calls)


def test_text_is_not_held_back_longer_than_needed():
    reader = Reader(NAMES)
    assert "".join(reader.feed("Hello ")) == "Hello" and "".join(reader.feed("you <")) == " you"
    assert "".join(reader.feed("b> there")) == " <b> there"


def test_one_call_where_only_one_is_wanted():
    assert read([f"[{ADD}, {FIND}]"], several=False) == ("", [("add", ADD_ARGUMENTS)])


def body(**options):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES]
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools, **options})


def test_templates_see_tools_and_earlier_calls():
    _, tokenizer = pocket.load()
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    asked = body(messages=turns)
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    prompts = Prompts(tokenizer, TEMPLATE)
    assert prompts.decode(prompts.chat(messages, tools_of(asked))) == 'add;find;x>{"a": 1}>3>'
    assert prompts.decode(prompts.chat(messages[:1], tools_of(body(tool_choice="none")))) == "x>"
    with pytest.raises(OptionError, match="knows no tools"):
        Prompts(tokenizer).chat(messages, tools_of(asked))
    with pytest.raises(OptionError, match="refuses"):
        Prompts(tokenizer, "{{ raise_exception('no') }}").chat(messages)


def test_a_choice_becomes_a_schema():
    def schema(choice):
        grammar = grammar_of(body(tool_choice=choice))
        return grammar and json.loads(grammar.text)

    assert schema("auto") is None and schema("none") is None
    named = schema({"type": "function", "function": {"name": "find"}})
    assert named["properties"] == {"name": {"const": "find"}, "arguments": {"type": "object"}}
    assert [each["properties"]["name"]["const"] for each in schema("required")["anyOf"]] == NAMES
    with pytest.raises(OptionError, match="Did you mean 'find'"):
        schema({"type": "function", "function": {"name": "fin"}})
