"""The ledger as a document: a table, and for each claim its trial, its verdict and its plot."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ledger import Panel, Record, changed_since
from .sheets import write_sheet

#: Places on a logarithmic axis that have room for labels of their own.
_MOST_TICKS = 6

#: What follows a verdict in a table.
OLDER = " (older than the code)"

INTRODUCTION = """# What was claimed, and what came out here

Every entry tries a published claim in miniature: frozen networks on scikit-learn's digits, the pocket model and its
skills, synthetic teachers. Contenders share seeds, data order and budget, and each has its own learning rate from the
same grid, chosen on validation data; where the best rate of a contender lies at an end of the grid, its grid is widened
until it does not, by at most four rates.

- *Reproduced*: every statement of the claim holds on every seed.
- *Partly*: at least one of several statements does.
- *Not reproduced*: none does. What holds on the mean of seeds that disagree confirms nothing.
- *Reported*: the source does not say what to expect.

A miniature can contradict an explanation; it cannot refute figures that were measured on other models.

A record carries digests of the code that it ran: the study and its helpers, the methods and merges that it tries with
what they import of their own packages, and what it uses of training and of the pocket model. The core is held by the
laws instead, and comments and layout do not count. An entry whose code has changed since is marked *older than the
code*; its figures are those of the code that it ran.

`lorry claims` prints the table, `lorry claims run SLUG` repeats an entry, and this page and its plots are made from
the records by `lorry claims page`."""


def table_rows(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Name, verdict and summary of each record; the verdict says whether the record is older than the code."""
    return [
        (record.name, record.finding.verdict + (OLDER if changed_since(record) else ""), record.finding.summary)
        for record in records
    ]


def markdown(records: Sequence[Record], pictures: str = "claims") -> str:
    """Write the document.

    Parameters
    ----------
    records
        In the order in which they appear.
    pictures
        Folder of the plots, relative to the document.
    """
    lines = [INTRODUCTION, "", "| claim | verdict | what came out |", "|---|---|---|"]
    lines += [f"| [{n}](#{_anchor(n)}) | {verdict} | {_cell(summary)} |" for n, verdict, summary in table_rows(records)]
    for record in records:
        lines += ["", *_section(record, pictures)]
    return "\n".join(lines) + "\n"


def _section(record: Record, pictures: str) -> list[str]:
    found = record.finding
    seeds = f"{len(record.seeds)} seeds, {record.machine}"
    effort = "" if record.effort == 1 else f" **A look at {record.effort:g} of the full effort, not a finding.**"
    lines = [
        f"## {record.name}",
        "",
        f"**Claim.** {record.says} ({record.source})",
        "",
        f"**Trial.** {record.trial} {seeds}.{effort}",
        "",
        *_older(record),
        f"**{found.verdict.capitalize()}.** {found.summary}",
        "",
    ]
    if found.rates:
        lines += ["Rates chosen: " + ", ".join(f"{name} {rate:g}" for name, rate in found.rates.items()) + ".", ""]
    lines += [f"- {note}" for note in found.notes] + ([""] if found.notes else [])
    for panel in found.panels:
        lines += [*_figures(panel), ""]
    lines += [f"![{record.name}]({pictures}/{picture_name(record)})"]
    if found.sheet is not None:
        lines += ["", f"{found.sheet.title}:", "", f"![{found.sheet.title}]({pictures}/{sheet_name(record)})"]
    return lines


def _older(record: Record) -> list[str]:
    """A paragraph on what has changed since the record was made, if anything has."""
    if not record.code:
        return ["**Older than the code.** It was recorded before records kept the code that they ran.", ""]
    files = ", ".join(f"`{path}`" for path in changed_since(record))
    return [f"**Older than the code.** Changed since: {files}.", ""] if files else []


def _figures(panel: Panel) -> list[str]:
    """The figures of a panel as a table: mean, and the least and greatest of the seeds."""
    heads = [f"{panel.x_name} {place:g}" for place in panel.x] or [panel.unit]
    lines = [f"{panel.title}:", "", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, places in panel.series.items():
        cells = [
            f"{statistics.fmean(v):.3g} ({min(v):.3g} - {max(v):.3g})" if len(v) > 1 else f"{v[0]:.3g}" for v in places
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def picture_name(record: Record) -> str:
    """File name of a record's plot."""
    return f"{record.slug}-{record.key}.png"


def sheet_name(record: Record) -> str:
    """File name of a record's sheet of pictures."""
    return f"{record.slug}-{record.key}-pictures.png"


def draw(record: Record, folder: Path) -> Path:
    """Draw the panels of a record side by side, and beside them its sheet of pictures, if it has one."""
    if record.finding.sheet is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_sheet(record.finding.sheet, folder / sheet_name(record))
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    panels = record.finding.panels
    tallest = max(len(panel.series) for panel in panels)
    figure = Figure(figsize=(5.2 * len(panels), 2.2 + 0.28 * tallest), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        (_curves if panel.x else _dots)(axes, panel)
        axes.set_title(panel.title, fontsize=9)
    figure.suptitle(f"{record.name}: {record.finding.verdict}", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / picture_name(record)
    part = path.with_name(f".{path.name}")
    # no version of the plotting library in the file: the same record gives the same bytes
    figure.savefig(part, dpi=90, format="png", metadata={"Software": None})
    os.replace(part, path)
    return path


def _dots(axes: Any, panel: Panel) -> None:
    """One line for each contender: a dot for each seed, a bar at the mean."""
    names = list(panel.series)
    for place, name in enumerate(names):
        values = panel.series[name][0]
        axes.plot(values, [place] * len(values), "o", ms=5, alpha=0.6, color=f"C{place % 10}")
        axes.plot([statistics.fmean(values)], [place], "|", ms=16, mew=2, color=f"C{place % 10}")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    if panel.log_y:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)


def _curves(axes: Any, panel: Panel) -> None:
    """One curve of means for each contender, with the range of the seeds shaded."""
    for name, places in panel.series.items():
        means = [statistics.fmean(values) for values in places]
        (line,) = axes.plot(panel.x, means, marker="o", ms=3, label=name)
        axes.fill_between(
            panel.x, [min(v) for v in places], [max(v) for v in places], alpha=0.15, color=line.get_color()
        )
    axes.set_xlabel(panel.x_name, fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    if panel.log_x:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, panel.x if len(panel.x) <= _MOST_TICKS else ())
    if panel.log_y:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _plain_numbers(axis: Any, places: Sequence[float] = ()) -> None:
    """Label a logarithmic axis at `places`, or at 1, 2 and 5 of each power: its own labels need whole decades."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(places)) if places else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _anchor(name: str) -> str:
    """The address that Markdown renderers give to a heading."""
    return "".join(c for c in name.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
