"""Which tokens of a batch belong to which sequence, and on which pages its keys and values lie: what kernels over pages
read, worked out once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The tokens of a batch that belong to one sequence.

    Attributes
    ----------
    row
        The first of them among the tokens of the batch.
    count
        How many there are, one after another.
    start
        Position of the first one.
    pages
        The sequence's pages, enough for all positions up to the last.
    """

    row: int
    count: int
    start: int
    pages: Sequence[int]


class PageTable:
    """The spans of a batch in the memory of a device.

    Parameters
    ----------
    spans
        Of all sequences; no token is in two of them.
    page_tokens
        Tokens of a page.
    device
        Of the kernels.

    Attributes
    ----------
    pages
        Those of all sequences, one after another, int32.
    spans
        For each sequence its first row, its tokens, the position of the first, and where its pages begin, int32.
    """

    def __init__(self, spans: Sequence[Span], page_tokens: int, device: torch.device) -> None:
        self.page_tokens = page_tokens
        pages: list[int] = []
        rows = []
        for span in spans:
            rows.append((span.row, span.count, span.start, len(pages)))
            pages += span.pages[: -(-(span.start + span.count) // page_tokens)]
        self._counts = [span.count for span in spans]
        self._device = device
        self.pages = torch.tensor(pages, dtype=torch.int32).to(device, non_blocking=True)
        self.spans = torch.tensor(rows, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def blocks(self, group: int, size: int) -> Tensor:
        """Return the blocks of `size` queries of one head of keys, of which each token has `group`: the sequence of
        each, and its first query there ``(blocks, 2)`` int32.
        """
        found = self._blocks.get((group, size))
        if found is None:
            each = [(n, first) for n, count in enumerate(self._counts) for first in range(0, count * group, size)]
            blocks = torch.tensor(each, dtype=torch.int32).view(-1, 2).to(self._device, non_blocking=True)
            found = self._blocks[group, size] = blocks
        return found
