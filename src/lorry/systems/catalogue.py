"""What a system is, what its run is given and gives, and the registry of systems."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorry.core.errors import OptionError
from lorry.core.registry import Registry


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Run:
    """What a run is given.

    Attributes
    ----------
    out
        Folder for all that it writes; it exists.
    seed
        Of everything drawn.
    effort
        Factor of steps and data; below 1 gives a look, not a finding.
    data
        Folder of public data sets, if there is one.
    base
        Folder of a real checkpoint to run on, instead of the small model that ships.
    step
        Told what is done, how much of it, and of how much.
    """

    out: Path
    seed: int = 0
    effort: float = 1.0
    data: Path | None = None
    base: str | None = None
    step: Callable[[str, int, int], None] = _silent

    def scaled(self, count: int, least: int = 1) -> int:
        """Return `count` times the effort, at least `least`."""
        return max(least, round(count * self.effort))


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes
    ----------
    says
        The finding in a sentence or two, for people.
    columns, rows
        The table of figures; as many cells in a row as there are columns.
    files
        What was written, pictures first, relative to the run's folder.
    notes
        What the table does not say: what was left out, what a real checkpoint would need.
    """

    says: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]
    files: Sequence[str] = ()
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes
    ----------
    name
        On the command line: the slug of its sheet.
    title
        What it is, in a sentence.
    source
        Where it was published, e.g. ``arXiv 2312.03248``.
    function
        Runs it whole.
    """

    name: str
    title: str
    source: str
    function: Callable[[Run], Outcome]


SYSTEMS: Registry[System] = Registry("system", "`lorry systems` lists them.")


def system(name: str, *, title: str, source: str) -> Callable[[Callable[[Run], Outcome]], Callable[[Run], Outcome]]:
    """Return a decorator that registers a function as the run of a system; see `System` for the parameters."""

    def add(function: Callable[[Run], Outcome]) -> Callable[[Run], Outcome]:
        SYSTEMS.add(name, System(name, title, source, function))
        return function

    return add


def run(name: str, given: Run) -> Outcome:
    """Run a system whole and write ``outcome.json`` beside what it wrote.

    Raises
    ------
    OptionError
        No system has this name, the effort is not positive, or the data folder is not there.
    """
    found = SYSTEMS.find(name)
    if given.effort <= 0:
        raise OptionError(f"effort must be above 0, not {given.effort:g}. At 1 a run is as its README shows it.")
    if given.data is not None and not given.data.is_dir():
        raise OptionError(
            f"There is no folder {given.data}. Give the folder that holds the data sets, or leave it out."
        )
    given.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    outcome = found.function(given)
    facts = {
        "system": found.name,
        "source": found.source,
        "seed": given.seed,
        "effort": given.effort,
        "seconds": round(time.monotonic() - start, 1),
        "says": outcome.says,
        "columns": list(outcome.columns),
        "rows": [list(row) for row in outcome.rows],
        "files": list(outcome.files),
        "notes": list(outcome.notes),
    }
    written = given.out / "outcome.json"
    aside = written.with_name(f".outcome.{os.getpid()}")
    try:
        aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(written)
    finally:
        aside.unlink(missing_ok=True)
    return outcome
