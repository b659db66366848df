"""Rows that each go with a list of rows of another matrix: products with them, and sums of them.

Two things in serving have this form. A token with an adapter of rank r is multiplied with r rows of A, and sums r rows
of Bᵀ; written rank unit by rank unit, a batch is one list of units for each token, whichever adapters they are of. And
a query is multiplied with the keys of its sequence, and sums its values, which lie on pages all over a pool. The cost
is that of the lists, not of how many adapters, ranks or pages there are; nothing is padded, and what is listed is read
where it lies. A row's result does not depend on the other rows.

On the CPU the products are entries of a sampled matrix product, and the sums those of an embedding bag; on a GPU both
are kernels of `lorry.kernels.triton_lists`.
"""

from __future__ import annotations

import warnings
from functools import cache, cached_property

import torch
from torch import Tensor

from lorry.kernels.grouped import has_kernels


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether listed rows are read where they lie; elsewhere `RowLists` copies them first."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


def runs(first: Tensor, count: Tensor, step: int = 1) -> Tensor:
    """Return ``first, first + step, ...``, so many as `count` says, run after run.

    Parameters
    ----------
    first, count
        Of each run ``(runs,)`` int64.
    step
        From one to the next.
    """
    ends = count.cumsum(0)
    every = torch.arange(int(ends[-1]) if len(ends) else 0, device=first.device)
    starts = first - (ends - count) * step
    return starts.repeat_interleave(count, output_size=len(every)).add_(every, alpha=step)


class RowLists:
    """For each row its list of rows of another matrix.

    Parameters
    ----------
    counts
        Length of each list ``(rows,)`` int64, 0 or more.
    listed
        All lists, one after another ``(listed,)`` int64; at least one.
    dtype
        Of the matrices.
    """

    def __init__(self, counts: Tensor, listed: Tensor, dtype: torch.dtype) -> None:
        self.counts, self.listed = counts, listed
        self._starts = torch.zeros(len(counts) + 1, dtype=torch.long, device=counts.device)
        torch.cumsum(counts, 0, out=self._starts[1:])
        self._pattern: Tensor | None = None
        if serves(dtype, listed.device):
            _quiet()
            shape = (len(counts), int(listed.max()) + 1)
            values = torch.zeros(len(listed), dtype=dtype)
            self._pattern = torch.sparse_csr_tensor(self._starts, listed, values, shape, check_invariants=False)

    def dots(self, x: Tensor, of: Tensor) -> Tensor:
        """Return the product of each row of ``x (rows, width)`` with each of those on its list in `of`, ``(listed,)``;
        both are contiguous.
        """
        if has_kernels(x):
            from lorry.kernels.triton_lists import listed_dots

            return listed_dots(x, of, self._row, self.listed)
        if self._pattern is not None:
            there = of[: self._pattern.shape[1]].t()
            return torch.sparse.sampled_addmm(self._pattern, x, there, beta=0.0).values()
        rows = x.index_select(0, self._row)
        return torch.bmm(rows.unsqueeze(1), of.index_select(0, self.listed).unsqueeze(2)).view(-1)

    def sums(self, weights: Tensor, of: Tensor) -> Tensor:
        """Return for each row the sum of those on its list in ``of (any, width)``, contiguous, times `weights
        (listed,)`; 0 for an empty list.
        """
        if has_kernels(of):
            from lorry.kernels.triton_lists import listed_sums

            return listed_sums(weights, of, self._starts, self.listed)
        return torch.embedding_bag(of, self.listed, self._starts, False, 0, False, weights, True)[0]

    def softmax(self, logits: Tensor, further: Tensor | None = None) -> Tensor:
        """Return the softmax over each row's list of ``logits (listed,)``; `further (rows,)` takes part in it, too."""
        width, places = self._places
        padded = logits.new_full((len(self.counts), width), float("-inf"))
        padded.view(-1).index_copy_(0, places, logits)
        if further is not None:
            padded = torch.cat([padded, further.unsqueeze(1)], 1)
        return padded.softmax(-1)[:, :width].reshape(-1).index_select(0, places)

    @cached_property
    def _row(self) -> Tensor:
        """The row on whose list each element is."""
        every = torch.arange(len(self.counts), device=self.counts.device)
        return every.repeat_interleave(self.counts, output_size=len(self.listed))

    @cached_property
    def _places(self) -> tuple[int, Tensor]:
        """Length of the longest list, and where each element lies if all are filled up to that length."""
        width = int(self.counts.max())
        return width, runs(torch.arange(len(self.counts), device=self.counts.device) * width, self.counts)


@cache
def _quiet() -> None:
    """Let torch tell once, to nobody, that its sparse matrices are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1), check_invariants=False)
