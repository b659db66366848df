"""Attention as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorry.attention.call import AttentionError

#: Tokens whose names still fit beside a panel.
_NAMED = 40
_MOST_COLUMNS = 4


def heat_map(
    probabilities: Tensor,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
) -> Path:
    """Draw attention probabilities into a PNG file, one panel for each head.

    Parameters
    ----------
    probabilities
        ``(heads, length, keys)`` of one row of a batch, as ``call.probabilities[0]``, or ``(length, keys)``.
    path
        The file to write; folders are made, and the file appears whole or not at all.
    title
        What the picture shows.
    queries, keys
        Names of the tokens, shown where at most 40 fit.
    heads
        Which heads to draw; all if left out.

    Raises
    ------
    AttentionError
        The tensor has another number of axes, or the names are of another number.
    """
    maps = _maps(probabilities)
    for what, names, size in (("queries", queries, maps.shape[1]), ("keys", keys, maps.shape[2])):
        if names is not None and len(names) != size:
            raise AttentionError(f"{what} has {len(names)} names, but the probabilities have {size} {what}.")
    chosen = list(range(len(maps))) if heads is None else list(heads)
    if not chosen or not all(0 <= head < len(maps) for head in chosen):
        raise AttentionError(f"Heads must be some of 0 to {len(maps) - 1}, found {chosen}.")
    figure = _drawn(maps[chosen], chosen, queries, keys)
    if title:
        figure.suptitle(title, fontsize=10)
    return _saved(figure, Path(path))


def _maps(probabilities: Tensor) -> Tensor:
    maps = probabilities.detach().float().cpu()
    maps = maps.unsqueeze(0) if maps.ndim == 2 else maps
    if maps.ndim != 3 or not maps.numel():
        raise AttentionError(
            f"A heat map needs probabilities of shape (heads, length, keys) or (length, keys), found "
            f"{tuple(probabilities.shape)}; take one row of the batch, as in call.probabilities[0]."
        )
    return maps


def _drawn(maps: Tensor, heads: Sequence[int], queries: Sequence[str] | None, keys: Sequence[str] | None) -> Any:
    """Return a figure with a panel for each head, on one colour scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(maps), _MOST_COLUMNS)
    rows = math.ceil(len(maps) / columns)
    tall = min(max(maps.shape[1] / maps.shape[2], 0.4), 2.0)
    figure = Figure(figsize=(3.4 * columns + 0.8, 3.2 * rows * tall + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in axes.flat[len(maps) :]:
        panel.set_axis_off()
    for panel, picture, head in zip(axes.flat, maps, heads, strict=False):
        image = panel.imshow(picture, vmin=0.0, vmax=float(maps.max()), cmap="viridis", aspect="auto")
        panel.set_title(f"head {head}", fontsize=9)
        for axis, names in ((panel.xaxis, keys), (panel.yaxis, queries)):
            if names is not None and len(names) <= _NAMED:
                axis.set_ticks(range(len(names)), names, fontsize=7)
        if keys is not None and len(keys) <= _NAMED and max(map(len, keys)) > 2:
            panel.tick_params("x", labelrotation=90)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.colorbar(image, ax=axes, label="probability", fraction=0.03, pad=0.01)
    return figure


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
