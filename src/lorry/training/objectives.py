"""The tasks on text: how their records become rows of tokens, what their loss is, and by what they are judged.

An objective is a frozen dataclass whose fields are the user's options. `OBJECTIVES` maps names to them; a new one is a
class like these, or any other `lorry.training.task.Task` in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from .chat import Turns, as_messages, chat_template, encode_chat
from .data import Record, guess_column, require_column
from .data_errors import DataError, suggest
from .encode import encode_causal, encode_classification, encode_completion
from .losses import ClassTally, TokenTally, causal_loss, class_tally, classification_loss, token_tally
from .rows import Encoded, EncodedSet, Truncation
from .task import TASKS, Examples, Setting, Task
from .text_task import Head, TextTask

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query")
COMPLETION_COLUMNS = ("completion", "output", "response", "answer", "target")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "chat")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")

T = TypeVar("T", bound=Task)
_FIELD = re.compile(r"\{(\w+)\}")


def _registered(cls: type[T]) -> type[T]:
    return TASKS.add(cls.name, cls)


class TokenObjective(TextTask):
    """The loss and the metrics of all objectives that predict tokens."""

    token_by_token: ClassVar[bool] = True

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy and the number of labelled tokens (`causal_loss`)."""
        return causal_loss(outputs, targets)

    def tally(self, outputs: Tensor, targets: Tensor) -> TokenTally:
        """Return the sums for loss, perplexity and token accuracy (`token_tally`)."""
        return token_tally(outputs, targets)


@_registered
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
        column = _column(records, self.text_column, TEXT_COLUMNS, "text", "text_column")
        return encode_causal(
            tokenizer,
            _texts(records, column),
            max_length=self.max_length,
            packing=self.packing,
            add_eos=self.add_eos,
        )


@_registered
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
        column = _column(records, self.completion_column, COMPLETION_COLUMNS, "completion", "completion_column")
        return encode_completion(
            tokenizer,
            list(zip(self._prompts(records), _texts(records, column), strict=True)),
            max_length=self.max_length,
            packing=self.packing,
            truncation=self.truncation,
            add_eos=self.add_eos,
        )

    def _prompts(self, records: Sequence[Record]) -> list[str]:
        if self.template is not None:
            return [text + (self.separator or "") for text in _fill(self.template, records)]
        column = _column(records, self.prompt_column, PROMPT_COLUMNS, "prompt", "prompt_column")
        separator = self.separator if self.separator is not None else "" if column == "prompt" else "\n"
        prompts = _texts(records, column)
        extra = self.input_column
        if extra is None and column == "instruction" and "input" in records[0]:
            extra = "input"
        if extra is not None:
            require_column(records, extra, "input")
            inputs = _texts(records, extra, empty=True)
            prompts = [f"{p}\n\n{i}" if i else p for p, i in zip(prompts, inputs, strict=True)]
        return [p + separator for p in prompts]


@_registered
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
        column = _column(records, self.messages_column, MESSAGE_COLUMNS, "messages", "messages_column")
        tools = self.tools_column or ("tools" if "tools" in records[0] else None)
        if tools is not None:
            require_column(records, tools, "tools")
        return encode_chat(
            tokenizer,
            [as_messages(_value(r, column, i), f"record {i}") for i, r in enumerate(records)],
            tools=[r.get(tools) for r in records] if tools is not None else None,
            max_length=self.max_length,
            packing=self.packing,
            truncation=self.truncation,
            turns=self.turns,
            template=self.template,
        )


