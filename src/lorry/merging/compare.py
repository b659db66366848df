"""Comparing adapters: how large they are and how alike, site by site, from small cores only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.merging.engine import Inputs, _named, _same_base, _shapes
from lorry.merging.factors import Factors, decompose, gram
from lorry.merging.sources import open_source
from lorry.merging.weights import layer_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PairAtSite:
    """How alike two updates are at one site.

    Attributes
    ----------
    cosine
        Of the updates, in the Frobenius sense.
    reads, writes
        Mean squared cosine of the principal angles between the subspaces that they read and that they write.
    smallest_angle
        Smallest principal angle between what they write, in degrees.
    """

    cosine: float
    reads: float
    writes: float
    smallest_angle: float


@dataclass(frozen=True)
class Comparison:
    """Sizes and likeness of adapters.

    Attributes
    ----------
    names
        The adapters, sorted.
    base
        ``match``, ``unknown`` or ``differs``.
    norms
        Adapter -> site path -> Frobenius norm of the update.
    ranks
        Adapter -> site path -> numerical rank.
    pairs
        ``"a|b"`` -> site path -> likeness, at sites where both have an update.
    overall
        ``"a|b"`` -> cosine of the whole adapters, missing sites counting as 0.
    """

    names: tuple[str, ...]
    base: str
    norms: dict[str, dict[str, float]]
    ranks: dict[str, dict[str, int]]
    pairs: dict[str, dict[str, PairAtSite]]
    overall: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def compare(inputs: Inputs, *, model: nn.Module | None = None) -> Comparison:
    """Compare adapters site by site; nothing as large as a weight is built.

    Parameters
    ----------
    inputs
        Two or more directories or live adapters; a mapping gives them names.
    model
        The base, for adapters whose update depends on its weights.

    Raises
    ------
    AdapterError, CheckpointError, FingerprintError
        As for a merge; different fingerprints are said in the result, different shapes are refused.
    """
    named = _named(inputs)
    if len(named) < 2:
        raise AdapterError(f"Comparing needs at least two adapters, found {len(named)}.")
    with ExitStack() as stack:
        sources = {n: open_source(item, n, model, stack) for n, item in sorted(named.items())}
        verdict = _same_base(sources, False)
        names = tuple(sources)
        shapes = _shapes(sources)
        norms: dict[str, dict[str, float]] = {n: {} for n in names}
        ranks: dict[str, dict[str, int]] = {n: {} for n in names}
        pairs: dict[str, dict[str, PairAtSite]] = {}
        products = torch.zeros(len(names), len(names), dtype=torch.float64)
        for path in shapes:
            here = {n: _parts(*s.read(path)) for n, s in sources.items() if path in s.sites}
            found = _at_site(here)
            for i, name in enumerate(here):
                norms[name][path] = float(found.gram[i, i].clamp_min(0).sqrt())
                ranks[name][path] = max(d[0].shape[1] for d in found.spans[i])
                for j, other in enumerate(here):
                    products[names.index(name), names.index(other)] += found.gram[i, j]
                    if i < j:
                        pairs.setdefault(f"{name}|{other}", {})[path] = found.pair(i, j)
    sizes = products.diagonal().sqrt()
    overall = {
        f"{a}|{b}": float(products[i, j] / (sizes[i] * sizes[j])) if float(sizes[i] * sizes[j]) else 0.0
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
    return Comparison(names, "differs" if verdict == "ignored" else verdict, norms, ranks, pairs, overall)


def _parts(a: Tensor, b: Tensor) -> list[Factors]:
    """Return the matrices of a site: one, or one for each expert."""
    return [Factors(x, y) for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)]


@dataclass
class _AtSite:
    gram: Tensor
    spans: list[list[tuple[Tensor, Tensor]]]

    def pair(self, i: int, j: int) -> PairAtSite:
        """Return the likeness of two adapters, averaged over the experts of a bank."""
        size = float((self.gram[i, i] * self.gram[j, j]).clamp_min(0).sqrt())
        cosine = float(self.gram[i, j]) / size if size else 0.0
        reads, writes, angles = [], [], []
        for (u1, v1), (u2, v2) in zip(self.spans[i], self.spans[j], strict=True):
            k = min(u1.shape[1], u2.shape[1])
            if not k:
                continue
            between = torch.linalg.svdvals(u1.mT @ u2)
            writes.append(float(between.square().sum()) / k)
            reads.append(float((v1.mT @ v2).square().sum()) / k)
            angles.append(float(torch.rad2deg(between[0].clamp(-1, 1).arccos())))
        count = max(len(reads), 1)
        return PairAtSite(
            max(-1.0, min(1.0, cosine)), sum(reads) / count, sum(writes) / count, min(angles, default=90.0)
        )


def _at_site(here: Mapping[str, Sequence[Factors]]) -> _AtSite:
    parts = list(here.values())
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for matrices in zip(*parts, strict=True):
        total += gram(matrices)
    spans = []
    for own in parts:
        decompositions = [decompose(f) for f in own]
        spans.append([(d.u, d.vt.mT) for d in decompositions])
    return _AtSite(total, spans)


def comparison_table(result: Comparison, limit: int | None = None) -> Table:
    """Return a table for the terminal: one row for each pair, or for each pair and site if `limit` rows allow it."""
    from rich.table import Table

    table = Table(title=f"{len(result.names)} adapters, base {result.base}")
    for column in ("pair", "site", "norms", "cosine", "shared input", "shared output", "smallest angle"):
        table.add_column(column, justify="left" if column in ("pair", "site") else "right")
    total = {n: sum(v**2 for v in sites.values()) ** 0.5 for n, sites in result.norms.items()}
    for pair, cosine in result.overall.items():
        first, _, second = pair.partition("|")
        sites = result.pairs.get(pair, {})
        mean = [
            sum(getattr(p, k) for p in sites.values()) / max(len(sites), 1)
            for k in ("reads", "writes", "smallest_angle")
        ]
        table.add_row(
            f"{first} | {second}",
            f"all {len(sites)} shared",
            f"{total[first]:.3g} | {total[second]:.3g}",
            f"{cosine:+.3f}",
            f"{mean[0]:.3f}",
            f"{mean[1]:.3f}",
            f"{mean[2]:.0f}°",
            style="bold",
        )
        for path, p in list(sites.items())[: len(sites) if limit is None else limit]:
            norms = f"{result.norms[first][path]:.3g} | {result.norms[second][path]:.3g}"
            table.add_row(
                "", path, norms, f"{p.cosine:+.3f}", f"{p.reads:.3f}", f"{p.writes:.3f}", f"{p.smallest_angle:.0f}°"
            )
    return table


def comparison_picture(result: Comparison, path: str | os.PathLike[str]) -> Path:
    """Draw a PNG: the cosine of whole adapters as a matrix, and the cosine of each pair by site name and layer."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, pairs = result.names, list(result.pairs)
    whole = np.eye(len(names))
    for pair, cosine in result.overall.items():
        i, j = (names.index(n) for n in pair.split("|"))
        whole[i, j] = whole[j, i] = cosine
    shown = pairs[:6]
    figure = Figure(figsize=(3.6 + 3.4 * len(shown), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    axes[0].imshow(whole, cmap="RdBu_r", vmin=-1, vmax=1)
    axes[0].set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_title("cosine of whole updates", fontsize=9)
    for (i, j), value in np.ndenumerate(whole):
        axes[0].text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7)
    image = axes[0].images[0]
    for axis, pair in zip(axes[1:], shown, strict=True):
        grid, rows, columns = _grid({p: v.cosine for p, v in result.pairs[pair].items()})
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set_xticks(range(len(columns)), columns, fontsize=7)
        axis.set_xlabel("layer")
        axis.set_title(pair.replace("|", " and "), fontsize=9)
    figure.colorbar(image, ax=list(axes), shrink=0.85)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _grid(values: Mapping[str, float]) -> tuple[Any, list[str], list[str]]:
    """Return values as a grid of site name by layer, empty places as nan; sites that share a place are averaged."""
    import numpy as np

    places: dict[tuple[str, str], list[float]] = {}
    for path, value in values.items():
        layer = layer_of(path)
        name = ".".join([p for p in path.split(".") if not p.isdigit()][-2:])
        places.setdefault((name, "none" if layer is None else str(layer)), []).append(value)
    rows = list(dict.fromkeys(r for r, _ in places))
    columns = sorted({c for _, c in places}, key=lambda c: (c == "none", int(c) if c.isdigit() else 0))
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), found in places.items():
        grid[rows.index(row), columns.index(column)] = sum(found) / len(found)
    return grid, rows, columns
