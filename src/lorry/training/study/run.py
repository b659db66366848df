"""A study from end to end: what is not done yet is done, as fleets, here or on a cluster; then the report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorry.core.errors import OptionError
from lorry.training.folder_lock import locked

from .analysis import Analysis, analyse, means
from .cluster import Load, Part, on_cluster
from .fleets import Bench
from .options import Cell, Study, beyond
from .records import FAILED, Record, Store, Timing
from .report import write_report

#: Told what is done: finished runs, of how many, and how many of the fleet under way (a fraction) count besides.
Told = Callable[[float, int, Sequence[Record]], None]


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes
    ----------
    records
        Of all runs, those of widened grids too.
    times
        Of each variant alone.
    analysis
        What follows from them.
    report
        The same as plain data, as in ``report.json``.
    folder
        Where ``report.json``, ``report.html``, ``rates.png`` and ``rates.svg`` are.
    """

    records: Sequence[Record]
    times: Sequence[Timing]
    analysis: Analysis
    report: Mapping[str, Any]
    folder: Path


def run_study(
    study: Study | Mapping[str, Any],
    load: Load,
    *,
    ray: bool | str = False,
    gpus: float = 0.0,
    overwrite: bool = False,
    told: Told | None = None,
) -> StudyResult:
    """Do what of a study is not done yet, and report on all of it.

    Every finished run lies in the study's folder, so that a study that was stopped goes on where it was, and one whose
    grid has grown does only what is new; runs that failed are tried again, those that diverged are not.

    Parameters
    ----------
    study
        What is compared, and where the results go.
    load
        Gives the base and its tokenizer; called when there is something to train, on a cluster once in each worker.
    ray
        Run the fleets as Ray tasks: True on a cluster that is initialised or started here, or an address.
    gpus
        Of each Ray task.
    overwrite
        Remove the results of another study in the folder.
    told
        Called as runs finish.

    Raises
    ------
    OptionError
        The folder holds another study, or something cannot be done as asked.
    DataError
        Data that cannot be read or used.
    KeyboardInterrupt
        After Ctrl-C; what was under way goes on at the next call.
    """
    study = study if isinstance(study, Study) else Study.from_dict(study)
    where = _Place(study, load, ray, gpus)
    with locked(Path(study.out)):
        store = Store(study, overwrite)
        cells = study.cells()
        while cells:
            _do(study, store, cells, where, told)
            cells = _wider(study, _own(study, store))
        records, times = _own(study, store), store.times()
        if not any(record.score is not None for record in records):
            raise OptionError(f"No run of the study came to an end: {next((r.reason for r in records), 'none')}.")
        analysis = analyse(records, *study.measure(), times, study.rates)
        report = write_report(study, records, analysis, store.folder)
    return StudyResult(records, times, analysis, report, store.folder)


class _Place:
    """Where a study runs: in this process, on a base that is loaded when it is needed, or on a cluster."""

    def __init__(self, study: Study, load: Load, ray: bool | str, gpus: float) -> None:
        self.study, self.load, self.ray, self.gpus = study, load, ray, gpus
        self.bench: Bench | None = None

    def results(
        self, parts: Sequence[Part], folder: Path, tell: Callable[[float], None]
    ) -> Iterator[list[Record] | Timing]:
        """Do parts of the study, and give what each came to, in any order; `tell` hears how much of one is done."""
        if self.ray:
            address = self.ray if isinstance(self.ray, str) else None
            yield from on_cluster(self.study, self.load, parts, address=address, gpus=self.gpus)
            return
        if self.bench is None:
            self.bench = Bench(self.study, *self.load())
        for part in parts:
            if isinstance(part, Cell):
                yield self.bench.time(part)
                continue
            place = folder / "fleets" / _key(part) if self.study.checkpoint_every else None
            yield self.bench.train(part, place, partial(_steps, tell, len(part)))


def _steps(tell: Callable[[float], None], runs: int, done: int, planned: int) -> None:
    tell(runs * done / max(1, planned))


def _do(study: Study, store: Store, cells: Sequence[Cell], where: _Place, told: Told | None) -> None:
    """Do what of these runs is missing, and the times."""
    finished = [record for record in store.find(cells) if record.status != FAILED]
    done = {record.cell for record in finished}
    parts: list[Part] = [left for group in _groups(cells, study.fleet) if (left := [c for c in group if c not in done])]
    if study.timed_steps:
        parts += [cell for cell in _first(cells) if not store.has_time(cell)]

    def tell(under_way: float) -> None:
        if told is not None:
            told(len(finished) + under_way, len(cells), finished)

    tell(0)
    if not parts:
        return
    for found in where.results(parts, store.folder, tell):
        if isinstance(found, Timing):
            store.keep_time(found)
            continue
        for record in found:
            store.keep(record)
        finished += found
        tell(0)


def _groups(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """Return runs in fleets: of one batch size each, so that no job of a pass waits for another."""
    by_batch: dict[int, list[Cell]] = {}
    for cell in cells:
        by_batch.setdefault(cell.batch_size, []).append(cell)
    return [group[i : i + size] for group in by_batch.values() for i in range(0, len(group), size)]


def _first(cells: Iterable[Cell]) -> list[Cell]:
    """Return one run of each variant, rank and batch size."""
    return list({(cell.variant, cell.rank, cell.batch_size): cell for cell in cells}.values())


def _own(study: Study, store: Store) -> list[Record]:
    """Return the finished runs of the grid, and those by which it was widened."""
    grid = set(study.cells())
    axes = {(c.variant, c.rank, c.batch_size, c.seed) for c in grid} if study.widen else set()
    found = [r for r in store.records() if r.cell in grid or (r.variant, r.rank, r.batch_size, r.seed) in axes]
    order = list(study.variants)
    return sorted(found, key=lambda r: (order.index(r.variant), r.rank or 0, r.batch_size, r.rate, r.seed))


def _wider(study: Study, records: Sequence[Record]) -> list[Cell]:
    """Return the runs at the next rates of those setups whose best rate lies at an end of their grid."""
    better = min if study.measure()[1] == "min" else max
    more = []
    for (variant, rank, batch), by_rate in means(records, study.measure()[1]).items():
        if len(by_rate) >= len(study.rates) + study.widen:
            continue
        rate = beyond(by_rate, better)
        if rate is not None:
            more += [Cell(variant, rank, batch, rate, seed) for seed in study.seeds]
    return more


def _key(part: Sequence[Cell]) -> str:
    return hashlib.blake2b("\n".join(cell.name for cell in part).encode(), digest_size=8).hexdigest()
