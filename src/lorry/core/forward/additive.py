"""The general path of a layer to whose output updates are added: each adapter's update apart, and taps on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.forward.active import Active, Term, Terms
from lorry.core.forward.layer import Base, Layer, Now, seed_of
from lorry.core.forward.taps import Reader, Tap, Update
from lorry.core.method.call import Call
from lorry.kernels.segments import take

Updates = list[tuple[Term, Tensor]]


#: No adapter acts.
NOTHING = Terms((), False)


def apart(
    layer: Layer,
    base: Base,
    active: Active | None,
    now: Now,
    readers: Sequence[Reader],
    x: Tensor,
    terms: Terms,
    args: Any,
    kwargs: Any,
) -> Any:
    """Return the layer's output with every update worked out by its method's own code, and shown to `readers`."""
    output = base(*args, **kwargs)
    inputs, outputs = _flat(x, output) if terms.tokens else (x, output)
    updates = [(term, _update(layer, term, inputs, outputs, now, active, terms.tokens)) for term in terms.each]
    result = _add(outputs, updates)
    if terms.tokens:
        result = result.view(*output.shape[:-1], result.shape[-1])
    for reader in readers:
        shown = tuple(Update(t.entry.name, u, t.rows, terms.tokens) for t, u in updates)
        changed = reader(Tap(layer.sites[0], x, output, shown, result))
        result = result if changed is None else _replaced(changed, result, layer)
    return result


def _replaced(changed: object, result: Tensor, layer: Layer) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != result.shape:
        found = f"a tensor {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise AdapterError(
            f"A tap at '{layer.sites[0].path}' must return None, or an output {tuple(result.shape)}; found {found}."
        )
    return changed


def _flat(x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and output with all tokens in one dimension."""
    tokens = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
    return tokens, output.reshape(-1, output.shape[-1])


def _update(
    layer: Layer, term: Term, x: Tensor, output: Tensor, now: Now, active: Active | None, tokens: bool
) -> Tensor:
    """Return the weighted update of the term's rows."""
    call = call_of(layer, term, x, output, now, active, tokens)
    update = call.settle(term.entry.method.apply(call, term.entry.tensors()))
    if isinstance(term.weight, Tensor):
        update = update * term.weight.to(update.device, update.dtype)
    elif term.weight != 1.0:
        update = update * term.weight
    if term.weights is not None:
        update = update * term.weights.to(update.dtype).view(-1, *[1] * (update.ndim - 1))
    return update


def call_of(
    layer: Layer, term: Term, x: Tensor, output: Tensor, now: Now, active: Active | None, tokens: bool = False
) -> Call:
    """Return the call of a layer as the term's method sees it."""
    rows, entry = term.rows, term.entry
    index = torch.arange(len(x), device=x.device)[rows] if isinstance(rows, slice) else rows

    def update_of(name: str) -> Tensor:
        member = layer.adapters.get(name)
        if member is None:
            raise AdapterError(
                f"Adapter '{entry.name}' combines '{name}', which is not loaded on this model. Load it, or take the "
                "combining adapter off."
            )
        if name == entry.name:
            raise AdapterError(f"Adapter '{name}' cannot combine itself.")
        found = member.entries.get(entry.site.path)
        if found is None:
            return torch.zeros_like(take(output, rows))
        return _update(layer, Term(found, 1.0, rows, None, term.seed), x, output, now, active, tokens)

    return Call(
        site=entry.site,
        x=take(x, rows),
        output=take(output, rows) if isinstance(output, Tensor) else output,
        adapter=entry.name,
        rows=index,
        training=entry.site.owner.training,
        seed=lambda: seed_of(term),
        context=now.context,
        batch=len(x),
        tokens=tokens,
        layout=None if active is None else active.layout,
        seen=now.passing,
        update_of=update_of,
    )


def _add(output: Tensor, updates: Sequence[tuple[Term, Tensor]]) -> Tensor:
    """Add updates of all rows and of some rows; those of some rows in one go."""
    for term, update in updates:
        if term.rows is None:
            output = output + update
    partial = [(term, update) for term, update in updates if term.rows is not None]
    if not partial:
        return output
    every = torch.arange(len(output), device=output.device)
    index = torch.cat([every[term.rows] for term, _ in partial])
    return output.index_add(0, index, torch.cat([update for _, update in partial]).to(output.dtype))
