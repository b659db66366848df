"""A checksum of a weight that notices any changed element, at the speed of a few reads, on the weight's own device.

The weight is taken as whole numbers of 64 bits, written row under row in a table of `WIDTH` columns. Each row and each
column is summed modulo 2^64. A changed number changes the sum of its row and that of its column, for sure. Changes
escape only where they cancel in every row and in every column at once: not up to three numbers, nor where two elements
or two rows of a weight are exchanged (the width is a prime, with which no layout of a weight is in step), and otherwise
by a chance of 2^-64 and less. The sums are hashed with SHA-256, so that the result is short. It is no defence against
somebody who means to deceive.

A weight is hashed as it is and as narrower types would hold it, so that copies of one model in different dtypes can be
compared: a float64 weight in float32 and bfloat16 too, a float32 or float16 weight in bfloat16 too. Each is rounded
from the next wider one, as a cast of the model would do it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

#: Numbers of 64 bits in a row of the table; a prime.
WIDTH = 65521
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no change of a number is lost in the product
#: Elements that are looked at together: eight rows of the table in bfloat16.
_CHUNK = 8 * 4 * WIDTH
#: By a weight's own type: through which types it is rounded to bfloat16, one after another.
_STEPS = {
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16, torch.float32, torch.bfloat16),
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16),
}


def checksums(weight: Tensor) -> dict[torch.dtype, str]:
    """Return the checksums of a dense floating-point weight, in one pass over it.

    Parameters
    ----------
    weight
        Of any shape, in bfloat16, float16, float32 or float64. The order of the elements counts, not how they lie in
        memory.

    Returns
    -------
    dict
        Of the values in bfloat16, in the types between, and in the weight's own: 16 hexadecimal digits by type. Working
        memory is a few MB whatever the weight.
    """
    steps = _STEPS[weight.dtype]
    # every float16 value is a float32 value, so that type would say the same again
    hashed = [kind for kind in steps if (weight.dtype, kind) != (torch.float16, torch.float32)]
    # what is equal in bfloat16 and not beyond differs in the last bits: there, columns tell as much at half the price
    tables = {kind: _Table(weight.device, both=kind == torch.bfloat16) for kind in hashed}
    size = min(weight.numel(), _CHUNK)
    buffers = {kind: torch.empty(size, dtype=kind, device=weight.device) for kind in steps[1:]}
    for values in _chunks(weight.detach()):
        for kind in steps:
            values = values if values.dtype == kind else buffers[kind][: len(values)].copy_(values)
            if kind in tables:
                tables[kind].add(values)
    return {kind: table.digest() for kind, table in tables.items()}


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
    """The sums of columns, and of rows if `both`."""

    def __init__(self, device: torch.device, both: bool = True) -> None:
        self._both = both
        self._columns = torch.zeros(0, dtype=torch.int64, device=device)
        self._rows: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Append a chunk of values. All but the last one fill whole rows."""
        words = _words(values)
        whole = len(words) // WIDTH * WIDTH
        for table in (words[:whole].view(-1, WIDTH), words[whole:].view(1, -1)):
            if not table.numel():
                continue
            width = table.shape[1]
            if width > len(self._columns):
                self._columns = torch.cat([self._columns, table.new_zeros(width - len(self._columns))])
            columns = self._columns[:width]
            # weighted by chunk, so that the order of the chunks counts here, too
            torch.add(table.sum(0), columns, alpha=_FACTOR, out=columns)
            if self._both:
                self._rows.append(table.sum(1))

    def digest(self) -> str:
        """Return the hash of all sums."""
        found = hashlib.sha256(self._columns.cpu().numpy().tobytes())
        if self._rows:
            found.update(torch.cat(self._rows).cpu().numpy().tobytes())
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
