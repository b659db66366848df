"""Encoding of conversations by the tokenizer's chat template, with the loss on the assistant's turns
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .data_errors import DataError
from .encode import special_prefix, tokenize
from .rows import IGNORE, Builder, EncodedSet, Truncation, pack_fit

Turns = Literal["all", "last"]
"""Which of the assistant's turns are trained on."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation as a list of ``{"role", "content"}``.

    Takes that form, ShareGPT's ``{"from", "value"}``, or either as JSON text (as CSV holds it).

    Raises
    ------
    DataError
        Anything else; ``where`` names the record.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: the conversation is text but not JSON ({error.msg}).") from error
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: expected a list of messages, found a {type(value).__name__}.")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {i} is a {type(message).__name__}, expected role and content.")
        if "from" in message and "role" not in message:
            role = str(message["from"])
            message = {"role": _ROLES.get(role, role), "content": message.get("value")}
        if "role" not in message or ("content" not in message and "tool_calls" not in message):
            raise DataError(f"{where}: message {i} has the keys {sorted(message)}, expected role and content.")
        messages.append({k: v for k, v in message.items() if v is not None or k == "content"})
    return messages


def chat_template(tokenizer: Any, template: str | None = None, tools: Any = None) -> str:
    """The template to use: the one given, else the tokenizer's.

    Raises
    ------
    DataError
        The tokenizer has none.
    """
    if template is not None:
        return template
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"The tokenizer {name!r} has no chat template; give one with template= (Jinja text), set "
            "tokenizer.chat_template, or train with objective 'completion'."
        )
    return str(tokenizer.get_chat_template(None, tools))


def encode_chat(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    tools: Sequence[Any] | None = None,
    max_length: int,
    packing: bool = False,
    truncation: Truncation = "right",
    turns: Turns = "all",
    template: str | None = None,
) -> EncodedSet:
    """Encode conversations; the labels are what the assistant says, up to and with the end of its turn.

    A template with ``{% generation %}`` marks tells where that is. With any other, it is found by rendering
    the conversation up to each turn, which must give a beginning of the whole.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    conversations
        Lists of ``{"role", "content"}``; one without an assistant turn is dropped and counted.
    tools
        Per conversation, the tool schemas for the template.
    max_length
        Tokens of a row, at least 2.
    packing, truncation
        Put several whole conversations into a row; what is cut off one that is too long.
    turns
        Train on all assistant turns, or on the last one.
    template
        Jinja text in place of the tokenizer's template.

    Raises
    ------
    DataError
        No template, a conversation that the template refuses, turns that cannot be told apart, or
        nothing left to train on.
    """
    if turns not in ("all", "last"):
        raise DataError(f"Turns must be 'all' or 'last', found {turns!r}.")
    builder = Builder(max_length, truncation, len(special_prefix(tokenizer)))
    for i, messages in enumerate(conversations):
        spoken = [m for m, message in enumerate(messages) if message["role"] == "assistant"]
        if not spoken:
            builder.drop("without an assistant turn")
            continue
        schemas = tools[i] if tools is not None else None
        renderer = _Renderer(tokenizer, chat_template(tokenizer, template, schemas), schemas, f"record {i}")
        chosen = spoken if turns == "all" else spoken[-1:]
        if _GENERATION.search(renderer.template):
            ids, mask = renderer.marked(messages)
            if turns == "last":
                mask = _last_run(mask)
        else:
            text, spans = renderer.spans(messages, chosen)
            ids, mask = _mask_spans(tokenizer, text, spans)
        builder.add(ids, [token if spoken else IGNORE for token, spoken in zip(ids, mask, strict=True)])
    return builder.finish(pack_fit(builder.rows, max_length) if packing else None)


class _Renderer:
    """One conversation's template, with errors that name the record."""

    def __init__(self, tokenizer: Any, template: str, tools: Any, where: str) -> None:
        self.tokenizer, self.template, self.tools, self.where = tokenizer, template, tools, where

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tools=self.tools, **options
            )
        except Exception as error:
            raise DataError(f"{self.where}: the chat template refuses the conversation: {error}") from error

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """Tokens and mask of a template that marks the assistant's words itself."""
        out = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]

    def spans(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of the conversation, and the characters (begin, end) of the given turns in it."""
        whole = str(self._apply(messages, tokenize=False))
        spans = []
        for turn in turns:
            before = self._apply(messages[:turn], tokenize=False, add_generation_prompt=True) if turn else ""
            after = whole if turn == len(messages) - 1 else self._apply(messages[: turn + 1], tokenize=False)
            if not after.startswith(before):
                # Some templates prompt with words (an open thinking block) that a finished turn does not
                # have.
                before = self._apply(messages[:turn], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{self.where}: this chat template changes earlier turns when later ones follow, so "
                    f"the words of message {turn} cannot be told apart; train with turns='last', or give a "
                    "template with {% generation %} marks."
                )
            spans.append((len(before), len(after)))
        return whole, spans


def _mask_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Tokens of a rendered text, and which of them lie in the spans, even in part."""
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [tuple(pair) for pair in out["offset_mapping"]]
        return list(out["input_ids"]), [
            any(begin < end and start < stop for start, end in spans) for begin, stop in offsets
        ]
    # Without offsets, pieces between the borders are tokenised apart: the borders are then exact.
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = tokenize(tokenizer, [text[a:b] for a, b in zip(edges, edges[1:], strict=False)])
    ids = [token for piece in pieces for token in piece]
    mask = [bool(i % 2) for i, piece in enumerate(pieces) for _ in piece]
    return ids, mask


def _last_run(mask: Sequence[bool]) -> list[bool]:
    """The mask with its last run of True alone."""
    kept, open_run = [False] * len(mask), False
    for i in range(len(mask) - 1, -1, -1):
        if mask[i]:
            kept[i] = open_run = True
        elif open_run:
            break
    return kept
