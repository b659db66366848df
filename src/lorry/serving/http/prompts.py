"""Texts and conversations as tokens, with the tokenizer's own chat template or the server's."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lorry.core.errors import OptionError

#: How vocabularies write a space before a word, and a single byte.
_SPACE, _BYTE = "\u2581", re.compile("<0x([0-9A-F]{2})>")


class Prompts:
    """Makes prompts, and texts of tokens.

    Parameters
    ----------
    tokenizer
        Of transformers; copied, since the engine uses its own on another thread.
    template
        Jinja text in the place of the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.model_max_length = sys.maxsize  # what is too long is refused, not warned of
        self.template = template if template is not None else _own_template(tokenizer)
        self._texts: dict[int, str] = {}
        self._reserved = set(inspect.signature(type(tokenizer).apply_chat_template).parameters)

    def encode(self, text: str, special: bool) -> tuple[int, ...]:
        """Return the tokens of a text, with those that the tokenizer puts around it if `special`."""
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """Return the text of one token, with its leading space; a piece of a character as the vocabulary writes it."""
        found = self._texts.get(token)
        if found is None:
            found, piece = self.decode([token]), str(self.tokenizer.convert_ids_to_tokens(token))
            if "\ufffd" in found:
                found = piece
            elif piece.startswith(_SPACE) and not found.startswith(" "):
                found = f" {found}"  # decoders leave it out where a text begins
            self._texts[token] = found
        return found

    def token_bytes(self, token: int) -> list[int] | None:
        """Return the bytes of one token; None if they are not known."""
        text = self.decode([token])
        if "\ufffd" not in text:
            return list(self.token_text(token).encode())
        piece = self.token_text(token)
        if found := _BYTE.fullmatch(piece):
            return [int(found[1], 16)]
        bytes_of = _bytes_of_characters()
        return [bytes_of[each] for each in piece] if all(each in bytes_of for each in piece) else None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generate: bool = True,
        carry_on: bool = False,
        extra: Mapping[str, Any] | None = None,
        special: bool = False,
    ) -> tuple[int, ...]:
        """Return the tokens of a conversation, encoded as in training.

        Parameters
        ----------
        messages, tools
            As OpenAI writes them.
        generate
            Whether the prompt ends where the assistant speaks.
        carry_on
            Whether the last message is to be continued.
        extra
            Variables of the template.
        special
            Whether the tokenizer adds its own tokens around what the template wrote.

        Raises
        ------
        OptionError
            There is no template, it does not know tools, or it refuses the conversation.
        """
        if self.template is None:
            raise OptionError(
                "This base's tokenizer has no chat template. Use /v1/completions, or start the server with "
                "--template FILE."
            )
        if tools and "tools" not in self.template:
            raise OptionError(
                "This base's chat template knows no tools. Send none, or start the server with --template FILE of a "
                "template that does."
            )
        reserved = sorted(self._reserved & set(extra or ()))
        if reserved:
            raise OptionError(f"The chat_template_kwargs may not hold {', '.join(reserved)}.")
        try:
            text = self.tokenizer.apply_chat_template(
                [_turn(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generate and not carry_on,
                continue_final_message=carry_on,
                **(extra or {}),
            )
            return self.encode(text, special)
        except Exception as error:  # a template is a program of its own, and may raise anything
            raise OptionError(f"The chat template refuses the conversation: {error}.") from error


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _own_template(tokenizer: Any) -> str | None:
    return str(tokenizer.get_chat_template()) if getattr(tokenizer, "chat_template", None) else None


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: content is text, arguments of calls are objects."""
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    turn["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    turn["role"] = "system" if turn["role"] == "developer" else turn["role"]
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
            for call in calls
        ]
    return turn


def _object(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text
