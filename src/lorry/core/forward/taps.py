"""Taps: what passes a site, apart: its input, the base's output, each adapter's update, and the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.sites.site import Site
from lorry.kernels.segments import Rows


@dataclass(frozen=True)
class Update:
    """One adapter's update of a site's output.

    Attributes
    ----------
    adapter
        Name of the adapter.
    value
        The update with its weight, of the rows (or tokens) that use the adapter.
    rows
        Which they are; None for all.
    tokens
        Whether `rows` count tokens of the flattened batch, and not entries of the first dimension.
    """

    adapter: str
    value: Tensor
    rows: Rows
    tokens: bool


@dataclass(frozen=True)
class Tap:
    """One call of a site, as a reader sees it; gradients flow through all of it.

    Attributes
    ----------
    site
        Where.
    x
        The layer's input.
    base
        The frozen layer's output.
    updates
        What each adapter that is active adds.
    output
        The sum.
    """

    site: Site
    x: Tensor
    base: Tensor
    updates: tuple[Update, ...]
    output: Tensor

    def update(self, adapter: str) -> Tensor:
        """Return what an adapter adds, in the shape of the output; zero in rows that do not use it.

        Raises
        ------
        AdapterError
            The adapter is not active here.
        """
        found = [u for u in self.updates if u.adapter == adapter]
        if not found:
            names = ", ".join(sorted({u.adapter for u in self.updates})) or "none"
            raise AdapterError(f"Adapter '{adapter}' is not active at '{self.site.path}'; active there: {names}.")
        total = torch.zeros_like(self.base)
        for update in found:
            flat = total.reshape(-1, total.shape[-1]) if update.tokens else total
            every = torch.arange(len(flat), device=flat.device)
            index = every if update.rows is None else every[update.rows]
            total = flat.index_add(0, index, update.value.to(flat.dtype)).view_as(self.base)
        return total


#: Sees a call; what it returns takes the place of the output, unless it is None.
Reader = Callable[[Tap], Tensor | None]
