"""Merging an adapter into the base weights and taking it out again, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry
from lorry.core.memory import LargePages
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.core.sites.storage import Storage, storage_of

if TYPE_CHECKING:
    from lorry.core.life.adapter import Adapter

Originals = list[tuple[nn.Module, str, nn.Parameter]]


def merge_into_base(adapter: Adapter, *, check: bool = True) -> tuple[Originals, Receipt]:
    """Exchange the weight of every site for ``W + ΔW``, computed in float32 or better and rounded once.

    The original parameters are kept, and put back by `unmerge_from_base`; a weight that is tied to another one is
    untied by the exchange, so the other keeps its values.

    Parameters
    ----------
    adapter
        An adapter whose method merges.
    check
        Refuse updates that are not finite, and measure the rounding error for the receipt.

    Raises
    ------
    AdapterError
        The method never merges, the adapter is merged already, or an update is not finite. Nothing is changed then.
    """
    if adapter.merged:
        raise AdapterError(f"Adapter '{adapter.name}' is merged already.")
    never = sorted({type(e.method).__name__ for e in adapter.entries.values() if e.method.merging == "never"})
    if never:
        raise AdapterError(
            f"Adapter '{adapter.name}' cannot be merged: {', '.join(never)} depends on the input of the layer or "
            "replaces its "
            "forward, so there is no weight that does the same. Serve it unmerged."
        )
    fresh: list[tuple[Entry, nn.Parameter]] = []
    notes: list[str] = []
    worst = error = size = 0.0
    memory = LargePages()
    with torch.no_grad():
        for entry in adapter.entries.values():
            storage = storage_of(entry.site)
            merged, deviation = _merged(entry, storage, check, memory)
            fresh.append((entry, merged))
            if deviation is not None:
                worst, error, size = max(worst, deviation[0]), error + deviation[1], size + deviation[2]
            notes += _notes(entry, storage)
    adapter.state.hashes.hold(adapter.sites)
    originals: Originals = []
    for entry, merged in fresh:
        holder, name = entry.site.holder, entry.site.parameter
        originals.append((holder, name, holder._parameters[name]))  # type: ignore[arg-type]
        holder._parameters[name] = merged
    adapter.state.merged.append(adapter.name)
    count = sum(len(home.specs) for _, home in adapter.homes())
    relative = (error / size) ** 0.5 if size else 0.0
    return originals, Receipt(
        "merge", adapter.name, count, count, len(fresh), "match", worst, relative, tuple(dict.fromkeys(notes))
    )


def unmerge_from_base(adapter: Adapter, originals: Originals) -> Receipt:
    """Put the original parameters back.

    Raises
    ------
    AdapterError
        The adapter is not merged, or another adapter was merged into the same weights later.
    """
    if not originals:
        raise AdapterError(f"Adapter '{adapter.name}' is not merged.")
    mine = {(id(holder), name) for holder, name, _ in originals}
    order = list(adapter.state.merged)
    for other in order[order.index(adapter.name) + 1 :]:
        if any((id(h), n) in mine for h, n, _ in adapter.state.adapters[other]._originals):
            raise AdapterError(f"Adapter '{other}' was merged after '{adapter.name}'; unmerge it first.")
    adapter.state.merged.remove(adapter.name)
    adapter.state.hashes.release(adapter.sites)
    for holder, name, parameter in originals:
        holder._parameters[name] = parameter
    return Receipt("unmerge", adapter.name, 0, 0, len(originals), "match")


def _merged(
    entry: Entry, storage: Storage, check: bool, memory: LargePages
) -> tuple[nn.Parameter, tuple[float, float, float] | None]:
    """Return the merged parameter, and largest error, squared error and squared update of rounding it."""
    site = entry.site
    base = storage.read(site)
    exact = torch.promote_types(base.dtype, torch.float32)
    factors = _factors(entry, exact)
    total = _sum(entry, base, exact, factors, memory)
    # thin factors bound their product: only where the bound is no comfort is every weight looked at
    if check and not (factors and _bounded(*factors)) and not torch.isfinite(total).all():
        raise AdapterError(
            f"The update of adapter '{entry.adapter.name}' at '{site.path}' is not finite; nothing was merged."
        )
    parameter = storage.encode(site, total)
    if not check or (storage.lossless and parameter.dtype == exact):
        return parameter, None
    stored = parameter.detach() if storage.lossless else _decoded(entry, storage, parameter)
    difference = stored.to(exact) - total
    update = total - base.to(exact)
    worst = float(difference.abs().max())
    if not worst < torch.inf:
        raise AdapterError(
            f"'{site.path}' with adapter '{entry.adapter.name}' leaves the range of {parameter.dtype}; nothing was "
            "merged. Load the base in bfloat16 or float32, or serve the adapter unmerged."
        )
    return parameter, (worst, float(difference.square().sum()), float(update.square().sum()))


def _factors(entry: Entry, exact: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """Return A (rank, in), B (out, rank) and the scale where the update is nothing but their product."""
    site, method = entry.site, entry.method
    if not isinstance(method, Bottleneck) or not method.plain or site.lead:
        return None
    a, b = (f.detach().to(exact) for f in method.factors(entry.tensors(), site))
    return a, b, method.scale(site)


def _bounded(a: Tensor, b: Tensor, scale: float) -> bool:
    """Tell whether the largest entries of the factors rule an overflow of ``scale · B A`` out."""
    largest = a.abs().max() * b.abs().max() * (a.shape[0] * abs(scale))
    return bool(largest < torch.finfo(a.dtype).max / 2)  # false for NaN


def _sum(
    entry: Entry,
    base: Tensor,
    exact: torch.dtype,
    factors: tuple[Tensor, Tensor, float] | None,
    memory: LargePages,
) -> Tensor:
    """Return ``W + ΔW`` in its native layout; one addmm where the update is a product of two thin factors."""
    kind, site = entry.site.kind, entry.site
    if factors is None:
        return base.to(exact) + kind.to_weight(site, entry.delta().to(exact))
    a, b, scale = factors
    matrix = kind.to_matrix(site, base)
    stays = matrix.dtype == exact and matrix.is_contiguous()  # else the sum is only on its way to another form
    out = memory.empty(matrix.shape, matrix) if stays else None
    return kind.to_weight(site, torch.addmm(matrix.to(exact), b, a, alpha=scale, out=out)).contiguous()


def _decoded(entry: Entry, storage: Storage, parameter: nn.Parameter) -> Tensor:
    """Return what a lossy storage gives back for `parameter`."""
    holder, name = entry.site.holder, entry.site.parameter
    original = holder._parameters[name]
    holder._parameters[name] = parameter
    try:
        return storage.read(entry.site)
    finally:
        holder._parameters[name] = original


def _notes(entry: Entry, storage: Storage) -> list[str]:
    notes = []
    if not storage.lossless:
        notes.append(f"the base is stored as {storage.name}: the sum was quantised again, its error is reported above")
    if entry.site.tied:
        notes.append(
            f"'{entry.site.path}' shared its weight with {', '.join(entry.site.tied)}, which keeps the old values; set "
            "tie_word_embeddings=False before saving the merged model"
        )
    return notes
