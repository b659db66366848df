"""The pairs of factors that a dynamic acts on, and the layers where it acts within a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.method.families import Bottleneck

#: First row, last row (exclusive) and number of rows of a batch.
Rows = tuple[int, int, int]


@dataclass(frozen=True)
class Pair:
    """The factors of a plain low-rank update ``scale · B A`` at a linear layer, as they are now.

    Attributes
    ----------
    path
        Of the site.
    entry
        The adapter there.
    a, b, scale
        A ``(rank, in)``, B ``(out, rank)`` and the factor of their product.
    """

    path: str
    entry: Entry
    a: Tensor
    b: Tensor
    scale: float

    def row_norms(self) -> Tensor:
        """Return the norm of each row of ``scale · B A`` as ``(out,)`` in float32 or better, by ``b (A Aᵀ) bᵀ``."""
        exact = torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.a.detach().to(exact), self.b.detach().to(exact)
        return ((b @ (a @ a.mT)) * b).sum(-1).clamp_min(0).sqrt() * abs(self.scale)


def pairs_of(adapter: Adapter, who: str, *, own: bool = False, dropout: bool = True) -> list[Pair]:
    """Return the pairs of factors of an adapter, one for each site.

    Parameters
    ----------
    adapter
        The adapter.
    who
        The dynamic, for errors.
    own
        Whether the factors must be the trained tensors A and B themselves.
    dropout
        Whether the method may drop inputs.

    Raises
    ------
    SiteError
        A site where the update is not plain low rank on a linear layer.
    """
    found = []
    for path, entry in adapter.entries.items():
        method, problem = entry.method, None
        dropped = getattr(method, "dropout", 0.0)
        if "plain" not in method.capabilities:
            problem = f"the method {method.info.slug}, which is not plain low rank"
        elif not entry.site.kind.plain_product or entry.site.lead:
            problem = f"a {entry.site.kind.name} site"
        elif dropped and not dropout:
            problem = f"dropout={dropped}, whose masks are not seen there (set it to 0)"
        else:
            assert isinstance(method, Bottleneck)
            tensors = entry.tensors()
            a, b = method.factors(tensors, entry.site)
            if own and not (a is tensors.get("A") and b is tensors.get("B")):
                problem = f"the method {method.info.slug}, whose factors are not tensors A and B of the site alone"
        if problem:
            raise SiteError(f"The dynamic '{who}' cannot act at '{path}': it has {problem}.")
        found.append(Pair(path, entry, a, b, method.scale(entry.site)))  # type: ignore[attr-defined]
    return found


def own_rows(values: Tensor, rows: Rows) -> Tensor:
    """Return the view of some rows of a layer's batch, as ``(rows, tokens, width)``.

    Raises
    ------
    SiteError
        The layer's batch does not consist of that many rows.
    """
    start, stop, total = rows
    factor, rest = divmod(len(values), total)
    if rest or not factor:
        raise SiteError(
            f"A layer saw a batch of {len(values)} in a pass of {total} rows: its rows cannot be told apart."
        )
    return values.reshape(total, -1, values.shape[-1])[start:stop]


@contextmanager
def changed_outputs(adapter: Adapter, change: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let the output of each layer that the adapter sits on be ``change(path, input, output)``."""
    handles = []
    for path, entry in adapter.entries.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> Tensor:
            return change(path, args[0] if args else next(iter(kwargs.values())), output)

        handles.append(entry.site.owner.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
