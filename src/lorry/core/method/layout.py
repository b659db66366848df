"""How a batch lies: which of the entries that a module sees belong to which row.

A batch is a list of rows, and a module may see each of them several times. At the root the copies are stated: `repeat`
(a a b b: beams, several samples), `tile` (a b a b: guidance), or the `lengths` of a packed ``(1, tokens)`` batch.
Inside the model, entries beyond those of the root are tokens, flattened row after row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.kernels.segments import Rows


@dataclass
class Pass:
    """What the root of a model was given in one forward pass.

    Attributes
    ----------
    batch
        Its leading dimension.
    length
        Positions of this pass; None where the input has none.
    offset
        Positions that lie in a cache already.
    uneven
        Another leading dimension among its inputs (pictures beside rows of text); 0 if there is none.
    called
        Paths of the sites that ran.
    outer
        The pass in which this one runs, where the root calls itself.
    """

    batch: int
    length: int | None = None
    offset: int = 0
    uneven: int = 0
    called: set[str] = field(default_factory=set)
    outer: Pass | None = None


@dataclass(frozen=True)
class BatchLayout:
    """The layout of a batch at the root of a model.

    Attributes
    ----------
    rows
        Number of rows.
    repeat, tile
        How often each row follows itself, and how often the whole batch follows itself; None if nobody said. Both
        together are ``tile`` copies of the repeated batch.
    lengths
        Tokens of each row where all lie in one ``(1, tokens)`` batch; None where rows lie in the first dimension.
    counts
        Start of a module path -> entries of each row in that part of the model, e.g. pictures in a vision tower.
    """

    rows: int
    repeat: int | None = None
    tile: int | None = None
    lengths: tuple[int, ...] | None = None
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers against each other."""
        for name in ("repeat", "tile"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise AdapterError(f"{name} must be a whole number of at least 1, found {value!r}.")
        if self.lengths is not None and (self.repeat or self.tile):
            raise AdapterError("A batch is either packed (lengths) or has copies of its rows (repeat, tile), not both.")
        for what, each in (("lengths", self.lengths), *((f"counts of '{p}'", c) for p, c in self.counts.items())):
            if each is not None and (len(each) != self.rows or any(n < 0 for n in each)):
                raise AdapterError(f"{what} must be {self.rows} numbers of at least 0, one for each row; found {each}.")

    @property
    def stated(self) -> bool:
        """Whether somebody said how the batch lies."""
        return self.repeat is not None or self.tile is not None

    @property
    def entries(self) -> int:
        """Entries of the root's batch (tokens of a packed one)."""
        if self.lengths is not None:
            return sum(self.lengths)
        return self.rows * (self.repeat or 1) * (self.tile or 1)

    def counted(self, path: str) -> tuple[int, ...] | None:
        """Return the entries of each row at a module where they were given, else None."""
        return next((c for p, c in self.counts.items() if path == p or path.startswith(f"{p}.")), None)

    def factor(self, batch: int, what: str, seen: Pass | None) -> int:
        """Return how many entries of a module's batch there are for each entry of the root's.

        Parameters
        ----------
        batch
            Entries that the module sees.
        what
            The module, for errors.
        seen
            What the root was given in this pass, where the pass went through the root.

        Raises
        ------
        AdapterError
            The numbers do not fit, or more than one layout would fit them.
        """
        if batch == self.entries:
            return 1
        if seen is not None and seen.batch != self.entries:
            raise _unstated(self, seen.batch, "the model")
        factor, rest = divmod(batch, self.entries)
        if rest or not factor or (factor > 1 and seen is None and not self.stated):
            raise _unstated(self, batch, what)
        if factor > 1 and seen is not None and seen.uneven and batch != seen.batch * (seen.length or 0):
            raise AdapterError(
                f"lorry.rows was given {self.rows} rows, but {what} sees {batch} entries, and the model was given "
                f"inputs of batches {seen.batch} and {seen.uneven}, which need not be shared evenly. Say how many "
                "entries each row has there: lorry.rows(..., counts={'path.of.the.module': [...]})."
            )
        return factor

    def spread(self, rows: Rows, per: int, device: torch.device) -> Rows:
        """Return which entries belong to `rows`, where each entry of the root is seen `per` times."""
        repeat, tile = (self.repeat or 1) * per, self.tile or 1
        if rows is None:
            return None
        if isinstance(rows, slice) and tile == 1:
            return slice(rows.start * repeat, rows.stop * repeat)
        index = torch.arange(self.rows)[rows] if isinstance(rows, slice) else rows
        index = index.to(device)
        if repeat > 1:
            index = (index[:, None] * repeat + torch.arange(repeat, device=device)).reshape(-1)
        if tile > 1:
            index = (torch.arange(tile, device=device)[:, None] * (self.rows * repeat) + index).reshape(-1)
        return index

    def spread_values(self, values: Tensor, per: int) -> Tensor:
        """Return values of chosen rows ``(rows, ...)`` for the entries that `spread` gives."""
        repeat, tile = (self.repeat or 1) * per, self.tile or 1
        values = values.repeat_interleave(repeat, 0) if repeat > 1 else values
        return values.repeat(tile, *[1] * (values.ndim - 1)) if tile > 1 else values


def ranges(lengths: Sequence[int], rows: Rows, device: torch.device) -> tuple[Rows, Tensor]:
    """Return the places of chosen rows of given lengths that lie one after another, and how many each row has.

    Parameters
    ----------
    lengths
        Of each row.
    rows
        The chosen ones.
    device
        Of the result.
    """
    each = torch.tensor(lengths)
    ends = each.cumsum(0)
    if isinstance(rows, slice):
        start = int(ends[rows.start - 1]) if rows.start else 0
        return slice(start, int(ends[rows.stop - 1])), each[rows].to(device)
    chosen = torch.arange(len(each)) if rows is None else rows.cpu()
    places = [torch.arange(int(ends[i] - each[i]), int(ends[i])) for i in chosen.tolist()]
    return torch.cat(places).to(device), each[chosen].to(device)


def _unstated(layout: BatchLayout, batch: int, what: str) -> AdapterError:
    if layout.lengths is not None:
        return AdapterError(
            f"lorry.rows was given {layout.rows} rows of {layout.entries} tokens in all (lengths), but {what} sees "
            f"{batch}. The lengths must add up to the tokens of the packed batch."
        )
    given = f"lorry.rows was given {layout.rows} rows"
    if layout.stated:
        given += f" with repeat={layout.repeat or 1} and tile={layout.tile or 1}"
    text = f"{given}, but {what} sees a batch of {batch}."
    times, rest = divmod(batch, layout.entries)
    if rest or times < 2:
        return AdapterError(f"{text} Give one composition for each row of the batch.")
    return AdapterError(
        f"{text} Say how its {batch} entries lie: repeat={times} if each row follows itself (a a b b: beams, samples), "
        f"tile={times} if the batch does (a b a b: guidance), or one composition for each entry."
    )
