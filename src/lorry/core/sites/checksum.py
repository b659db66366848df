"""A checksum of a weight that notices any changed element, at the speed of a few reads, on the weight's own device.

The weight is taken as whole numbers of 64 bits, written row under row in a table of `WIDTH` columns (modulo 2^64):

- each column is summed with another odd factor for each row, ``Σ_r f^(R - r) w_rc``;
- each row is summed as it is.

A changed number changes the sum of its row and that of its column, for sure. Changes escape only where they cancel in
every row and in every column at once: not up to three numbers, nor where two elements or two rows of a weight are
exchanged (the width is a prime, with which no layout of a weight is in step), and otherwise by a chance of 2^-64 and
less. The sums are hashed with SHA-256, so that the result is short. It is no defence against somebody who means to
deceive.

A weight is hashed at several precisions, so that copies of one model in different dtypes can be compared:

- `rounded`: all values, rounded to bfloat16;
- `single`: all values in float32, where that says more than `rounded`;
- `double`: all values in float64, where that says more than `single`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers of 64 bits in a row of the table; a prime.
WIDTH = 65521
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no change of a number is lost in the product
#: Elements that are looked at together: four rows of the table in bfloat16.
_CHUNK = 4 * WIDTH


@dataclass(frozen=True)
class Checksums:
    """What tells the values of one weight from those of another.

    Attributes
    ----------
    rounded
        Of the values in bfloat16, 16 hexadecimal digits.
    single, double
        Of the values in float32 and float64; empty where they are those of the narrower type.
    """

    rounded: str
    single: str = ""
    double: str = ""


def checksums(weight: Tensor) -> Checksums:
    """Return the checksums of a dense floating-point weight, in one pass over it.

    The order of the elements counts, not how they lie in memory. Needs a few MB of working memory.
    """
    levels = [torch.bfloat16]
    if weight.dtype != torch.bfloat16:
        levels.append(torch.float32)  # float16 values are float32 values
    if weight.dtype == torch.float64:
        levels.append(torch.float64)
    sums = [_Table(weight.device) for _ in levels]
    needed = [True] + [False] * (len(levels) - 1)
    buffers = {kind: torch.empty(_CHUNK, dtype=kind, device=weight.device) for kind in levels}
    for chunk in _chunks(weight.detach()):
        # each level from the one above it, so that a copy in float32 of a float64 model rounds as the model does
        values = {}
        wider = chunk
        for kind in reversed(levels):
            wider = wider if wider.dtype == kind else buffers[kind][: len(chunk)].copy_(wider)
            values[kind] = wider
        for at, kind in enumerate(levels):
            # from the first chunk on in which a type says more than the narrower one, it counts
            if at and not needed[at]:
                narrower = values[levels[at - 1]]
                needed[at] = not torch.equal(narrower.to(kind), values[kind])
            if needed[at]:
                sums[at].add(values[kind])
    found = [table.digest() if need else "" for table, need in zip(sums, needed, strict=True)]
    return Checksums(*found)


def checksum_of(tensors: Iterable[Tensor]) -> str:
    """Return a checksum over the bytes of several tensors, in their order, 16 hexadecimal digits."""
    digests = []
    for tensor in tensors:
        table = _Table(tensor.device)
        for chunk in _chunks(tensor.detach()):
            table.add(chunk)
        digests.append(f"{tensor.dtype} {tuple(tensor.shape)} {table.digest()}")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


class _Table:
    """The sums of rows and columns."""

    def __init__(self, device: torch.device) -> None:
        self._columns = torch.zeros(0, dtype=torch.int64, device=device)
        self._rows: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Append a chunk of values. All but the last one fill whole rows."""
        words = _words(values)
        for row in words.split(WIDTH):
            if len(row) > len(self._columns):  # the first row
                self._columns = torch.cat([self._columns, row.new_zeros(len(row) - len(self._columns))])
            columns = self._columns[: len(row)]
            torch.add(row, columns, alpha=_FACTOR, out=columns)
            self._rows.append(row.sum())

    def digest(self) -> str:
        """Return the hash of all sums."""
        found = hashlib.sha256(self._columns.cpu().numpy().tobytes())
        if self._rows:
            found.update(torch.stack(self._rows).cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor in their order, in flat pieces of `_CHUNK`; the last one may be shorter."""
    if tensor.is_contiguous() or tensor.ndim < 2:
        yield from tensor.reshape(-1).split(_CHUNK)
        return
    # a transposed weight is brought into order a few rows at a time, where the rows can fill whole pieces
    size = math.prod(tensor.shape[1:])
    for rows in tensor.split(_CHUNK // math.gcd(_CHUNK, size)):
        yield from rows.reshape(-1).split(_CHUNK)


def _words(values: Tensor) -> Tensor:
    """Return flat values as numbers of 64 bits, filled up with zeros; the shape of a weight is hashed elsewhere."""
    size = values.element_size()
    odd = values.nbytes % 8
    if odd:
        values = torch.cat([values, values.new_zeros((8 - odd) // size)])
    elif values.storage_offset() * size % 8:
        values = values.clone()
    return values.view(torch.int64)
