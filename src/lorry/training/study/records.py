"""What a study keeps: one file for each finished run, written whole or not at all, and what the study was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorry.core.errors import CheckpointError, OptionError
from lorry.training.checkpoint import write_json
from lorry.training.data import load_records
from lorry.training.task import Examples, digest

from .options import Cell, Study

VERSION = 1
#: How a run may end; the reason of the last two stands beside it.
DONE, DIVERGED, FAILED = "done", "diverged", "failed"


@dataclass(frozen=True)
class Record:
    """What one run came to.

    Attributes
    ----------
    variant, rank, batch_size, rate, seed
        Of its `Cell`.
    status
        ``done``, ``diverged`` or ``failed``.
    reason
        Why it did not end as planned.
    score
        Held-out score at the end; None for a run that did not end.
    start
        The same before training.
    test
        The score on data that choose nothing; None without any.
    metrics
        All held-out metrics at the end.
    parameters
        How many numbers were trained.
    steps
        How many optimizer steps were done.
    """

    variant: str
    rank: int | None
    batch_size: int
    rate: float
    seed: int
    status: str
    reason: str | None = None
    score: float | None = None
    start: float | None = None
    test: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    steps: int = 0

    @property
    def cell(self) -> Cell:
        """The run that it is of."""
        return Cell(self.variant, self.rank, self.batch_size, self.rate, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Timing:
    """How long a step of a variant takes when it trains alone: the least of a few steps, in seconds;
    None if it could not.
    """

    variant: str
    rank: int | None
    batch_size: int
    seconds: float | None


class Store:
    """The folder of a study.

    Parameters
    ----------
    study
        Whose results these are.
    overwrite
        Remove the results of another study that are there.

    Raises
    ------
    OptionError
        The folder holds another study, or the run of something else; says what differs.
    DataError
        The study's data cannot be read.
    """

    def __init__(self, study: Study, overwrite: bool = False) -> None:
        self.folder = Path(study.out)
        now = identity(study)
        path = self.folder / "study.json"
        if overwrite:
            path.unlink(missing_ok=True)
            for part in ("cells", "times", "fleets"):
                shutil.rmtree(self.folder / part, ignore_errors=True)
        elif path.exists():
            _check_same(_read(path), now, self.folder)
        elif (self.folder / "report.json").exists():
            raise OptionError(f"{self.folder} holds the results of something else; choose another folder as 'out'.")
        for part in ("cells", "times"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        known = _read(path)["variants"] if path.exists() else {}
        write_json(path, {**now, "variants": {**known, **now["variants"]}})

    def keep(self, record: Record) -> None:
        """Write the record of a run."""
        write_json(self.folder / "cells" / f"{record.cell.name}.json", record.to_dict())

    def find(self, cells: Iterable[Cell]) -> list[Record]:
        """Return the records of those of these runs that are finished, in their order."""
        paths = ((cell, self.folder / "cells" / f"{cell.name}.json") for cell in cells)
        return [Record(**_read(path)) for _, path in paths if path.exists()]

    def records(self) -> list[Record]:
        """Return the records of all runs in the folder, by name."""
        return [Record(**_read(path)) for path in sorted((self.folder / "cells").glob("*.json"))]

    def keep_time(self, timing: Timing) -> None:
        """Write the time that a variant takes alone."""
        write_json(self._time_path(timing), dataclasses.asdict(timing))

    def times(self) -> list[Timing]:
        """Return the times that were taken."""
        return [Timing(**_read(path)) for path in sorted((self.folder / "times").glob("*.json"))]

    def has_time(self, cell: Cell) -> bool:
        """Whether the time of this run's variant was taken."""
        return self._time_path(cell).exists()

    def _time_path(self, what: Timing | Cell) -> Path:
        rank = "" if what.rank is None else f"-r{what.rank}"
        return self.folder / "times" / f"{what.variant}{rank}-b{what.batch_size}.json"


def identity(study: Study) -> dict[str, Any]:
    """Return what makes the runs of two studies the same: all but the grid, which may grow."""
    jobs = {name: study.job_of(next(c for c in study.cells() if c.variant == name)) for name in study.variants}
    free = {"name", "learning_rate", "seed", "batch_size", "data", "eval_data"}
    told = {name: {k: v for k, v in job.to_dict().items() if k not in free} for name, job in jobs.items()}
    for name, described in told.items():
        if isinstance(described["method"], dict):
            own = study.ranks is not None  # then the rank is an axis
            method = {k: v for k, v in described["method"].items() if not (own and k == "rank")}
            told[name] = {**described, "method": method}
    first = next(iter(jobs.values()))
    data = {"data": first.data, "eval_data": first.eval_data, "test": study.test}
    values = {"version": VERSION, "base": study.base, "dtype": study.dtype, "diverged": study.diverged}
    values |= {"score": study.measure()[0], "ranks": study.ranks is not None, "variants": told}
    plain: dict[str, Any] = json.loads(json.dumps({**values, **{k: _digest(v) for k, v in data.items()}}))
    return plain


def _digest(data: Any) -> str | None:
    if data is None:
        return None
    return digest(data.examples if isinstance(data, Examples) else load_records(data))


def _check_same(was: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    if was.get("version") != VERSION:
        raise CheckpointError(f"{folder} has version {was.get('version')!r} of a study, this Lorry reads {VERSION}.")
    wrong = [f"{k} was {was.get(k)!r}, is {now[k]!r}" for k in now if k != "variants" and was.get(k) != now[k]]
    for name in now["variants"].keys() & was["variants"].keys():
        a, b = was["variants"][name], now["variants"][name]
        wrong += [f"{k} of variant '{name}' was {a.get(k)!r}, is {b[k]!r}" for k in b if a.get(k) != b[k]]
    if wrong:
        raise OptionError(
            f"{folder} holds another study: {'; '.join(wrong[:3])}. Choose another folder as 'out', or overwrite it."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it, and the study makes it anew.") from error
    return values
