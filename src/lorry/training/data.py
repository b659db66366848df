"""Reading records for training: one call for JSONL, JSON, CSV, TSV, Parquet, plain text and dataset folders.

A record is a plain ``dict`` from column name to value. Which columns mean what is decided later, by the
objective. Nothing here ever opens a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .data_errors import DataError, suggest
from .picture_folder import is_picture_folder, read_pictures
from .readers import Bounds, Record, cut, is_dataset_folder, read_dataset, read_file

__all__ = [
    "DataError",
    "DataSpec",
    "Record",
    "guess_column",
    "held_out_indices",
    "load_records",
    "require_column",
    "split_records",
]


EXTENSIONS: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""File extension to format name."""

FORMATS: tuple[str, ...] = ("jsonl", "json", "csv", "tsv", "parquet", "text", "dataset", "pictures")

_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz"}
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
_SLICE = re.compile(r"^(?P<name>[^\[\]]*)\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\]$")


@dataclass(frozen=True)
class DataSpec:
    """Where records come from and how they are read: the ``data`` entry of a job."""

    path: str
    """File, or folder of files, or folder written by ``datasets.save_to_disk``."""
    format: str | None = None
    """One of ``FORMATS``; None reads it from the extension."""
    split: str | None = None
    """Split of a folder (``train``), a slice (``[:90%]``, ``[100:200]``), or both (``train[:90%]``)."""
    limit: int | None = None
    """Keep at most this many records (lines of each file, for plain text), counted after the slice."""
    columns: tuple[str, ...] | None = None
    """Column names of a CSV or TSV file that has no header line."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> DataSpec:
        """Build a spec from parsed YAML or JSON.

        Raises
        ------
        DataError
            An unknown key (with near misses), or no ``path``.
        """
        known = [f.name for f in fields(cls)]
        for key in mapping:
            if key not in known:
                raise DataError(f"Unknown data option {key!r}; {suggest(str(key), known)}")
        if "path" not in mapping:
            raise DataError(f"A data entry needs 'path'; found {sorted(mapping)}.")
        values = dict(mapping)
        values["path"] = str(values["path"])
        if values.get("columns") is not None:
            values["columns"] = tuple(values["columns"])
        return cls(**values)


def load_records(
    source: str | Path | DataSpec | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    split: str | None = None,
    limit: int | None = None,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[Record]:
    """Read all records of a data source.

    Plain text gives one record ``{"text": whole file}``; its slices and limits count lines, so that
    ``split="[:90%]"`` and ``split="[90%:]"`` hold out the end of a book. A CSV or TSV file may lack a header:
    a first line that cannot be one is taken as data and the columns are named ``text, label`` where they look
    so, else ``column_1, column_2, ...``. TSV has no quoting (a quote is a character); CSV has.

    Parameters
    ----------
    source
        A path, a `DataSpec`, a mapping with the fields of one, or records already in memory.
    split
        A split of a folder, a slice, or both (`DataSpec.split`).
    limit
        At most this many records.
    format
        Overrides the format that the extension tells; one of `FORMATS`.
    columns
        Names for the columns of a CSV or TSV file without a header.

    Raises
    ------
    DataError
        Nothing there, unknown extension, a pickle, a bad line (named ``file:line``), or no
        records.
    """
    if isinstance(source, Mapping):
        source = DataSpec.from_mapping(source)
    if isinstance(source, DataSpec):
        split, limit = split or source.split, source.limit if limit is None else limit
        format, columns = format or source.format, columns or source.columns
        source = source.path
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, found {limit}.")
    if format is not None and format not in FORMATS:
        raise DataError(f"Unknown data format {format!r}; {suggest(format, FORMATS)}")
    name, bounds = _parse_split(split)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        records = _read_path(path, format, name, bounds, limit, columns)
        where = str(path)
    else:
        if name:
            raise DataError(f"Records in memory have no split {name!r}; take a slice such as '[:90%]'.")
        records, where = (
            cut([_as_record(r, i) for i, r in enumerate(source)], bounds, limit),
            "the given records",
        )
    if not records:
        detail = f" with split {split!r}" if split else ""
        raise DataError(f"No records in {where}{detail}; at least one is needed.")
    return records


def split_records(
    records: Sequence[Record], fraction: float, seed: int | None = None
) -> tuple[list[Record], list[Record]]:
    """Hold out a part of the records: (rest, held out), both in their first order, neither of them empty.

    Parameters
    ----------
    records
        At least two records.
    fraction
        Share to hold out, between 0 and 1, rounded to whole records.
    seed
        Which records are drawn; None takes the last ones.

    Raises
    ------
    DataError
        A fraction outside (0, 1), or fewer than two records.
    """
    held = set(held_out_indices(len(records), fraction, seed))
    rest = [r for i, r in enumerate(records) if i not in held]
    return rest, [r for i, r in enumerate(records) if i in held]


def held_out_indices(count: int, fraction: float, seed: int | None) -> list[int]:
    """Sorted positions to hold out of ``count`` (see `split_records`)."""
    import torch

    if not 0.0 < fraction < 1.0:
        raise DataError(f"The held-out fraction must be between 0 and 1, found {fraction}.")
    if count < 2:
        raise DataError(f"Holding out a part needs at least 2 examples, found {count}.")
    held = min(max(round(count * fraction), 1), count - 1)
    if seed is None:
        return list(range(count - held, count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:held].tolist())


def require_column(records: Sequence[Record], name: str, what: str) -> str:
    """Return ``name`` if the first record has that column.

    Raises
    ------
    DataError
        It has not; the message lists the columns found and near misses.
    """
    found = list(records[0])
    if name not in found:
        raise DataError(f"No column {name!r} for the {what}; found columns {found}; {suggest(name, found)}")
    return name


def guess_column(records: Sequence[Record], candidates: Sequence[str], what: str, option: str) -> str:
    """Return the first of ``candidates`` that is a column of the records.

    Parameters
    ----------
    records
        At least one record.
    candidates
        Usual names, best first.
    what
        What the column is for, for the message.
    option
        The option by which the user can name the column, for the message.

    Raises
    ------
    DataError
        None of them is there.
    """
    found = list(records[0])
    for name in candidates:
        if name in found:
            return name
    lowered = {str(f).lower(): f for f in reversed(found)}
    for name in candidates:
        if name in lowered:
            return str(lowered[name])
    hint = " (a file without a header? name its columns with columns=[...])" if "column_1" in found else ""
    raise DataError(
        f"No column for the {what}: looked for {', '.join(candidates)}; found columns {found}{hint}; "
        f"name the right one with {option}."
    )


def _parse_split(split: str | None) -> tuple[str | None, Bounds]:
    if split is None:
        return None, None
    match = _SLICE.match(split.strip())
    if match:
        return match["name"].strip() or None, (match["start"], match["stop"])
    if "[" in split or "]" in split or not split.strip():
        raise DataError(f"Cannot read split {split!r}; write 'train', '[:90%]', '[100:200]' or 'train[:90%]'.")
    return split.strip(), None


def _as_record(record: Mapping[str, Any], index: int) -> Record:
    if not isinstance(record, Mapping):
        raise DataError(f"Record {index} is a {type(record).__name__}; a record is a mapping from column to value.")
    return dict(record)


def _read_path(
    path: Path,
    format: str | None,
    name: str | None,
    bounds: Bounds,
    limit: int | None,
    columns: Sequence[str] | None,
) -> list[Record]:
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        if format in (None, "dataset") and is_dataset_folder(path):
            return read_dataset(path, name, bounds, limit)
        if format in (None, "pictures") and is_picture_folder(path):
            return cut(read_pictures(path), bounds, limit)
        if format == "pictures":
            raise DataError(f"{path} holds no pictures and no metadata.jsonl that names any.")
        if format == "dataset":
            raise DataError(f"{path} is not a folder written by datasets.save_to_disk: it has no dataset_info.json.")
        paths = _folder_files(path, format, name)
    else:
        if format == "dataset":
            raise DataError(f"{path} is a file; format 'dataset' is a folder written by datasets.save_to_disk.")
        if format == "pictures":
            raise DataError(f"{path} is a file; format 'pictures' is a folder of pictures.")
        paths = [path]
    # A single file may still hold named splits: a JSON object of lists. Everything else has none.
    inner = name if not path.is_dir() else None
    plain = [p for p in paths if (format or _format_of(p)) != "json"]
    if inner and plain:
        raise DataError(f"{path} is one file and has no split {inner!r}; take a slice such as '[:90%]'.")
    records: list[Record] = []
    if (format or _format_of(paths[0])) == "text":
        for p in paths:  # slices and limits of text count the lines of each file
            records.extend(read_file(p, "text", inner, bounds, limit, columns))
        return records
    for p in paths:
        left = None if limit is None or bounds is not None else limit - len(records)
        if left == 0:
            break
        records.extend(read_file(p, format or _format_of(p), inner, bounds, left, columns))
    return cut(records, bounds, limit)


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"no file or folder {path}: {parent} does not exist either"
    names = sorted(p.name for p in parent.iterdir())
    return f"no file or folder {path}; in {parent}: {suggest(path.name, names)}"


def _format_of(path: Path) -> str:
    extension = path.suffix.lower()
    if extension in _PICKLES:
        raise DataError(f"{path} may hold a pickle, which can run code when opened; convert it to JSONL or Parquet.")
    if extension not in EXTENSIONS:
        raise DataError(
            f"Cannot tell the format of {path} by its extension {extension!r}; known are "
            f"{', '.join(EXTENSIONS)}; name it with format= (one of {', '.join(FORMATS)})."
        )
    return EXTENSIONS[extension]


def _folder_files(folder: Path, format: str | None, split: str | None) -> list[Path]:
    """The data files of a folder that belong to a split, sorted by name."""
    found = [
        p
        for p in sorted(folder.iterdir())
        if p.is_file() and p.suffix.lower() in EXTENSIONS and not re.match(r"(?i)[._]|readme|licen[cs]e", p.name)
    ]
    if format is not None:
        found = [p for p in found if EXTENSIONS[p.suffix.lower()] == format]
    if not found:
        raise DataError(
            f"No data files{f' of format {format}' if format else ''} in {folder}; "
            f"expected files ending in {', '.join(EXTENSIONS)}."
        )
    by_split: dict[str | None, list[Path]] = {}
    for p in found:
        by_split.setdefault(_split_of(p), []).append(p)
    names = sorted(s for s in by_split if s)
    if split is None:
        if len(names) > 1:
            raise DataError(f"{folder} holds the splits {', '.join(names)}; choose one with split=.")
        chosen = found
    else:
        wanted = _SPLIT_NAMES.get(split.lower(), split)
        exact = [p for p in found if p.stem == split]
        if not exact and wanted not in by_split:
            raise DataError(f"No split {split!r} in {folder}; {suggest(split, names or [p.stem for p in found])}")
        chosen = exact or by_split[wanted]
    kinds = sorted({EXTENSIONS[p.suffix.lower()] for p in chosen})
    if len(kinds) > 1:
        raise DataError(f"{folder} mixes the formats {', '.join(kinds)}; choose one with format=, or name one file.")
    return chosen


def _split_of(path: Path) -> str | None:
    for word in re.split(r"[^a-z]+", path.stem.lower()):
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return None
