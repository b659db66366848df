"""The gradient of each row of a pass, for linear sites of low-rank methods, from one backward pass of them all.

At a linear layer ``y = W x + s B A x`` the gradient of row n is ``dB_n = s dy_nᵀ (x_n Aᵀ)`` and
``dA_n = s (dy_n B)ᵀ x_n``, summed over the row's tokens; both need only the layer's input and the gradient of its
output, which hooks on the layers see. What a method makes its factors of gets its gradient through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.method.families import Bottleneck


class RowGradients:
    """Collects the gradient of each row of one adapter in a pass.

    Auxiliary losses, which belong to no row, are left out.

    Attributes
    ----------
    found
        Parameter -> ``(rows, *shape)``; filled in by the backward pass.

    Raises
    ------
    SiteError
        A site where there is no formula: another kind than linear, a method that is not plain low rank, tensors that
        sites share, or dropout.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.found: dict[str, Tensor] = {}
        for path, entry in adapter.entries.items():
            method = entry.method
            problem, dropout = None, getattr(method, "dropout", 0.0)
            if "plain" not in method.capabilities or entry.shared is not None:
                problem = f"the method {method.info.slug}, which is not plain low rank with tensors of its own"
            elif not entry.site.kind.plain_product:
                problem = f"a {entry.site.kind.name} site"
            elif dropout:
                problem = f"dropout={dropout}, whose masks are not seen there (set it to 0)"
            if problem:
                raise SiteError(f"The gradients of single rows cannot be had at '{path}': it has {problem}.")

    @contextmanager
    def watching(self, start: int, stop: int, total: int) -> Iterator[None]:
        """Watch a pass and its backward pass; the adapter's rows are `start` to `stop` of `total`."""
        self.found.clear()
        rows = (start, stop, total)
        handles = []
        for path, entry in self.adapter.entries.items():

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> None:
                if output.requires_grad:
                    x = (args[0] if args else next(iter(kwargs.values()))).detach()
                    output.register_hook(lambda dy: self._add(path, x, dy, rows))

            # ahead of other hooks, which may put another tensor in the output's place
            handles.append(entry.site.owner.register_forward_hook(hook, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, path: str, x: Tensor, dy: Tensor, rows: tuple[int, int, int]) -> None:
        entry = self.adapter.entries[path]
        method = entry.method
        assert isinstance(method, Bottleneck)
        tensors = entry.tensors()
        a, b = method.factors(tensors, entry.site)
        x, dy = (_of_rows(t, rows).to(a.dtype) for t in (x, dy))
        scale = method.scale(entry.site)
        db = torch.einsum("nto,ntr->nor", dy, x @ a.mT) * scale
        da = torch.einsum("ntr,nti->nri", dy @ b, x) * scale
        for name, gradient in _through_factors(entry, method, da, db).items():
            key = f"{path}.{name}"
            # a layer that is called twice gives the sum of both calls
            self.found[key] = self.found[key] + gradient if key in self.found else gradient


def _of_rows(values: Tensor, rows: tuple[int, int, int]) -> Tensor:
    """Return the part of some rows of a layer's batch as ``(rows, tokens, width)``."""
    start, stop, total = rows
    factor, rest = divmod(len(values), total)
    if rest or not factor:
        raise SiteError(
            f"A layer saw a batch of {len(values)} in a pass of {total} rows: its rows cannot be told apart."
        )
    each = values.reshape(total, -1, values.shape[-1])
    return each[start:stop]


def _through_factors(entry: Entry, method: Bottleneck, da: Tensor, db: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the trained tensors that a method makes its factors of."""
    tensors = entry.tensors()
    trained = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
    a, b = method.factors(tensors, entry.site)
    if a is tensors.get("A") and b is tensors.get("B"):
        return {name: gradient for name, gradient in (("A", da), ("B", db)) if name in trained}
    fixed = {n: t.detach() for n, t in tensors.items()}
    values = {n: t.detach() for n, t in trained.items()}

    def factors(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return method.factors({**fixed, **own}, entry.site)

    back = torch.func.vjp(factors, values)[1]
    found: dict[str, Tensor] = torch.func.vmap(lambda p, q: back((p, q))[0])(da, db)
    return found
