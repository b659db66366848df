"""The curves of a study on one page: score over learning rate for each variant, best scores, sources of variance."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .analysis import SOURCES, Analysis, values
from .records import DIVERGED, FAILED, Record

#: Panels of variants in a row.
COLUMNS = 4
#: Lower than this part of all scores nothing is shown: one ruined run would flatten all curves.
_ROOM = 0.06


def draw(records: Sequence[Record], analysis: Analysis, paths: Sequence[Path]) -> bool:
    """Draw a study's page into files of the kinds that their names say; False without matplotlib.

    Each variant has a panel: lines are means over seeds, dots the runs, crosses runs that diverged (at the worst score
    of the study), the grey line the median of all variants, the star the best rate. Below are the best scores with one
    standard deviation, and the sources of variance.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    found = [r for r in records if r.status != FAILED]
    tested = analysis.chosen_by == "test apart"
    scores = dict(zip((r.cell for r in found), values(found, analysis.better, tested), strict=True))
    names = list(dict.fromkeys(r.variant for r in found))
    rows = -(-len(names) // COLUMNS)
    columns = max(2, -(-len(names) // rows))
    tall = 0.9 + 0.24 * len(analysis.standings)
    figure = Figure(figsize=(3.1 * columns, 2.4 * rows + tall + 0.7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.4 * rows, tall + 0.5), hspace=0.04)
    above, below = parts
    panels = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    median = _median(found, scores)
    for number, axes in enumerate(panels.flat):
        if number >= len(names):
            axes.set_visible(False)
            continue
        _curve(axes, names[number], f"C{number % 10}", found, scores, analysis, median)
    for number in range(len(names)):
        if number + columns >= len(names):
            panels.flat[number].set_xlabel("learning rate")
            panels.flat[number].tick_params(labelbottom=True)
    _limits(panels.flat[0], list(scores.values()), analysis)
    above.supylabel(("test " if tested else "held-out ") + analysis.score, fontsize=10)
    left, right = below.subplots(1, 2, width_ratios=(3, 2))
    _best(left, analysis, names)
    _shares(right, analysis)
    for path in paths:
        draft = path.with_name(f".{path.name}.draft")
        figure.savefig(draft, format=path.suffix[1:])
        os.replace(draft, path)
    return True


def _median(found: Sequence[Record], scores: Any) -> dict[float, float]:
    by_rate: dict[float, list[float]] = {}
    for record in found:
        by_rate.setdefault(record.rate, []).append(scores[record.cell])
    return {rate: statistics.median(by_rate[rate]) for rate in sorted(by_rate)}


def _curve(
    axes: Any, name: str, color: str, found: Sequence[Record], scores: Any, analysis: Analysis, median: Any
) -> None:
    axes.plot(list(median), list(median.values()), color="0.75", linewidth=1.2, zorder=1)
    own = [r for r in found if r.variant == name]
    setups = list(dict.fromkeys((r.rank, r.batch_size) for r in own))
    ranks, batches = ({r.rank for r in own}, {r.batch_size for r in own})
    for index, (rank, batch) in enumerate(setups):
        runs = [r for r in own if (r.rank, r.batch_size) == (rank, batch)]
        rates = sorted({r.rate for r in runs})
        means = [statistics.fmean(scores[r.cell] for r in runs if r.rate == rate) for rate in rates]
        label = ", ".join(
            [f"rank {rank}"] * (len(ranks) > 1) + [f"batch {batch}"] * (len(batches) > 1)
        )  # fmt: skip
        style = ("-", "--", ":", "-.")[index % 4]
        fade = 1.0 if len(setups) == 1 else 0.35 + 0.65 * (index + 1) / len(setups)
        axes.plot(rates, means, style, color=color, linewidth=1.7, alpha=fade, label=label or None, zorder=3)
        for status, marker, size in (("done", ".", 5), (DIVERGED, "x", 5)):
            marked = [r for r in runs if r.status == status]
            points = ([r.rate for r in marked], [scores[r.cell] for r in marked])
            axes.plot(*points, marker, color=color, markersize=size, alpha=0.45, zorder=2)
    for s in analysis.standings:
        if s.variant == name and s.rate is not None:
            axes.plot([s.rate], [s.mean], "*", color=color, markersize=11, markeredgecolor="white", zorder=4)
    axes.set_xscale("log")
    axes.set_title(name, fontsize=9.5, loc="left")
    axes.grid(alpha=0.2)
    axes.tick_params(labelsize=8)
    if 1 < len(setups) <= 4:
        axes.legend(fontsize=6.5, frameon=False)


def _limits(axes: Any, scores: Sequence[float], analysis: Analysis) -> None:
    """Show the scores from the best to a little beyond the start, or to the worst if that is nearer."""
    starts = [s.start for s in analysis.standings if s.start is not None]
    best, worst = (max(scores), min(scores)) if analysis.better == "max" else (min(scores), max(scores))
    if starts:
        start = statistics.fmean(starts)
        limit = start + 0.5 * (start - best)
        worst = max(worst, limit) if analysis.better == "max" else min(worst, limit)
    room = _ROOM * abs(best - worst) or 1.0
    axes.set_ylim(min(best, worst) - room, max(best, worst) + room)


def _best(axes: Any, analysis: Analysis, names: Sequence[str]) -> None:
    shown = [s for s in analysis.standings if s.mean is not None]
    several = len({(s.rank, s.batch_size) for s in shown}) > 1
    for place, s in enumerate(shown):
        color = f"C{names.index(s.variant) % 10}"
        axes.errorbar(s.mean, place, xerr=s.spread or 0.0, fmt="o", color=color, capsize=3, markersize=5)
    labels = [
        f"{s.variant}  {'r' + str(s.rank) if s.rank else ''} b{s.batch_size}" if several else s.variant for s in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{analysis.score} at the best rate, ± one standard deviation over seeds", fontsize=8.5)
    axes.grid(alpha=0.2, axis="x")
    axes.tick_params(labelsize=8)


def _shares(axes: Any, analysis: Analysis) -> None:
    found = {SOURCES.get(k, k): v for k, v in analysis.shares.items() if v is not None}
    if not found:
        axes.set_visible(False)
        return
    axes.barh(list(found), list(found.values()), color="0.55", height=0.6)
    for place, share in enumerate(found.values()):
        axes.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=8)
    axes.set_xlim(0, max(found.values()) * 1.2 + 0.02)
    axes.invert_yaxis()
    axes.set_xlabel("part of the variance of the scores", fontsize=8.5)
    axes.tick_params(labelsize=8)
