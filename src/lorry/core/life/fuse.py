"""Fusing an adapter into the base weights and taking it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry
from lorry.core.life.base_edits import Edit, Exchanged, changed_since
from lorry.core.life.biases import AddedBias, added_notes, with_biases
from lorry.core.memory import LargePages
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.core.sites.site import Site
from lorry.core.sites.storage import Storage, storage_of

#: A (rank, in), B (out, rank) and the scale of an update that is nothing but their product.
Thin = tuple[Tensor, Tensor, float]
#: Largest error, squared error and squared update of rounding a fused weight.
Deviation = tuple[float, float, float]
#: Elements of a weight in half precision whose sum is made at once: float32 copies of them stay in the CPU's cache.
_CHUNK = 1 << 17


def fuse_into_base(
    name: str, entries: Sequence[Entry], *, check: bool = True, keep: bool = True
) -> tuple[Edit, Receipt]:
    """Exchange the weight of every site for ``W + ΔW``, computed in float32 or better and rounded once.

    The original parameters are kept, and put back by the edit's `undo`; a weight that is tied to another one is untied
    by the exchange, so the other keeps its values.

    Parameters
    ----------
    name
        Of the adapter.
    entries
        The adapter at its sites; its method must be one that fuses.
    check
        Refuse updates that are not finite, and measure the rounding error for the receipt.
    keep
        Keep the original weights. Without them the sum is written into the weight where it lies, which takes no
        memory and half the time, and cannot be taken back. Weights that are tied, quantised or changed by more
        than a product of two factors are exchanged all the same, and the originals dropped.

    Raises
    ------
    AdapterError
        The method never fuses, or an update is not finite. Nothing is changed then.
    """
    never = sorted({type(e.method).__name__ for e in entries if e.method.fusing == "never"})
    if never:
        raise AdapterError(
            f"Adapter '{name}' cannot be fused: {', '.join(never)} depends on the input of the layer or replaces its "
            "forward, so there is no weight that does the same. Serve it unfused."
        )
    for entry in entries:
        check_kept(entry.site)
    fresh: list[tuple[Entry, nn.Parameter]] = []
    places: list[tuple[Tensor, Thin]] = []
    notes: list[str] = []
    deviations: list[Deviation | None] = []
    memory = LargePages()
    with torch.no_grad():
        parts = with_biases(entries)
        for entry in parts:
            storage = storage_of(entry.site)
            place = None if keep else _place(entry, storage)
            if place is not None:
                if check:
                    _refuse_overflow(entry, *place)
                places.append(place)
                continue
            fused, deviation = _fused(entry, storage, check, memory)
            fresh.append((entry, fused))
            deviations.append(deviation)
            notes += _notes(entry, storage)
        # from here on nothing is refused any more
        deviations += [_write_sum(matrix, matrix, thin, check) for matrix, thin in places]
    exchanged = tuple(_exchange(entry, fused, keep) for entry, fused in fresh)
    at = tuple((entry.site.holder, entry.site.parameter) for entry in parts)
    edit = Edit(name, 1.0, partial(_put_back, name, exchanged) if keep else None, at, exchanged)
    return edit, _receipt(name, entries, deviations, notes + added_notes(parts))


def check_kept(site: Site) -> None:
    """Raise `AdapterError` if the weight of a site is no parameter, so that nothing can be put in its place."""
    if site.parameter and not site.kept:
        raise AdapterError(
            f"The weight of '{site.path}' is worked out from other parameters at each use (a parametrisation such as "
            "weight norm), so no update can be added to it; nothing was fused. Serve the adapter unfused, or make "
            "the weight a parameter first: torch.nn.utils.parametrize.remove_parametrizations(module, "
            f"'{site.parameter}'), then attach or load the adapter."
        )


def _exchange(entry: Entry, fused: nn.Parameter, keep: bool) -> Exchanged:
    """Put a fused weight in the place of the base's own."""
    holder, parameter = entry.site.holder, entry.site.parameter
    original = holder._parameters[parameter]
    holder._parameters[parameter] = fused
    if original is None:
        return AddedBias(holder, parameter, fused, keep)
    return Exchanged(holder, parameter, original if keep else None, fused)


