"""Merging an adapter into the base weights and taking it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry
from lorry.core.life.base_edits import Edit, Exchanged, changed_since
from lorry.core.memory import LargePages
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.core.sites.storage import Storage, storage_of


def merge_into_base(name: str, entries: Sequence[Entry], *, check: bool = True) -> tuple[Edit, Receipt]:
    """Exchange the weight of every site for ``W + ΔW``, computed in float32 or better and rounded once.

    The original parameters are kept, and put back by the edit's `undo`; a weight that is tied to another one is untied
    by the exchange, so the other keeps its values.

    Parameters
    ----------
    name
        Of the adapter.
    entries
        The adapter at its sites; its method must merge.
    check
        Refuse updates that are not finite, and measure the rounding error for the receipt.

    Raises
    ------
    AdapterError
        The method never merges, or an update is not finite. Nothing is changed then.
    """
    never = sorted({type(e.method).__name__ for e in entries if e.method.merging == "never"})
    if never:
        raise AdapterError(
            f"Adapter '{name}' cannot be merged: {', '.join(never)} depends on the input of the layer or replaces its "
            "forward, so there is no weight that does the same. Serve it unmerged."
        )
    fresh: list[tuple[Entry, nn.Parameter]] = []
    notes: list[str] = []
    worst = error = size = 0.0
    memory = LargePages()
    with torch.no_grad():
        for entry in entries:
            storage = storage_of(entry.site)
            merged, deviation = _merged(entry, storage, check, memory)
            fresh.append((entry, merged))
            if deviation is not None:
                worst, error, size = max(worst, deviation[0]), error + deviation[1], size + deviation[2]
            notes += _notes(entry, storage)
    exchanged = []
    for entry, merged in fresh:
        holder, parameter = entry.site.holder, entry.site.parameter
        original = holder._parameters[parameter]
        holder._parameters[parameter] = merged
        exchanged.append(Exchanged(holder, parameter, original, merged))
    places = tuple((e.holder, e.name) for e in exchanged)
    edit = Edit(name, 1.0, partial(_put_back, name, exchanged), places, tuple(exchanged))
    homes = {id(home): home for e in entries for home in (e.home, e.shared) if home is not None}
    count = sum(len(home.specs) for home in homes.values())
    relative = (error / size) ** 0.5 if size else 0.0
    return edit, Receipt("merge", name, count, count, len(fresh), "match", worst, relative, tuple(dict.fromkeys(notes)))


def _put_back(name: str, exchanged: Sequence[Exchanged]) -> None:
    """Put the original parameters back, if the base is still what the merge made of it."""
    error = changed_since(name, exchanged)
    if error is not None:
        raise error
    for item in exchanged:
        item.put_back()


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
        raise AdapterError(f"The update of adapter '{entry.name}' at '{site.path}' is not finite; nothing was merged.")
    parameter = storage.encode(site, total)
    if not check or (storage.lossless and parameter.dtype == exact):
        return parameter, None
    stored = parameter.detach() if storage.lossless else _decoded(entry, storage, parameter)
    difference = stored.to(exact) - total
    update = total - base.to(exact)
    worst = float(difference.abs().max())
    if not worst < torch.inf:
        raise AdapterError(
            f"'{site.path}' with adapter '{entry.name}' leaves the range of {parameter.dtype}; nothing was "
            "merged. Load the base in bfloat16 or float32, or serve the adapter unmerged."
        )
    return parameter, (worst, float(difference.square().sum()), float(update.square().sum()))


def _factors(entry: Entry, exact: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """Return A (rank, in), B (out, rank) and the scale where the update is nothing but their product."""
    site, method = entry.site, entry.method
    if "plain" not in method.capabilities or site.lead:
        return None
    assert isinstance(method, Bottleneck)
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
