"""Reading CSV and TSV files, with or without a header line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .data_errors import DataError

_NAME = re.compile(r"^[A-Za-z_][\w.\-/]*( [\w.\-/]+){0,2}$")
_NUMBER = re.compile(r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
_USUAL_NAMES = frozenset(
    "text sentence text_pair sentence1 sentence2 premise hypothesis label labels class target prompt "
    "instruction input question completion output answer response messages conversations id idx".split()
)
# Enough lines to judge a file by, and few enough that judging costs nothing. It does not depend on how many
# records the caller wants, so a limit never changes what the columns are called.
_SAMPLE = 1000


def read_table(path: Path, format: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or TSV file as dicts of strings.

    Parameters
    ----------
    path
        A UTF-8 file.
    format
        ``csv`` (comma, quotes) or ``tsv`` (tab, no quoting).
    columns
        Names of the columns; the file then has no header (a first line equal to the names is
        skipped). None decides by the first lines.

    Raises
    ------
    DataError
        A line with another number of fields than the first (``file:line``), or repeated names.
    """
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        if format == "csv":
            reader = csv.reader(file, strict=True)
        else:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = _numbered(reader, path)
        sample = list(islice(rows, _SAMPLE))
        if not sample:
            return
        first_line, first = sample[0]
        names, skip = _name_columns([row for _, row in sample], columns)
        if len(names) != len(first):
            raise DataError(
                f"{path}:{first_line}: {len(first)} fields, but {len(names)} column names were given "
                f"({', '.join(names)})."
            )
        if len(set(names)) != len(names):
            raise DataError(f"{path}:{first_line}: repeated column names in {names}.")
        for line, row in chain(sample[skip:], rows):
            if len(row) != len(names):
                raise DataError(f"{path}:{line}: expected {len(names)} fields ({', '.join(names)}), found {len(row)}.")
            yield dict(zip(names, row, strict=True))


def _numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB for a field while reading: a document may be longer."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _name_columns(sample: list[list[str]], columns: Sequence[str] | None) -> tuple[list[str], int]:
    """Names of the columns, and how many lines (0 or 1) at the top are not data."""
    first = sample[0]
    if columns is not None:
        return list(columns), int([c.strip() for c in first] == list(columns))
    if _is_header(sample):
        return [c.strip() for c in first], 1
    width = len(first)
    if width == 1:
        return ["text"], 0
    if width in (2, 3):
        texts = ["text", "text_pair"][: width - 1]
        ends = {i: [row[i] for row in sample if len(row) == width] for i in (-1, 0)}
        labels = [i for i, values in ends.items() if _is_label(values)]
        if labels:  # of two that could be labels, the shorter; of equals, the last
            last = min(labels, key=lambda i: sum(map(len, ends[i]))) == -1
            return ([*texts, "label"] if last else ["label", *texts]), 0
    return [f"column_{i + 1}" for i in range(width)], 0


def _is_header(sample: list[list[str]]) -> bool:
    """Whether the first line can be, and looks like, the names of the columns."""
    first, rest = sample[0], sample[1:]
    cells = [c.strip() for c in first]
    if len(set(cells)) != len(cells) or not all(_NAME.match(c) and len(c) <= 40 for c in cells):
        return False
    if len(cells) == 1:
        return cells[0].lower() in _USUAL_NAMES
    if any(c.lower() in _USUAL_NAMES for c in cells):
        return True
    # A name over a column of numbers is a name. Single words over text: by convention the file has a header,
    # unless a word comes again below itself, as the labels of a file without a header do.
    columns = [[row[i] for row in rest if len(row) == len(cells)] for i in range(len(cells))]
    if any(column and all(_NUMBER.match(v) for v in column) for column in columns):
        return True
    if any(" " in cell for cell in cells):
        return False
    return bool(rest) and not any(cell in column for cell, column in zip(cells, columns, strict=True))


def _is_label(values: list[str]) -> bool:
    """Whether a column looks like class labels: short, and few different ones."""
    kinds = set(values)
    return all(0 < len(v) <= 32 for v in kinds) and len(kinds) <= min(100, max(2, len(values) // 2))
