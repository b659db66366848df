"""Paths of modules that use their weights themselves: other weights, or another forward, for each composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.active import Active, Term
from lorry.core.forward.additive import call_of
from lorry.core.forward.exchange import exchanged
from lorry.core.forward.layer import Base, Layer, Now
from lorry.core.forward.orientation import rows_second
from lorry.core.forward.rows_of import batch_dim, blend, first_tensor, join, select, select_attention
from lorry.core.method.families import Block
from lorry.core.sites.site import Site

#: The rows that a module runs now, and how many there are, if these are not all.
Of = tuple[Tensor, int] | None
Run = Callable[[Active, Of, tuple[Any, ...], dict[str, Any]], Any]


def by_rows(layer: Layer, active: Active, now: Now, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module once for each distinct composition of rows, and put the rows together again."""
    if active.layout is None and not active.by_kind:
        return run(active, None, args, kwargs)
    site = layer.sites[0]
    x = first_tensor(args, kwargs)
    layout = active.layout
    swapped = layout is not None and rows_second(x, layout.entries, layer.length_first, now.passing)
    dim = 1 if swapped else batch_dim(site)
    if site.lead:
        _check_tokens(site, x, args, kwargs)
    total = int(x.shape[dim])
    outputs, order = [], []
    for rows, group in active.groups(total, f"'{site.path}'", now.passing):
        if isinstance(layer.owner, nn.MultiheadAttention):
            part_args, part_kwargs = select_attention(layer.owner, args, kwargs, rows, dim, total)
        else:
            part_args, part_kwargs = select((args, kwargs), rows, dim, total)
        outputs.append(run(group, (rows, total), part_args, part_kwargs))
        order.append(rows)
    return join(outputs, torch.argsort(torch.cat(order)), dim)


def _check_tokens(site: Site, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a bank of experts that is not given its tokens in their order, with the experts of each."""
    beside = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not x]
    if x.ndim == 2 and not any(v.ndim > 1 and v.shape[0] == x.shape[0] for v in beside):
        raise AdapterError(
            f"'{site.path}' is given its tokens sorted by expert, or once for each, and not in the order of the rows, "
            "so rows cannot have adapters of their own there. Use one composition for the whole batch, or leave the "
            "site out of the adapters."
        )


def with_weights(layer: Layer, base: Base, active: Active, now: Now, args: Any, kwargs: Any) -> Any:
    """Run a module with ``W + ΔW`` in the place of its weights."""
    pairs, x = [], first_tensor(args, kwargs)
    for site in layer.sites:
        weight: Tensor | None = None
        for term in active.terms(site, x, now.context, now.passing).each:
            entry = term.entry
            if getattr(entry.method, "dropout", 0.0) and layer.owner.training:
                raise AdapterError(
                    f"'{site.path}' holds its weight for a larger module, so the input cannot be dropped out there; "
                    f"set dropout=0 for adapter '{entry.name}', or leave the site out."
                )
            update = site.kind.to_weight(site, entry.delta() * _one_weight(term, site.path))
            weight = (site.stored if weight is None else weight) + update.to(site.stored.dtype)
        if weight is not None:
            pairs.append((site.holder, site.parameter, weight))
    with exchanged(pairs):
        return base(*args, **kwargs)


def as_block(layer: Layer, base: Base, active: Active, of: Of, now: Now, args: Any, kwargs: Any) -> Any:
    """Run a method that takes the place of the whole module."""
    site, x = layer.sites[0], first_tensor(args, kwargs)
    terms = active.terms(site, x, now.context, now.passing).each
    if not terms:
        return base(*args, **kwargs)
    if len(terms) > 1:
        names = ", ".join(t.entry.name for t in terms)
        raise AdapterError(
            f"Adapters {names} each replace the whole block '{site.path}'; only one can be active in a row."
        )
    (term,) = terms
    call = call_of(layer, Term(term.entry, seed=term.seed), x, x, now, active)
    if of is not None:
        call.rows, call.batch = of[0].to(x.device), of[1]
    result = cast(Block, term.entry.method).forward(base, call, term.entry.tensors(), *args, **kwargs)
    if isinstance(result, Tensor):
        result = call.settle(result)
    weight = _one_weight(term, site.path)
    if isinstance(weight, float) and weight == 1.0:
        return result
    return blend(base(*args, **kwargs), result, weight)


def _one_weight(term: Term, path: str) -> float | Tensor:
    """Return the weight of all rows."""
    if term.weights is not None:
        raise AdapterError(
            f"'{path}' uses its weights itself and cannot weigh adapter '{term.entry.name}' by row here; give the "
            "weights by lorry.rows, one composition for each row."
        )
    return term.weight
