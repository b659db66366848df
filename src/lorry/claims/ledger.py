"""Claims, findings and records: what is said, what came out here, and how it is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorry.core.errors import LorryError, OptionError, near_misses
from lorry.core.registry import Registry

from .code import changed, code_of

#: Where the records of this version lie: part of the package, so that ``lorry claims`` shows them anywhere.
RECORDS = Path(__file__).parent / "records"
VERSION = 3  # 1 had no code, 2 no sheets of pictures

#: What can become of a claim. ``partly``: some of its statements hold on every seed, at least one. ``reported``: the
#: source does not say what to expect, so that there is nothing to confirm.
VERDICTS = ("reproduced", "partly", "not reproduced", "reported")


@dataclass(frozen=True)
class Setting:
    """How much to spend.

    Attributes
    ----------
    seeds
        Of weights, data order and draws; every contender is run with each.
    effort
        Factor of steps and of the sizes of data; below 1 gives a look, not a finding.
    data
        Folder of public data sets, for studies on real text.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    effort: float = 1.0
    data: Path | None = None

    def much(self, full: int, least: int = 1) -> int:
        """Scale a number of steps or rows."""
        return max(least, round(full * self.effort))


@dataclass(frozen=True)
class Panel:
    """One plot: values of several contenders, by seed, at one place or along an axis.

    Attributes
    ----------
    title
        What is shown.
    unit
        Of the values, as the label of their axis.
    series
        Contender -> for each place on the axis the values of the seeds.
    x
        The places; one unnamed place if there is no axis.
    x_name
        Label of that axis.
    log_x, log_y
        Logarithmic axes.
    """

    title: str
    unit: str
    series: Mapping[str, Sequence[Sequence[float]]]
    x: Sequence[float] = ()
    x_name: str = ""
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        """Refuse series that do not fit the axis."""
        for name, values in self.series.items():
            if len(values) != max(1, len(self.x)):
                raise ValueError(f"{self.title}: {name} has {len(values)} places, expected {max(1, len(self.x))}.")


@dataclass(frozen=True)
class Sheet:
    """A few small pictures to look at, beside the figures that count.

    Attributes
    ----------
    title
        What is shown.
    columns, rows
        Their labels.
    size
        Side of each picture in pixels.
    png
        All pictures, row after row without gaps, as one PNG of few colours in base64.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    size: int
    png: str


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Attributes
    ----------
    verdict
        One of `VERDICTS`.
    summary
        A sentence or two with the figures that decide.
    panels
        What to plot; their figures are the record.
    rates
        Contender -> learning rate that its tuning chose.
    notes
        What a reader must know to judge: parameters, budgets, a rate at the edge of its grid.
    sheet
        Pictures, for studies that make any (`lorry.claims.sheets`).
    """

    verdict: str
    summary: str
    panels: Sequence[Panel]
    rates: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sheet: Sheet | None = None

    def __post_init__(self) -> None:
        """Refuse a verdict that there is not."""
        if self.verdict not in VERDICTS:
            raise ValueError(f"Expected a verdict of {VERDICTS}, found {self.verdict!r}.")


Study = Callable[[Setting], Finding]


@dataclass(frozen=True)
class Claim:
    """A behavioural claim and its miniature.

    Attributes
    ----------
    slug
        The method, or the topic.
    key
        Name of the claim within its slug.
    says
        The claim, in a sentence.
    source
        Paper and place.
    trial
        The miniature: model, data, budget, and what would count against the claim.
    study
        Runs it.
    """

    slug: str
    key: str
    says: str
    source: str
    trial: str
    study: Study

    @property
    def name(self) -> str:
        """Slug and key."""
        return f"{self.slug}/{self.key}"


