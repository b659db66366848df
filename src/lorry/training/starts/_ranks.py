"""What starts share that hand out ranks by the importance of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lorry.core.forward.entry import Entry
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.methods.parts.allocation import gradient_of, ranks_by_importance


def allocated(
    entries: Mapping[str, Entry],
    seen: Mapping[str, Observed],
    least: int,
    most: int,
    keep_scale: bool,
    directions: int = 1,
) -> dict[str, Method | None]:
    """Return the layers whose rank changes: each has values in proportion to the mean of ``|W ⊙ G|``, all together as
    many as before (GoRA, section 3.2).

    Parameters
    ----------
    entries
        Site path -> the site; those whose method has no options `rank` and `alpha` stay as they are, and ranks move
        between sites with the same options.
    seen
        Site path -> its gradient.
    least, most
        Bounds of each rank.
    keep_scale
        Change alpha with the rank, so that the scale stays what it was.
    directions
        How many directions of a layer each rank needs; no rank needs more than there are.
    """
    groups: dict[Method, list[str]] = {}
    for path, entry in entries.items():
        groups.setdefault(entry.method, []).append(path)
    changes: dict[str, Method | None] = {}
    for method, paths in groups.items():
        names = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
        if not {"rank", "alpha"} <= names:
            continue
        rank, alpha = getattr(method, "rank"), getattr(method, "alpha")  # noqa: B009
        importance, shapes = {}, {}
        for path in paths:
            weight = entries[path].site.matrix().float().cpu()
            importance[path] = float((weight * gradient_of(seen[path], path)).abs().mean())
            shapes[path] = tuple(weight.shape)
        for path, found in ranks_by_importance(importance, shapes, rank, least, most).items():
            found = max(1, min(found, min(shapes[path][-2:]) // directions))
            if found != rank:
                changes[path] = method.with_options(rank=found, alpha=_alpha(method, alpha, rank, found, keep_scale))
    return changes


def _alpha(method: Method, alpha: float | None, rank: int, found: int, keep_scale: bool) -> float | None:
    stabilized = getattr(method, "rank_stabilized", False)
    if not keep_scale or (alpha is None and not stabilized):
        return alpha
    return float((rank if alpha is None else alpha) * (found / rank) ** (0.5 if stabilized else 1.0))