def _put_back(name: str, exchanged: Sequence[Exchanged]) -> None:
    """Put the original parameters back, if the base is still what fusing made of it."""
    error = changed_since(name, exchanged)
    if error is not None:
        raise error
    for item in exchanged:
        item.put_back()


def _receipt(name: str, entries: Sequence[Entry], deviations: list[Deviation | None], notes: list[str]) -> Receipt:
    measured = [d for d in deviations if d is not None]
    worst = max((d[0] for d in measured), default=0.0)
    error, size = (sum(d[i] for d in measured) for i in (1, 2))
    relative = (error / size) ** 0.5 if size else 0.0
    homes = {id(home): home for e in entries for home in (e.home, e.shared) if home is not None}
    count = sum(len(home.specs) for home in homes.values())
    return Receipt("fuse", name, count, count, len(entries), "match", worst, relative, tuple(dict.fromkeys(notes)))


def _fused(entry: Entry, storage: Storage, check: bool, memory: LargePages) -> tuple[nn.Parameter, Deviation | None]:
    """Return the fused parameter, and what rounding it did if that is asked for."""
    site = entry.site
    base = storage.read(site)
    exact = torch.promote_types(base.dtype, torch.float32)
    thin = _factors(entry, exact)
    sure = thin is not None and _bounded(*thin)
    # thin factors bound their product: only where the bound is no comfort is every weight looked at
    if thin is not None and (sure or not check) and storage.lossless:
        native = memory.empty(base.shape, base)
        matrix = site.kind.to_matrix(site, native)
        if _same_memory(matrix, native):
            deviation = _write_sum(site.kind.to_matrix(site, base), matrix, thin, check)
            if deviation is not None and not deviation[0] < torch.inf:
                raise _out_of_range(entry, base.dtype)
            return storage.encode(site, native), deviation
    total = _sum(entry, base, exact, thin)
    if check and not sure and not torch.isfinite(total).all():
        raise _not_finite(entry)
    parameter = storage.encode(site, total)
    if not check or (storage.lossless and parameter.dtype == exact):
        return parameter, None
    stored = parameter.detach() if storage.lossless else _decoded(entry, storage, parameter)
    deviation = _deviation(stored, total, base)
    if not deviation[0] < torch.inf:
        raise _out_of_range(entry, parameter.dtype)
    return parameter, deviation


def _not_finite(entry: Entry) -> AdapterError:
    return AdapterError(
        f"The update of adapter '{entry.name}' at '{entry.site.path}' is not finite; nothing was fused."
    )


def _out_of_range(entry: Entry, kind: torch.dtype) -> AdapterError:
    return AdapterError(
        f"'{entry.site.path}' with adapter '{entry.name}' leaves the range of {kind}; nothing was fused. "
        "Load the base in bfloat16 or float32, or serve the adapter unfused."
    )


def _factors(entry: Entry, exact: torch.dtype) -> Thin | None:
    """Return what the update is the product of, or None where it is more than that."""
    site, method = entry.site, entry.method
    if "plain" not in method.capabilities or site.lead:
        return None
    assert isinstance(method, Bottleneck)
    a, b = (f.detach().to(exact) for f in method.factors(entry.tensors(), site))
    return a, b, method.scale(site)


def _largest(a: Tensor, b: Tensor, scale: float) -> float:
    """Return what no entry of ``scale · B A`` exceeds, by Cauchy and Schwarz; NaN or infinite if the factors are."""
    return float(vector_norm(a) * vector_norm(b)) * abs(scale)


def _bounded(a: Tensor, b: Tensor, scale: float) -> bool:
    """Tell whether the norms of the factors rule an overflow of ``scale · B A`` out."""
    return _largest(a, b, scale) < torch.finfo(a.dtype).max / 2  # false for NaN