@dataclass(frozen=True)
class Record:
    """A claim's last run, as it is written.

    Attributes
    ----------
    slug, key, says, source, trial
        Of the `Claim`.
    finding
        What came out.
    seeds, effort
        Of the `Setting`.
    seconds
        Processor time.
    machine
        What it ran on.
    code
        Digest of each file that decided the result, as it was at the start of the run; see `lorry.claims.code`. Records
        of version 1 have none.
    """

    slug: str
    key: str
    says: str
    source: str
    trial: str
    finding: Finding
    seeds: tuple[int, ...]
    effort: float
    seconds: float
    machine: str
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Slug and key."""
        return f"{self.slug}/{self.key}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Build a record from parsed JSON."""
        found = dict(values["finding"])
        panels = [Panel(**panel) for panel in found.pop("panels")]
        shown = found.pop("sheet", None)
        rest = {k: v for k, v in values.items() if k not in ("finding", "seeds")}
        return cls(
            finding=Finding(panels=panels, sheet=Sheet(**shown) if shown else None, **found),
            seeds=tuple(values["seeds"]),
            **rest,
        )


CLAIMS: Registry[Claim] = Registry("claim", "`lorry claims` lists them.")


def claim(slug: str, key: str, *, says: str, source: str, trial: str) -> Callable[[Study], Study]:
    """Register a study as the trial of a claim; see `Claim` for the fields."""

    def add(study: Study) -> Study:
        one = Claim(slug, key, says, source, trial, study)
        CLAIMS.add(one.name, one)
        return study

    return add


def claims(slug: str | None = None) -> list[Claim]:
    """Return all claims, or those of one slug, by name.

    Raises
    ------
    OptionError
        No claims of this slug; names the nearest.
    """
    found = [one for one in CLAIMS.values() if slug is None or one.slug == slug]
    if not found:
        raise OptionError(f"There are no claims of '{slug}'.{near_misses(str(slug), slugs())}")
    return found


def slugs() -> list[str]:
    """Slugs that have claims."""
    return list(dict.fromkeys(one.slug for one in CLAIMS.values()))


def changed_since(record: Record) -> list[str]:
    """Return the files whose code differs from what a record was made with; it is older than the code if there are any.

    A record whose claim is gone, or that does not know its code, differs in every file.
    """
    one = CLAIMS.get(record.name)
    return changed(record.code, {} if one is None else code_of(one.study))


def run(one: Claim, setting: Setting) -> Record:
    """Run a claim's study; what it draws from torch's own generator (routes of ReMix) is seeded too."""
    began, code = time.process_time(), code_of(one.study)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models run fastest so
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            finding = one.study(setting)
    finally:
        torch.set_num_threads(threads)
    return Record(
        slug=one.slug,
        key=one.key,
        says=one.says,
        source=one.source,
        trial=one.trial,
        finding=finding,
        seeds=setting.seeds,
        effort=setting.effort,
        seconds=round(time.process_time() - began, 1),
        machine=f"{platform.machine()} CPU, one thread, torch {torch.__version__.partition('+')[0]}",
        code=code,
    )


def write_records(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write the records of each slug into ``SLUG.json``, in place of older ones of the same claim; each file is
    whole or not written.
    """
    by_slug: dict[str, dict[str, Record]] = {}
    for record in records:
        by_slug.setdefault(record.slug, {})[record.key] = record
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for slug, new in by_slug.items():
        path = folder / f"{slug}.json"
        kept = {old.key: old for old in _read(path)} if path.exists() else {}
        listed = [_rounded(dataclasses.asdict(record)) for record in {**kept, **new}.values()]
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps({"version": VERSION, "records": listed}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        written.append(path)
    return written


def read_records(folder: Path = RECORDS) -> list[Record]:
    """Read all records of a folder, by slug.

    Raises
    ------
    LorryError
        A file is not a file of records, or of a newer version.
    """
    return [record for path in sorted(Path(folder).glob("*.json")) for record in _read(path)]


def _read(path: Path) -> list[Record]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] > VERSION:
            raise LorryError(f"{path} has version {values['version']}, this Lorry reads {VERSION}; update Lorry.")
        return [Record.from_dict(record) for record in values["records"]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LorryError):
            raise
        raise LorryError(f"{path} is not a file of claim records: {error}. Run `lorry claims run` again.") from error


def _rounded(value: Any) -> Any:
    """Five digits are more than any of the figures deserves."""
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
