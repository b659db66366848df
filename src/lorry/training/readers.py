"""Readers of single files and of dataset folders: each takes a path and gives records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from .data_errors import DataError, suggest
from .tables import read_table

Record = dict[str, Any]
Bounds = tuple[str | None, str | None] | None
"""Both ends of a slice as written (``"90%"``, ``"100"``), either of them open; None is everything."""
_T = TypeVar("_T")


def cut(items: list[_T], bounds: Bounds, limit: int | None) -> list[_T]:
    """The slice of a list, then its first ``limit`` items."""
    if bounds is not None:

        def index(text: str | None, default: int) -> int:
            if text is None:
                return default
            return len(items) * int(text[:-1]) // 100 if text.endswith("%") else int(text)

        items = items[index(bounds[0], 0) : index(bounds[1], len(items))]
    return items if limit is None else items[:limit]


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder was written by ``datasets.save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def read_dataset(path: Path, name: str | None, bounds: Bounds, limit: int | None) -> list[Record]:
    """Records of a ``datasets.save_to_disk`` folder, of the split ``name`` where it holds several.

    Raises
    ------
    DataError
        Unreadable, no such split, or no choice among several.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Reading the dataset folder {path} needs the datasets package: pip install datasets."
        ) from error
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"Cannot read the dataset folder {path}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        names = [str(n) for n in data]
        if name is None and len(names) != 1:
            raise DataError(f"{path} holds the splits {', '.join(names)}; choose one with split=.")
        if name is not None and name not in names:
            raise DataError(f"No split {name!r} in {path}; {suggest(name, names)}")
        data = data[name or names[0]]
    elif name:
        raise DataError(f"{path} is one dataset and has no split {name!r}; take a slice such as '[:90%]'.")
    chosen = cut(list(range(len(data))), bounds, limit)
    return [dict(row) for row in data.select(chosen)]


def read_file(
    path: Path,
    format: str,
    split: str | None,
    bounds: Bounds,
    limit: int | None,
    columns: Sequence[str] | None,
) -> list[Record]:
    """Records of one file.

    Slices and limits of text (``bounds``, ``limit``) count lines; those of other formats are cut by the
    caller, which knows all files, and ``limit`` here only stops the reading early.

    Raises
    ------
    DataError
        A bad line (``file:line``), text that is not UTF-8, no such split in a JSON file.
    """
    try:
        if format == "parquet":
            return _read_parquet(path, limit)
        if format == "text":
            return _read_text(path, bounds, limit)
        if format == "json":
            return _read_json(path, split)
        rows = _read_jsonl(path) if format == "jsonl" else read_table(path, format, columns)
        return list(islice(rows, limit))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or name its format.") from error


def _read_text(path: Path, bounds: Bounds, limit: int | None) -> list[Record]:
    with path.open(encoding="utf-8-sig") as file:
        lines = cut(file.readlines(), bounds, limit)
    text = "".join(lines)
    return [{"text": text}] if text.strip() else []


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); JSONL has one object a line."
                ) from error
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: expected an object, found a {type(record).__name__}.")
            yield record


def _read_json(path: Path, split: str | None) -> list[Record]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            hint = "; one object a line is JSONL: format='jsonl'" if error.msg == "Extra data" else ""
            raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}.") from error
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if split is not None and split not in lists:
            raise DataError(f"No split {split!r} in {path}; {suggest(split, lists)}")
        if split is None and len(lists) != 1:
            raise DataError(
                f"{path} is an object with the lists {sorted(lists)}; expected a list of objects"
                + ("; choose one with split=" if lists else "")
            )
        content = lists[split] if split is not None else next(iter(lists.values()))
    elif split is not None:
        raise DataError(f"{path} is one list and has no split {split!r}; take a slice such as '[:90%]'.")
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, found a {type(content).__name__}.")
    for index, record in enumerate(content):
        if not isinstance(record, dict):
            raise DataError(f"{path}: item {index} is a {type(record).__name__}, expected an object.")
    return content


def _read_parquet(path: Path, limit: int | None) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Reading {path} needs the pyarrow package: pip install pyarrow.") from error
    try:
        with pyarrow.parquet.ParquetFile(str(path)) as file:
            records: list[Record] = []
            for batch in file.iter_batches():
                records.extend(batch.to_pylist())
                if limit is not None and len(records) >= limit:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"Cannot read {path} as Parquet: {error}") from error
    return records if limit is None else records[:limit]
