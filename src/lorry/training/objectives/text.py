"""Objectives that predict tokens of a text: of all of it, of a completion, or of an assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lorry.training.chat import Turns, as_messages, chat_template, encode_chat
from lorry.training.columns import (
    COMPLETION_COLUMNS,
    MESSAGE_COLUMNS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    filled,
    find_column,
    texts_of,
    value_at,
)
from lorry.training.data import Record, require_column
from lorry.training.encode import encode_causal, encode_completion
from lorry.training.losses import TokenTally, causal_loss, token_tally
from lorry.training.rows import EncodedSet, Truncation
from lorry.training.task import register_task
from lorry.training.text_task import TextTask


class TokenObjective(TextTask):
    """The loss and the metrics of all objectives that predict tokens."""

    token_by_token: ClassVar[bool] = True

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy and the number of labelled tokens (`causal_loss`)."""
        return causal_loss(outputs, targets)

    def tally(self, outputs: Tensor, targets: Tensor) -> TokenTally:
        """Return the sums for loss, perplexity and token accuracy (`token_tally`)."""
        return token_tally(outputs, targets)


@register_task
@dataclass(frozen=True)
class Causal(TokenObjective):
    """Next-token prediction on every token of a text."""

    name: ClassVar[str] = "causal"
    max_length: int = 512
    """Tokens of a row; longer texts go on in the next row."""
    text_column: str | None = None
    """Column of the text; guessed if not named."""
    packing: bool = False
    """Fill each row with several texts."""
    add_eos: bool = True
    """End each text with the end-of-text token."""

    def held_out_seed(self, seed: int) -> None:
        """Hold out the end: one long text is cut in two; examples would be drawn, since files are often sorted."""
        return

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode the text column (`encode_causal`)."""
        column = find_column(records, self.text_column, TEXT_COLUMNS, "text", "text_column")
        return encode_causal(
            tokenizer,
            texts_of(records, column),
            max_length=self.max_length,
            packing=self.packing,
            add_eos=self.add_eos,
        )


@register_task
@dataclass(frozen=True)
class Completion(TokenObjective):
    """Prediction of a completion from its prompt; the prompt is no label."""

    name: ClassVar[str] = "completion"
    max_length: int = 512
    """Tokens of a row."""
    prompt_column: str | None = None
    """Column of the prompt; guessed if not named."""
    input_column: str | None = None
    """Column of a further input to an instruction, may be empty; ``input`` if there is an ``instruction``."""
    completion_column: str | None = None
    """Column of the completion; guessed if not named."""
    template: str | None = None
    """The prompt's text with columns in braces, such as ``Question: {question}\\nAnswer:``; then used as it
    is."""
    separator: str | None = None
    """Text between prompt and completion; by default nothing after a column ``prompt`` or a template, else a
    line break."""
    packing: bool = False
    """Put several whole examples into each row."""
    truncation: Truncation = "right"
    """What is cut off an example that is too long: ``right``, ``left``, or ``drop`` the example."""
    add_eos: bool = True
    """End each completion with the end-of-text token."""

    def prompt(self, record: Record) -> str:
        """The prompt's text of one record, separator included: what to generate from after training."""
        return self._prompts([record])[0]

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode prompts and completions (`encode_completion`)."""
        column = find_column(records, self.completion_column, COMPLETION_COLUMNS, "completion", "completion_column")
        return encode_completion(
            tokenizer,
            list(zip(self._prompts(records), texts_of(records, column), strict=True)),
            max_length=self.max_length,
            packing=self.packing,
            truncation=self.truncation,
            add_eos=self.add_eos,
        )

    def _prompts(self, records: Sequence[Record]) -> list[str]:
        if self.template is not None:
            return [text + (self.separator or "") for text in filled(self.template, records)]
        column = find_column(records, self.prompt_column, PROMPT_COLUMNS, "prompt", "prompt_column")
        separator = self.separator if self.separator is not None else "" if column == "prompt" else "\n"
        prompts = texts_of(records, column)
        extra = self.input_column
        if extra is None and column == "instruction" and "input" in records[0]:
            extra = "input"
        if extra is not None:
            require_column(records, extra, "input")
            inputs = texts_of(records, extra, empty=True)
            prompts = [f"{p}\n\n{i}" if i else p for p, i in zip(prompts, inputs, strict=True)]
        return [p + separator for p in prompts]


@register_task
@dataclass(frozen=True)
class Chat(TokenObjective):
    """Conversations in the tokenizer's chat template; the assistant's turns are the labels."""

    name: ClassVar[str] = "chat"
    max_length: int = 1024
    """Tokens of a row."""
    messages_column: str | None = None
    """Column of the messages; guessed if not named."""
    tools_column: str | None = None
    """Column of tool schemas for the template; ``tools`` if there is one."""
    turns: Turns = "all"
    """Train on ``all`` assistant turns, or on the ``last``."""
    template: str | None = None
    """Jinja text in place of the tokenizer's chat template."""
    packing: bool = False
    """Put several whole conversations into each row."""
    truncation: Truncation = "right"
    """What is cut off a conversation that is too long: ``right``, ``left``, or ``drop`` it."""

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode the conversations (`encode_chat`)."""
        chat_template(tokenizer, self.template)  # before anything else: without one, no data will do
        column = find_column(records, self.messages_column, MESSAGE_COLUMNS, "messages", "messages_column")
        tools = self.tools_column or ("tools" if "tools" in records[0] else None)
        if tools is not None:
            require_column(records, tools, "tools")
        return encode_chat(
            tokenizer,
            [as_messages(value_at(r, column, i), f"record {i}") for i, r in enumerate(records)],
            tools=[r.get(tools) for r in records] if tools is not None else None,
            max_length=self.max_length,
            packing=self.packing,
            truncation=self.truncation,
            turns=self.turns,
            template=self.template,
        )
