"""What a study leaves for people and programs: JSON, tables, and one page with its curves."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorry.training.checkpoint import write_json

from .analysis import SOURCES, Analysis, Standing
from .options import Study
from .pictures import draw
from .records import DIVERGED, FAILED, Record

VERSION = 1


def write_report(study: Study, records: Sequence[Record], analysis: Analysis, folder: Path) -> dict[str, Any]:
    """Write ``report.json``, ``rates.png``, ``rates.svg`` and ``report.html``, and return the first as data."""
    pictures = {kind: folder / f"rates.{kind}" for kind in ("png", "svg")}
    drawn = draw(records, analysis, list(pictures.values()))
    report = {
        "version": VERSION,
        "base": study.base,
        "grid": {axis: list(getattr(study, axis) or ()) or None for axis in ("rates", "ranks", "batch_sizes", "seeds")},
        "runs": {status: sum(r.status == status for r in records) for status in ("done", DIVERGED, FAILED)},
        **analysis.to_dict(),
        "picture": str(pictures["png"]) if drawn else None,
        "records": [record.to_dict() for record in records],
    }
    write_json(folder / "report.json", report)
    _write(folder / "report.html", page(study, records, analysis, pictures["png"] if drawn else None))
    return report


def standing_columns(analysis: Analysis) -> list[str]:
    """Return the heads of `standing_rows`."""
    seen = analysis.standings
    ranks = ["rank"] if any(s.rank is not None for s in seen) else []
    batches = ["batch size"] if len({s.batch_size for s in seen}) > 1 else []
    best = f"{analysis.score} at the best rate"
    return ["variant", *ranks, *batches, best, "best rate", "a decade off", "parameters", "ms a step", "time", "ended"]


def standing_rows(analysis: Analysis, records: Sequence[Record]) -> list[list[str]]:
    """Return the table of what each setup reached, as text.

    ``a decade off`` is what the score loses there, ``time`` the part of a step of every setup, ``ended`` the runs that
    came to their end, of all.
    """
    columns = standing_columns(analysis)
    return [_row(s, columns, records) for s in analysis.standings]


def _row(s: Standing, columns: Sequence[str], records: Sequence[Record]) -> list[str]:
    own = sum((r.variant, r.rank, r.batch_size) == (s.variant, s.rank, s.batch_size) for r in records)
    mean = "-" if s.mean is None else f"{s.mean:.4f}"
    cells = [s.variant]
    cells += [str(s.rank)] if "rank" in columns else []
    cells += [str(s.batch_size)] if "batch size" in columns else []
    return [
        *cells,
        mean if s.spread is None else f"{mean} ± {s.spread:.4f}",
        "-" if s.rate is None else f"{s.rate:g}{' (edge)' if s.at_edge else ''}",
        "-" if s.sensitivity is None else f"{s.sensitivity:+.4f}",
        "-" if s.parameters is None else f"{s.parameters:,}",
        "-" if s.seconds is None else f"{1000 * s.seconds:.1f}",
        "-" if s.time_share is None else f"{s.time_share:.0%}",
        f"{own - s.diverged - s.failed} of {own}",
    ]


def share_rows(analysis: Analysis) -> list[tuple[str, str]]:
    """Return what explains the scores, largest first; what had one value only is left out."""
    found = {name: share for name, share in analysis.shares.items() if share is not None}
    return [(SOURCES.get(name, name), f"{found[name]:.1%}") for name in sorted(found, key=lambda n: -found[n])]


def sentences(analysis: Analysis) -> list[str]:
    """Return the findings in sentences."""
    said = []
    shared = analysis.shared
    if shared is not None and analysis.best_spread is not None and len(analysis.standings) > 1:
        said.append(
            f"At one rate for all, {shared.rate:g}, the best for all together, the variants spread by "
            f"{shared.spread:.4f} (standard deviation of their means); each at its own best rate, by "
            f"{analysis.best_spread:.4f}."
        )
    edges = [s.variant for s in analysis.standings if s.at_edge]
    if edges:
        names = ", ".join(dict.fromkeys(edges))
        said.append(f"The best rate is at an end of the grid for {names}: widen the grid there (widen, or more rates).")
    return said


def page(study: Study, records: Sequence[Record], analysis: Analysis, picture: Path | None) -> str:
    """Return the whole report as one HTML page that needs nothing beside it."""
    grid = f"{len(study.variants)} variants, {len(study.rates)} rates, {len(study.seeds)} seeds"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(f'Study on {study.base}')}</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #8884;"
        "text-align:right}th:first-child,td:first-child{text-align:left}img{max-width:100%;background:#fff}</style>",
        f"<h1>Study on {html.escape(study.base)}</h1>",
        f"<p>{grid}, {len(records)} runs. Score: {html.escape(analysis.score)}, "
        f"{'higher' if analysis.better == 'max' else 'lower'} is better; ± is one standard deviation over seeds.</p>",
        _table(standing_columns(analysis), standing_rows(analysis, records)),
        *(f"<p>{html.escape(text)}</p>" for text in sentences(analysis)),
    ]
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f"<img alt='Scores over learning rates' src='data:image/png;base64,{data}'>")
    shares = share_rows(analysis)
    if shares:
        parts += ["<h2>What explains the scores</h2>", _table(("source", "part of the variance"), shares)]
    broken = [(r.cell.name, r.status, r.reason or "") for r in records if r.status in (DIVERGED, FAILED)]
    if broken:
        parts += ["<h2>Runs that did not end</h2>", _table(("run", "", "why"), broken)]
    return "\n".join([*parts, "</html>\n"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