def _place(entry: Entry, storage: Storage) -> tuple[Tensor, Thin] | None:
    """Return the weight as a matrix ``(out, in)`` in its own memory and the factors of the update, or None where the
    sum cannot be written there.
    """
    site = entry.site
    if not storage.lossless or site.tied or site.stored.is_inference():
        return None
    base = storage.read(site)
    thin = _factors(entry, torch.promote_types(base.dtype, torch.float32))
    if thin is None:
        return None
    matrix = site.kind.to_matrix(site, base)
    return (matrix, thin) if _same_memory(matrix, base) else None


def _same_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _refuse_overflow(entry: Entry, matrix: Tensor, thin: Thin) -> None:
    """Raise if the sum would not be finite in the weight's type; the weight is not changed."""
    room = torch.finfo(matrix.dtype).max / 2
    narrow = matrix.dtype == torch.float16  # elsewhere no weight of use comes near the range
    if _largest(*thin) < room and not (narrow and not bool(matrix.abs().max() < room)):
        return
    for part, total in _sums(matrix, thin):
        if not torch.isfinite(total).all():
            raise _not_finite(entry)
        if not torch.isfinite(total.to(matrix.dtype)).all():
            raise _out_of_range(entry, part.dtype)


def _sums(matrix: Tensor, thin: Thin) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight by rows, each with its sum in the precision of the factors."""
    a, b, scale = thin
    for rows in _chunks(matrix):
        yield matrix[rows], torch.addmm(matrix[rows].to(a.dtype), b[rows], a, alpha=scale)


def _chunks(matrix: Tensor) -> Iterator[slice]:
    rows, width = matrix.shape
    step = max(1, _CHUNK // max(width, 1)) if matrix.device.type == "cpu" else rows
    return (slice(start, start + step) for start in range(0, rows, max(step, 1)))


def _write_sum(matrix: Tensor, out: Tensor, thin: Thin, measure: bool) -> Deviation | None:
    """Write ``W + scale · B A`` to `out`, which may be the weight itself, rounded once; return what rounding did if it
    is to be measured and there is any.
    """
    a, b, scale = thin
    if matrix.t().is_contiguous():  # kept the other way round: its columns are what lies together
        matrix, out, thin = matrix.t(), out.t(), (b.t(), a.t(), scale)
        a, b, scale = thin
    if out.dtype == a.dtype:
        torch.addmm(matrix, b, a, alpha=scale, out=out)
        return None
    found = []
    for rows in _chunks(matrix):
        base = matrix[rows].to(a.dtype)
        total = torch.addmm(base, b[rows], a, alpha=scale)
        out[rows] = total
        if measure:
            found.append(_deviation(out[rows], total, base))
    if not found:
        return None
    worst, errors, sizes = zip(*found, strict=True)
    return max(worst), sum(errors), sum(sizes)


def _deviation(stored: Tensor, total: Tensor, base: Tensor) -> Deviation:
    """Return largest error and squared error of what is stored of a sum, and the squared update."""
    difference, update = stored.to(total.dtype) - total, total - base.to(total.dtype)
    return float(difference.abs().amax()), float(vector_norm(difference)) ** 2, float(vector_norm(update)) ** 2


def _sum(entry: Entry, base: Tensor, exact: torch.dtype, thin: Thin | None) -> Tensor:
    """Return ``W + ΔW`` in its native layout."""
    kind, site = entry.site.kind, entry.site
    if thin is None:
        return base.to(exact) + kind.to_weight(site, entry.delta().to(exact))
    a, b, scale = thin
    matrix = kind.to_matrix(site, base).to(exact)
    return kind.to_weight(site, torch.addmm(matrix, b, a, alpha=scale)).contiguous()


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
            "tie_word_embeddings=False before saving the fused model"
        )
    return notes
