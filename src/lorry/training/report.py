"""What a fleet leaves behind: metrics for each job, a report for programs, a table and curves for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .run import Run

VERSION = 1


class MetricsFile:
    """A job's ``metrics.jsonl``: a line for each step and for each evaluation.

    Parameters
    ----------
    path
        Where the file is.
    offset
        Bytes to keep of a file that is there; what was written after a checkpoint is cut off.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size >= offset:
            with path.open("r+b") as file:
                file.truncate(offset)
        else:
            path.write_bytes(b"")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line; numbers that JSON does not know become null."""
        self._file.write(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n")
        self._file.flush()

    @property
    def offset(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def job_report(run: Run, adapter_path: Path | None) -> dict[str, Any]:
    """A job's entry in ``report.json``."""
    p = run.progress
    made = run.prepared
    report = {
        "name": run.name,
        "status": p.status,
        "method": run.job.make_method().to_dict(),
        "objective": run.job.make_objective().name,
        "parameters": None if run.adapter is None else run.adapter.count(),
        "sites": None if run.adapter is None else len(run.adapter.entries),
        "steps": p.step,
        "planned_steps": run.total,
        "drawn": p.drawn,
        run.unit: p.size_seen,
        "unit": run.unit,
        "seconds": round(p.seconds, 3),
        "first_loss": p.first_loss,
        "last_loss": p.last_loss,
        "best_loss": p.best_loss,
        "eval": _evaluations(run),
        "adapter": None if adapter_path is None else str(adapter_path),
        "labels": None if made is None or made.labels is None else list(made.labels),
        "data": None if made is None else made.train.report.as_dict(),
        "seed": run.job.seed,
    }
    return {k: _finite(v) for k, v in report.items()}


def _evaluations(run: Run) -> dict[str, Any] | None:
    p = run.progress
    if not p.evaluations:
        return None
    plain = [{k: _finite(v) for k, v in row.items()} for row in p.evaluations]
    best = next((row for row in plain if row["step"] == p.best_step), None)
    return {"start": plain[0], "end": plain[-1], "best": best, "count": len(plain)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(report: Mapping[str, Any], console: Any = None) -> None:
    """Print a fleet's report as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    jobs: Sequence[Mapping[str, Any]] = report["jobs"]
    table = Table(title=f"{len(jobs)} job{'s' if len(jobs) > 1 else ''} on {report['base']}, {report['seconds']:.1f} s")
    table.add_column("job")
    units = list(dict.fromkeys(job.get("unit", "tokens") for job in jobs))
    for heading in ("parameters", "steps", ", ".join(units), "loss first", "last"):
        table.add_column(heading, justify="right")
    names = [n for n in ("loss", "accuracy") if any(n in (j["eval"] or {}).get("end", {}) for j in jobs)]
    for name in names:
        table.add_column(f"held-out {name}", justify="right")
    table.add_column("status")
    for job in jobs:
        held = job["eval"] or {}
        measured = [_change(held.get("start", {}).get(n), held.get("end", {}).get(n)) for n in names]
        style = "red" if job["status"].startswith("failed") else "green" if job["status"] == "done" else "yellow"
        numbers = [_number(job["parameters"]), _number(job["steps"]), _number(job[job.get("unit", "tokens")])]
        losses = [_number(job["first_loss"]), _number(job["last_loss"])]
        table.add_row(Text(job["name"]), *numbers, *losses, *measured, Text(job["status"], style=style))
    console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _change(start: float | None, end: float | None) -> str:
    return "-" if end is None else f"{_number(start)} → {_number(end)}"


def draw_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw the losses of all jobs into one picture (PNG): thin as measured, thick smoothed, dots held out.

    Parameters
    ----------
    metrics
        Rows of ``metrics.jsonl`` by job.
    path
        The picture.

    Returns
    -------
    bool
        False where there is nothing to draw, or no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawn = {
        name: [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None] for name, rows in metrics.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return False
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = math.inf, 0.0
    for number, (name, points) in enumerate(drawn.items()):
        steps, losses = [s for s, _ in points], [v for _, v in points]
        smooth = _smoothed(losses)
        color, style = f"C{number % 10}", ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, style, color=color, linewidth=1.8, label=name if number < 24 else None)
        held = [(r["step"], r["eval_loss"]) for r in metrics[name] if r.get("eval_loss") is not None]
        axes.plot(
            [s for s, _ in held],
            [v for _, v in held],
            "o",
            color=color,
            markersize=4,
            markeredgecolor="white",
        )
        low, high = min(low, min(smooth)), max(high, max(smooth))
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per prediction)")
    axes.set_title("Training loss, smoothed; dots are held-out loss")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=1 + (len(drawn) > 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(path)
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean = weight = 0.0
    out = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
