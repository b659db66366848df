"""Calls of functions in a model's answers: recognised while they stream, and forced by a grammar."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.core.errors import OptionError, near_misses
from lorry.serving.http.bodies import ChatBody, NamedTool
from lorry.serving.request import Grammar

#: How Hermes, Qwen and others write a call, and what Llama may write before its own.
OPEN, CLOSE, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """A call of a function, its arguments as JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_dict(self) -> dict[str, Any]:
        """Return the call in OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def tools_of(body: ChatBody) -> list[dict[str, Any]] | None:
    """Return the tools that the template shows: none if the assistant may not call any."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools]


def grammar_of(body: ChatBody) -> Grammar | None:
    """Return what forces a call where the client wants one: a JSON object with the name and the arguments.

    Raises
    ------
    OptionError
        A call is wanted, and there is no such function.
    """
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    functions = {tool.function.name: tool.function for tool in body.tools or ()}
    if not functions:
        raise OptionError("The tool_choice wants a call, but the request has no tools.")
    wanted = list(functions)
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in functions:
            raise OptionError(f"The tool_choice names '{name}', which is none of the tools."
                              f"{near_misses(name, functions)}")  # fmt: skip
        wanted = [name]
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": functions[name].parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in wanted
    ]
    return Grammar("json_schema", json.dumps(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}))


class Reader:
    """Takes an answer as it comes, and tells calls of functions from what is said.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` anywhere in the answer, or a whole answer
    that is such an object (with ``arguments`` or ``parameters``), several of them in a list or separated by
    semicolons. What looks like one and is none is said.

    Parameters
    ----------
    names
        Functions that may be called; with none, everything is said.
    several
        Whether calls after the first are kept.
    """

    def __init__(self, names: Sequence[str], several: bool = True) -> None:
        self._names, self._several = frozenset(names), several
        self._held, self._begun, self._called = "", False, False
        self.calls: list[Call] = []

    def feed(self, text: str, ended: bool = False) -> Iterator[str | Call]:
        """Yield what is certain: text that is said, and calls."""
        if not self._names:
            if text:
                yield text
            return
        self._held += text
        for found in self._ready(ended):
            if isinstance(found, Call):
                if self.calls and not self._several:
                    continue
                self.calls.append(found)
            if found:
                yield found

    def _ready(self, ended: bool) -> Iterator[str | Call]:
        if not self._begun and self._may_be_object():
            if not ended:
                return
            calls = _parsed(self._held.strip().removeprefix(PYTHON), self._names)
            if calls:
                self._held = ""
                yield from calls
                return
        self._begun = self._begun or bool(self._held.strip())
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            inside, closed, after = rest.partition(CLOSE)
            if not closed and not ended:
                yield self._said(before.rstrip())
                self._held = OPEN + rest
                return
            calls = _parsed(inside, self._names)
            yield self._said(before.rstrip() if calls else before + OPEN + inside + closed)
            yield from calls
            self._held, self._called = after, self._called or bool(calls)
        cut = len(self._held) if ended else len(self._held[: -_overlap(self._held, OPEN) or None].rstrip())
        text, self._held = self._held[:cut], self._held[cut:]
        yield self._said(text)

    def _said(self, text: str) -> str:
        """Return what is said, without the space that only parts it from the call before."""
        if self._called:
            text = text.lstrip()
            self._called = not text
        return text

    def _may_be_object(self) -> bool:
        start = self._held.lstrip()
        return start[:1] in ("{", "[") or start.startswith(PYTHON) or (bool(start) and PYTHON.startswith(start))


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of a text that a marker may begin with."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


def _parsed(text: str, names: frozenset[str]) -> list[Call]:
    """Return the calls that a text consists of; none if it is something else."""
    decoder, calls, at = json.JSONDecoder(), list[Call](), 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for each in value if isinstance(value, list) else [value]:
            call = _call(each, names)
            if call is None:
                return []
            calls.append(call)
        while at < len(text) and (text[at].isspace() or text[at] == ";"):
            at += 1
    return calls


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