@_registered
@dataclass(frozen=True)
class Classification(TextTask):
    """Classes of texts or pairs of texts."""

    name: ClassVar[str] = "classification"
    task: ClassVar[Head] = "sequence-classification"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")
    max_length: int = 256
    """Tokens of a row."""
    text_column: str | None = None
    """Column of the text; guessed if not named."""
    pair_column: str | None = None
    """Column of a second text; ``text_pair``, ``sentence2``, ``hypothesis`` or ``passage`` if there is
    one."""
    label_column: str | None = None
    """Column of the class; guessed if not named."""
    truncation: Truncation = "right"
    """``right`` cuts long texts, ``drop`` leaves them out."""

    def label_names(self, records: Sequence[Record]) -> tuple[str, ...]:
        """The classes of the training records in a stable order: numbers by value, names by alphabet.

        Raises
        ------
        DataError
            Fewer than two classes, a label that is missing, or a fraction.
        """
        column = _column(records, self.label_column, LABEL_COLUMNS, "label", "label_column")
        names = {_label(_value(r, column, i), i, column) for i, r in enumerate(records)}
        if len(names) < 2:
            raise DataError(f"Column {column!r} has the one class {names.pop()!r}; a classifier needs two or more.")
        numeric = all(re.fullmatch(r"-?\d+", n) for n in names)
        return tuple(sorted(names, key=int) if numeric else sorted(names))

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode texts and classes (`encode_classification`).

        Parameters
        ----------
        tokenizer
            A Hugging Face tokenizer.
        records
            The examples.
        labels
            Classes in the model's order; None takes those of these records (`label_names`). Give the
            training set's here for evaluation data.
        """
        first = ("text", "sentence", "sentence1", "premise", "question", *TEXT_COLUMNS)
        text = _column(records, self.text_column, first, "text", "text_column")
        pair = self.pair_column or next(
            (c for c in ("text_pair", "sentence2", "hypothesis", "passage") if c in records[0] and c != text),
            None,
        )
        if pair is not None:
            require_column(records, pair, "second text")
        column = _column(records, self.label_column, LABEL_COLUMNS, "label", "label_column")
        names = list(labels) if labels is not None else list(self.label_names(records))
        index = {name: i for i, name in enumerate(names)}
        classes = []
        for i, record in enumerate(records):
            label = _label(_value(record, column, i), i, column)
            if label not in index:
                raise DataError(f"Record {i}: unknown label {label!r}; {suggest(label, names)}")
            classes.append(index[label])
        return encode_classification(
            tokenizer,
            _texts(records, text),
            classes,
            pairs=_texts(records, pair, empty=True) if pair is not None else None,
            max_length=self.max_length,
            truncation=self.truncation,
        )

    def labels_of(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Return the classes of the training records (`label_names`)."""
        return self.label_names(records)

    def classes(self, setting: Setting, train: Examples[Encoded], labels: Sequence[str] | None) -> int | None:
        """Return the number of the job's classes if the head has more.

        Raises
        ------
        DataError
            The head has fewer.
        """
        config: Any = getattr(setting.model, "config", None)
        head = getattr(config, "num_labels", None)
        count = len(labels) if labels else max(row.label or 0 for row in train.examples) + 1
        if head is not None and count > head:
            raise DataError(
                f"The job has {count} classes, but the model's head has {head}; load the base with num_labels={count}."
            )
        return count if head is not None and count < head else None

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy and the number of examples (`classification_loss`)."""
        return classification_loss(outputs, targets)

    def tally(self, outputs: Tensor, targets: Tensor) -> ClassTally:
        """Return the sums for loss, accuracy and macro F1 (`class_tally`)."""
        return class_tally(outputs, targets)


OBJECTIVES = TASKS
"""Name to class of what a job may learn."""


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Build an objective by name from parsed options.

    Raises
    ------
    DataError
        An unknown name or option, with near misses.
    """
    if name not in OBJECTIVES:
        raise DataError(f"Unknown objective {name!r}; {suggest(name, OBJECTIVES)}")
    cls = OBJECTIVES[name]
    known = [f.name for f in fields(cls)]
    for option in options or {}:
        if option not in known:
            raise DataError(f"Objective {name!r} has no option {option!r}; {suggest(option, known)}")
    made: Task = cls(**dict(options or {}))
    return made


def _column(records: Sequence[Record], named: str | None, candidates: Sequence[str], what: str, option: str) -> str:
    if not records:
        raise DataError("No records to encode.")
    if named is not None:
        return require_column(records, named, what)
    return guess_column(records, candidates, what, option)


def _value(record: Record, column: str, index: int) -> Any:
    if column not in record:
        raise DataError(f"Record {index} has no column {column!r}; it has {list(record)}, unlike the records before.")
    return record[column]


def _texts(records: Sequence[Record], column: str, empty: bool = False) -> list[str]:
    """A column as texts; numbers are written out. With ``empty``, a missing value counts as no text."""
    texts = []
    for i, record in enumerate(records):
        value = record.get(column) if empty else _value(record, column, i)
        if value is None and empty:
            value = ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise DataError(f"Record {i}: column {column!r} holds a {type(value).__name__}, expected text.")
        texts.append(value)
    return texts


def _fill(template: str, records: Sequence[Record]) -> list[str]:
    """A template's text for each record. Braces name columns and do nothing else."""
    names = _FIELD.findall(template)
    if not names:
        raise DataError(f"The template {template!r} names no column; write one in braces, such as {{question}}.")
    columns = {n: _texts(records, require_column(records, n, "template"), empty=True) for n in names}

    def one(index: int) -> str:
        return _FIELD.sub(lambda match: columns[match[1]][index], template)

    return [one(i) for i in range(len(records))]


def _label(value: Any, index: int, column: str) -> str:
    """The name of a class: text without spaces around it; whole numbers as such, however they are stored."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int | str) and str(value).strip():
        return str(value).strip()
    expected = "expected a class (a name or a whole number)"
    raise DataError(f"Record {index}: column {column!r} holds {value!r}, {expected}.")
