"""Adapters whose first r rank units are an adapter for every r: cutting, and measuring over ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorry.core.errors import AdapterError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.method.families import Bottleneck


class Nested(Bottleneck):
    """A bottleneck whose factors may be cut to their first units.

    Attributes
    ----------
    at
        An option: the rank that is used; None is the function that is trained.
    cut_scale
        An option: what scales a cut.
    """

    at: int | None
    cut_scale: str

    @property
    @abstractmethod
    def trained_ranks(self) -> tuple[int, ...]:
        """The ranks that training serves, ascending."""


def _method(adapter: Adapter) -> Nested:
    if not isinstance(adapter.method, Nested):
        raise AdapterError(
            f"Adapter '{adapter.name}' ({adapter.method.info.slug}) has no nested ranks, so it cannot be cut; train "
            "one of the methods 'matryoshka-lora' or 'dylora'."
        )
    return adapter.method


def cut(adapter: Adapter, rank: int | None, cut_scale: str | None = None) -> Adapter:
    """Let the adapter use its first `rank` units from now on (all as trained for None), scaled by `cut_scale`
    if given.

    Raises
    ------
    AdapterError
        The adapter's ranks are not nested.
    OptionError
        The rank exceeds the stored one.
    """
    _method(adapter)
    return adapter.configure(at=rank, **({} if cut_scale is None else {"cut_scale": cut_scale}))


@contextmanager
def at_rank(adapter: Adapter, rank: int | None, cut_scale: str | None = None) -> Iterator[None]:
    """Use the first `rank` units while the context lasts."""
    before = _method(adapter)
    cut(adapter, rank, cut_scale)
    try:
        yield
    finally:
        cut(adapter, before.at, before.cut_scale)


def mean_loss(adapter: Adapter, loss: Callable[[], Tensor]) -> Tensor:
    """Return the mean of a loss over the trained ranks: nested training proper, at a pass for each rank."""
    values = []
    for rank in _method(adapter).trained_ranks:
        with at_rank(adapter, rank):
            values.append(loss())
    return torch.stack(values).mean()


def aurac(ranks: Sequence[int], accuracies: Sequence[float], axis: str = "log2") -> float:
    """Return the area under accuracy over rank (trapezoids) by the length of the axis, "log2" or "linear"."""
    if len(ranks) != len(accuracies) or not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 1:
        raise OptionError(
            f"`aurac` needs ascending ranks from 1 with one accuracy each, found {list(ranks)} and {len(accuracies)}."
        )
    x = [math.log2(r) if axis == "log2" else float(r) for r in ranks]
    pairs = zip(x, x[1:], accuracies, accuracies[1:], strict=False)
    area = sum((right - left) * (a + b) / 2 for left, right, a, b in pairs)
    return area / (x[-1] - x[0]) if len(x) > 1 else float(accuracies[0])
