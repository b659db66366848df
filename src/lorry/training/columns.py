"""Columns of records, as objectives ask for them: found by name or guessed, read as texts, classes or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from .data import Record, guess_column, require_column
from .data_errors import DataError, suggest

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query")
COMPLETION_COLUMNS = ("completion", "output", "response", "answer", "target")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "chat")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")

_FIELD = re.compile(r"\{(\w+)\}")


def find_column(records: Sequence[Record], named: str | None, candidates: Sequence[str], what: str, option: str) -> str:
    """Return the column that was named, or else the first candidate that the records have.

    Raises
    ------
    DataError
        No records, or no such column; the message lists those found.
    """
    if not records:
        raise DataError("No records to encode.")
    if named is not None:
        return require_column(records, named, what)
    return guess_column(records, candidates, what, option)


def value_at(record: Record, column: str, index: int) -> Any:
    """Return a value of a record that should be like the first one; `DataError` if it lacks the column."""
    if column not in record:
        raise DataError(f"Record {index} has no column {column!r}; it has {list(record)}, unlike the records before.")
    return record[column]


def texts_of(records: Sequence[Record], column: str, empty: bool = False) -> list[str]:
    """Return a column as texts; numbers are written out. With ``empty``, a missing value counts as no text."""
    texts = []
    for i, record in enumerate(records):
        value = record.get(column) if empty else value_at(record, column, i)
        if value is None and empty:
            value = ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise DataError(f"Record {i}: column {column!r} holds a {type(value).__name__}, expected text.")
        texts.append(value)
    return texts


def filled(template: str, records: Sequence[Record]) -> list[str]:
    """Return a template's text for each record. Braces name columns and do nothing else."""
    names = _FIELD.findall(template)
    if not names:
        raise DataError(f"The template {template!r} names no column; write one in braces, such as {{question}}.")
    columns = {n: texts_of(records, require_column(records, n, "template"), empty=True) for n in names}

    def one(index: int) -> str:
        return _FIELD.sub(lambda match: columns[match[1]][index], template)

    return [one(i) for i in range(len(records))]


def label_of(value: Any, index: int, column: str) -> str:
    """Return the name of a class: text without spaces around it; whole numbers as such, however they are stored."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int | str) and str(value).strip():
        return str(value).strip()
    expected = "expected a class (a name or a whole number)"
    raise DataError(f"Record {index}: column {column!r} holds {value!r}, {expected}.")


def class_names(values: Sequence[Any], column: str) -> tuple[str, ...]:
    """Return the classes among values in a stable order: numbers by value, names by alphabet.

    Raises
    ------
    DataError
        Fewer than two classes, a label that is missing, or a fraction.
    """
    names = {label_of(value, i, column) for i, value in enumerate(values)}
    if len(names) < 2:
        raise DataError(f"Column {column!r} has the one class {names.pop()!r}; a classifier needs two or more.")
    numeric = all(re.fullmatch(r"-?\d+", n) for n in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def class_index(values: Sequence[Any], column: str, names: Sequence[str]) -> list[int]:
    """Return the place of each value among the names of classes.

    Raises
    ------
    DataError
        A class that is not among them, with near misses.
    """
    index = {name: i for i, name in enumerate(names)}
    found = []
    for i, value in enumerate(values):
        label = label_of(value, i, column)
        if label not in index:
            raise DataError(f"Record {i}: unknown label {label!r}; {suggest(label, names)}")
        found.append(index[label])
    return found


def numbers_of(records: Sequence[Record], column: str, what: str) -> list[float]:
    """Return a column as numbers.

    Raises
    ------
    DataError
        A value that is none, or not finite.
    """
    found = []
    for i, record in enumerate(records):
        value = value_at(record, column, i)
        try:
            number = math.nan if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"Record {i}: column {column!r} holds {value!r}, expected a number for the {what}.")
        found.append(number)
    return found
