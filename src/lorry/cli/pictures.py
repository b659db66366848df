"""Pictures of adapters and of runs, drawn with matplotlib into PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorry.serving.replay import Replayed

#: Rows of the spectrum panel that still carry their names.
NAMED_ROWS = 60


def _canvas(width: float, height: float, panels: int, ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    """Return a figure and its axes, without any display and without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None)[0]
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def heat_map(
    sites: Sequence[Mapping[str, Any]], path: Path, title: str, block_of: Callable[[str], str] | None = None
) -> Path:
    """Draw the norm of the update by site name and layer, and the log singular values of each site.

    Parameters
    ----------
    sites
        Mappings with ``path``, ``layer`` (or None), ``norm`` and ``singular_values``, in the order of the
        model.
    path
        The PNG file to write.
    title
        What the picture shows.
    block_of
        Gives the block of a path, to draw norms by block in place of the number of the layer.
    """
    import numpy as np

    if block_of is not None:
        sites = [{**s, "layer": block_of(s["path"])} for s in sites]
        layers: list[Any] = list(dict.fromkeys(s["layer"] for s in sites))
    else:
        layers = sorted({s["layer"] for s in sites}, key=lambda v: (v is None, v))
    names = list(dict.fromkeys(_label(s["path"]) for s in sites))
    norms = np.full((len(names), len(layers)), np.nan)
    for site in sites:
        row, column = names.index(_label(site["path"])), layers.index(site["layer"])
        # several sites of one name in one layer (towers with equal names) add up as parts of one update
        norms[row, column] = np.hypot(np.nan_to_num(norms[row, column]), site["norm"])
    width = max((len(s["singular_values"]) for s in sites), default=1)
    spectra = np.full((len(sites), max(width, 1)), np.nan)
    for index, site in enumerate(sites):
        values = np.asarray(site["singular_values"], dtype=float)
        spectra[index, : len(values)] = np.log10(np.maximum(values, 1e-12))
    rows = min(len(sites), NAMED_ROWS)
    left, right = 2.6 + 0.45 * len(layers), 3.6 + 0.16 * min(width, 64)
    figure, axes = _canvas(min(left + right, 22), max(3.2, 1.6 + max(0.34 * len(names), 0.17 * rows)), 2, [left, right])
    _norms(figure, axes[0], norms, names, layers)
    if block_of is not None:
        axes[0].set_xlabel("block")
        axes[0].tick_params(axis="x", rotation=90)
    _spectra(figure, axes[1], spectra, [s["path"] for s in sites])
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _norms(figure: Any, axis: Any, norms: Any, names: Sequence[str], layers: Sequence[Any]) -> None:
    image = axis.imshow(norms, aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    step = max(1, len(layers) // 24)
    axis.set_xticks(range(0, len(layers), step), ["none" if v is None else v for v in layers[::step]], fontsize=8)
    axis.set_xlabel("layer")
    axis.set_title("Frobenius norm of the update", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.9)


def _spectra(figure: Any, axis: Any, spectra: Any, paths: Sequence[str]) -> None:
    import numpy as np

    top = float(np.nanmax(spectra)) if np.isfinite(spectra).any() else 0.0
    image = axis.imshow(spectra, aspect="auto", cmap="magma", vmax=top, vmin=max(float(np.nanmin(spectra)), top - 4))
    if len(paths) <= NAMED_ROWS:
        axis.set_yticks(range(len(paths)), [_short(p) for p in paths], fontsize=5.5)
    else:
        axis.set_ylabel("site, in the order of the model")
    count = spectra.shape[1]
    axis.set_xticks(range(0, count, max(1, count // 8)), range(1, count + 1, max(1, count // 8)), fontsize=8)
    axis.set_xlabel("index")
    axis.set_title("log10 singular values", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.9)


def limits_map(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> Path:
    """Draw the ratio and the logit radius of each attention head, before and after, as maps of module by head.

    Parameters
    ----------
    panels
        Name ("before", "after") -> the records of `lorry.attention.HeadLimits`, in the order of the model.
    path
        The PNG file to write.
    title
        What the picture shows.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    modules = list(dict.fromkeys(r["path"] for records in panels.values() for r in records))
    heads = 1 + max(r["head"] for records in panels.values() for r in records)
    shown = [("ratio", "Γ / √ln L", "viridis"), ("radius", "logit radius R", "magma")]
    count = len(shown) * len(panels)
    height = max(2.8, 1.7 + 0.26 * len(modules))
    figure, axes = _canvas(1.8 + count * max(2.1, 0.3 * heads), height, count)
    for number, (key, label, colours) in enumerate(shown):
        maps = {}
        for name, records in panels.items():
            maps[name] = np.full((len(modules), heads), np.nan)
            for r in records:
                maps[name][modules.index(r["path"]), r["head"]] = r[key]
        every = np.concatenate([m.ravel() for m in maps.values()])
        most = max(float(np.nanmax(every)), 1e-6)
        # radii of trained heads are tens of times those of others
        scale = LogNorm(max(float(np.nanmin(every)), most / 1e4), most) if key == "radius" else Normalize(0, most)
        own = axes[number * len(panels) : (number + 1) * len(panels)]
        for position, (axis, (name, picture)) in enumerate(zip(own, maps.items(), strict=True)):
            image = axis.imshow(picture, aspect="auto", cmap=colours, norm=scale)
            axis.set_title(f"{label}, {name}" if len(panels) > 1 else label, fontsize=9)
            axis.set_xticks(range(0, heads, max(1, heads // 16)))
            axis.set_xlabel("head")
            named = not (number or position) and len(modules) <= NAMED_ROWS
            axis.set_yticks(range(len(modules)) if named else [], [_short(p) for p in modules] if named else [])
            axis.tick_params(labelsize=8)
        figure.colorbar(image, ax=list(own), shrink=0.9)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _label(path: str) -> str:
    """Return the name of a site with its parent where that says more (``mlp.experts`` of a bank keeps
    both).
    """
    parts = [p for p in path.split(".") if not p.isdigit()]
    return ".".join(parts[-2:]) if len(parts) > 1 else path


def _short(path: str) -> str:
    """Return a path without the beginning that all transformers share."""
    for prefix in ("base_model.model.", "model.layers.", "transformer.h.", "encoder.layer.", "model."):
        path = path.removeprefix(prefix)
    return path


def block_map(columns: Mapping[str, Mapping[str, float]], path: Path, title: str) -> Path:
    """Draw a number for each block as a map of block by column.

    Parameters
    ----------
    columns
        Name of a column -> block -> number.
    path
        The PNG file to write.
    title
        What the picture shows.
    """
    import numpy as np

    blocks = list(next(iter(columns.values())))
    values = np.array([[column[block] for column in columns.values()] for block in blocks])
    figure, axes = _canvas(4.6 + 1.2 * len(columns), 1.8 + 0.32 * len(blocks), 1)
    image = axes[0].imshow(values, aspect="auto", cmap="viridis")
    axes[0].set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes[0].set_xticks(range(len(columns)), list(columns), fontsize=8, rotation=20, ha="right")
    figure.colorbar(image, ax=axes[0], shrink=0.9)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str) -> Path:
    """Draw losses over steps, one line for each name, on a log scale.

    Parameters
    ----------
    series
        Name -> (step, loss) points.
    path
        The PNG file to write.
    title
        What the picture shows.
    """
    figure, axes = _canvas(7.2, 3.8, 1)
    axis = axes[0]
    for name, points in series.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axis.plot(steps, losses, label=name, linewidth=1.4)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def before_after(rows: Sequence[tuple[str, float, float]], path: Path, title: str) -> Path:
    """Draw shares from 0 to 1 before and after training, two bars for each name."""
    figure, axes = _canvas(7.2, 0.9 + 0.55 * len(rows), 1)
    axis = axes[0]
    for index, (_, before, after) in enumerate(rows):
        axis.barh(index - 0.18, before, height=0.34, color="#b8bcc4", label="before" if not index else None)
        axis.barh(index + 0.18, after, height=0.34, color="#2c7fb8", label="after" if not index else None)
        axis.text(min(before + 0.01, 1.0), index - 0.18, f"{before:.0%}", va="center", fontsize=8)
        axis.text(min(after + 0.01, 1.0), index + 0.18, f"{after:.0%}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_title(title, fontsize=11)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return _save(figure, path)


def replayed(found: Replayed, path: Path) -> Path:
    """Draw how long requests of a replay took, and how many ran and waited meanwhile."""
    from lorry.serving.replay import quantile

    figure, axes = _canvas(9.6, 3.6, 2)
    left, right = axes
    for name, seconds in (("first token", found.to_first), ("last token", found.to_end)):
        if seconds:
            shares = [(place + 1) / len(found.timings) for place in range(len(seconds))]
            left.plot(seconds, shares, label=f"{name} (median {quantile(seconds, 0.5):.2g} s)", drawstyle="steps-post")
    left.axvline(found.workload.deadline, color="#888888", linewidth=0.8, linestyle=":")
    left.set_xscale("log")
    left.set_ylim(0, 1.02)
    left.set_xlabel("seconds from arrival, log scale")
    left.set_ylabel("share of all requests")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    if found.course:
        times, running, waiting = zip(*found.course, strict=True)
        right.plot(times, running, label="running")
        right.plot(times, waiting, label="waiting")
        right.legend(frameon=False, fontsize=8)
    right.set_xlabel("seconds from the start")
    right.set_ylabel("requests")
    right.set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    work = found.workload
    over = f"{work.adapters} adapters" if any(t.ready is not None for t in found.timings) else "the base"
    figure.suptitle(
        f"{len(found.timings)} requests over {over}, {work.rate:g} in a second, cv {work.cv:g}", fontsize=11
    )
    return _save(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, below: str, title: str
) -> Path:
    """Draw panels of lines over one quantity on a log scale.

    Parameters
    ----------
    panels
        What a panel shows -> name of a line, empty where there is but one -> points.
    path
        The PNG file to write.
    below
        What the horizontal axes show.
    title
        What the picture shows.
    """
    figure, axes = _canvas(4.2 * len(panels), 3.6, len(panels))
    for axis, (what, series) in zip(axes, panels.items(), strict=True):
        for name, points in series.items():
            across, up = zip(*points, strict=True)
            axis.plot(across, up, label=name or None, linewidth=1.4, marker="o", markersize=3.5)
        places = sorted({across for points in series.values() for across, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(below)
        axis.set_title(what, fontsize=10)
        axis.grid(alpha=0.25, linewidth=0.5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if any(series):
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)
