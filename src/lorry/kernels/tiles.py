"""How the tokens of a batch lie for kernels that work tile by tile: every tile holds tokens of one segment alone."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorry.kernels.segments import Rows, Segment

#: Tokens of a tile, the better first: a product with the frozen weight pays from these on.
HEIGHTS = (128, 64)
#: How much more than the batch's tokens its tiles may hold at most.
_SLACK = 1.25
#: Batches whose tables are kept at most.
_KEPT = 64


@dataclass(frozen=True)
class TileTable:
    """Which tokens belong to which segment and which tile; worked out once for a batch and used by every layer.

    Attributes
    ----------
    token
        Indices of the flattened tokens, segment after segment, and those without an adapter last; ``(tokens,)``.
    scale
        Factor of the update of each of them, ``(tokens,)`` in float64.
    begin
        Where each segment begins in `token`, and where the last ends.
    positions
        Tokens of a row.
    height
        Tokens of a tile.
    """

    token: Tensor
    scale: Tensor
    begin: tuple[int, ...]
    positions: int
    height: int
    _cuts: MutableMapping[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)

    @property
    def segments(self) -> int:
        """Number of segments; what has no adapter counts as none."""
        return len(self.begin) - 1

    def tiles(self, height: int | None = None, *, bare: bool = False) -> Tensor:
        """Return segment, first and last + 1 sorted token of each tile, ``(tiles, 3)``.

        Parameters
        ----------
        height
            Tokens of a tile, if not the table's; 0 for whole segments.
        bare
            With the tokens that have no adapter, as one more segment at the end.
        """
        height = self.height if height is None else height
        if (height, bare) not in self._cuts:
            ends = [*self.begin[1:], len(self.token)] if bare else self.begin[1:]
            found = [
                (number, at, min(at + (height or end), end))
                for number, end in enumerate(ends)
                for at in range(self.begin[number], end, height or max(end, 1))
            ]
            cut = torch.tensor(found, dtype=torch.int32).view(-1, 3)
            self._cuts[height, bare] = cut.to(self.token.device, non_blocking=True)
        return self._cuts[height, bare]


def fitting_height(lengths: Sequence[int]) -> int | None:
    """Return the greatest height of tiles which segments of these many tokens fill well, or None if none does or if
    a number is below 0.
    """
    if min(lengths) < 0:
        return None
    for height in HEIGHTS:
        if sum(-(-n // height) * height for n in lengths) <= _SLACK * sum(lengths):
            return height
    return None


def tile_table(
    rows: int, positions: int, segments: Sequence[Segment], device: torch.device, height: int | None = None
) -> TileTable | None:
    """Lay out the tokens of a batch of `rows` rows with `positions` tokens each.

    Parameters
    ----------
    rows, positions
        Shape of the batch.
    segments
        What has an adapter. Rows that several segments share are not for tiles.
    device
        Where the table is read.
    height
        Tokens of a tile, a power of two from 16 on; None for what the segments fill well.

    Returns
    -------
    TileTable or None
        None if a row is in several segments, or if tiles would be filled badly.
    """
    counts = _counts(rows, segments)
    lengths = [count * positions for count in counts]
    height = fitting_height(lengths) if height is None else height
    order = None if height is None or counts[-1] < 0 else _order(rows, [s.rows for s in segments], device)
    if height is None or order is None:
        return None
    token = order[:, None] * positions + torch.arange(positions, device=device)
    each = [*(s.factor(torch.float64) for s in segments), 1.0]
    factors = [
        torch.full((n,), f, dtype=torch.float64, device=device) if isinstance(f, float) else f.to(device)
        for n, f in zip(counts, each, strict=True)
    ]
    scale = torch.cat(factors).repeat_interleave(positions)
    begin = tuple(accumulate(lengths[:-1], initial=0))
    return TileTable(token.view(-1).to(torch.int32), scale, begin, positions, height)


def kept_table(
    plans: MutableMapping[Any, Any], rows: int, positions: int, segments: Sequence[Segment], device: torch.device
) -> TileTable | None:
    """Return what `tile_table` does, made once for all layers that share `plans`."""
    if fitting_height([count * positions for count in _counts(rows, segments)]) is None:
        return None
    # weights and indices of rows belong to the composition of the batch, so every layer has the same tensors
    parts = tuple((_place(s.rows), s.scale, None if s.weights is None else id(s.weights)) for s in segments)
    key = ("tiles", rows, positions, device, parts)
    if key not in plans:
        _make_room(plans)
        # the segments are kept too, so that no other tensor takes the place of one of theirs under the same id
        plans[key] = (tile_table(rows, positions, segments, device), tuple(segments))
    found: TileTable | None = plans[key][0]
    return found


def _make_room(plans: MutableMapping[Any, Any]) -> None:
    """Forget the tables of earlier shapes where a composition lasts and batches have ever new lengths."""
    mine = [key for key in plans if isinstance(key, tuple) and key[0] == "tiles"]
    if len(mine) >= _KEPT:
        for key in mine:
            del plans[key]


def _place(rows: Rows) -> object:
    return (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else None if rows is None else id(rows)


def _counts(total: int, segments: Sequence[Segment]) -> list[int]:
    """Return the number of rows of each segment, and at the end of those without one, below 0 if segments overlap."""
    counts = [
        len(range(*s.rows.indices(total))) if isinstance(s.rows, slice) else total if s.rows is None else len(s.rows)
        for s in segments
    ]
    return [*counts, total - sum(counts)]


def _order(total: int, places: Sequence[Rows], device: torch.device) -> Tensor | None:
    """Return all rows, those of each segment after those of the one before and the others last; None if a row is in
    several segments.

    Only indices that lie on the device are read from there.
    """
    every = torch.arange(total)
    taken = [every if rows is None else every[rows] if isinstance(rows, slice) else rows.cpu() for rows in places]
    together = torch.cat(taken) if taken else every[:0]
    uses = torch.bincount(together, minlength=total)
    if (uses > 1).any():
        return None
    return torch.cat([together, (uses == 0).nonzero().view(-1)]).to(device, non_blocking=True)
