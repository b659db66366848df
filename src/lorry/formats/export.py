"""Exporting any adapter whose update does not depend on the input as a plain LoRA in PEFT's format."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.formats.folders import PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.peft_write import NotPlain, Plain, peft_form
from lorry.formats.save import check_tensors, gathered, model_name, process_rank, serialised

if TYPE_CHECKING:
    from lorry.core.forward.entry import Entry
    from lorry.core.life.adapter import Adapter


def export_plain(
    adapter: Adapter, path: str | os.PathLike[str], rank: int | None = None, *, overwrite: bool = True
) -> Receipt:
    """Write an adapter as a plain LoRA in PEFT's format, which any tool reads.

    A method whose update is ``scale · B A`` is exported exactly, from its factors (PiSSA as rank 2r). Any
    other constant update (a weight delta, DoRA) becomes the best approximation of rank `rank`, by a truncated
    singular value decomposition (Eckart and Young), and the receipt gives the error.

    Parameters
    ----------
    adapter
        Attached to its model.
    path
        The folder.
    rank
        Of updates that have to be approximated; needed for those only.
    overwrite
        Replace an adapter that lies there.

    Returns
    -------
    Receipt
        ``relative_error`` is the norm of what was cut off relative to the update's; notes say it by site.

    Raises
    ------
    AdapterError
        A method depends on the input, so that no weight update does the same (by name); or a rank is needed.
    CheckpointError
        PEFT has no place for a site, or the folder cannot be written.
    """
    never = sorted({type(e.method).__name__ for e in adapter.entries.values() if _never(e)})
    if never:
        raise AdapterError(
            f"Adapter '{adapter.name}' cannot be exported as a plain LoRA: {', '.join(never)} depends on "
            "the input of the layer or replaces its forward. Serve it with Lorry."
        )
    tensors, sharded = gathered(adapter)
    if sharded:
        raise AdapterError("Export needs whole tensors: save the adapter, load it in one process, export it there.")
    plain, error, notes = _plain(adapter, rank)
    whole = {p: tensors[p] for p, e in adapter.entries.items() if e.method.info.slug == "full"}
    task = adapter.metadata.get("task_type")
    try:
        form = peft_form(adapter.state.root, plain, whole, base=model_name(adapter), task=task)
    except NotPlain as reason:
        raise CheckpointError(f"Adapter '{adapter.name}' cannot be said in PEFT's format: {reason}.") from None
    check_tensors(form.tensors, adapter.name)
    if process_rank() == 0:
        blob, _ = serialised(form.tensors)
        write_folder(Path(path), {TENSORS: blob, PEFT_CONFIG: form.config_bytes()}, overwrite=overwrite)
    count = len(form.tensors)
    said, sites = tuple(notes + form.notes), len(adapter.entries)
    return Receipt("export", adapter.name, count, count, sites, "match", *error, said)


def _plain(adapter: Adapter, rank: int | None) -> tuple[list[Plain], tuple[float, float], list[str]]:
    """Return every low-rank site as a plain LoRA, the largest and the relative error, and a note for each
    inexact site.
    """
    plain: list[Plain] = []
    notes: list[str] = []
    lost = size = worst = 0.0
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            if entry.method.info.slug == "full":
                continue
            if isinstance(entry.method, Bottleneck) and entry.method.plain:
                plain.append(_exact(entry))
                continue
            item, error, norm, highest = _truncated(entry, rank)
            plain.append(item)
            lost, size, worst = lost + error, size + norm, max(worst, highest)
            relative = math.sqrt(error / norm) if norm else 0.0
            notes.append(f"'{path}': rank {item.rank}, relative error {relative:.2e}")
    return plain, (worst, math.sqrt(lost / size) if size else 0.0), notes


def _never(entry: Entry) -> bool:
    """Whether the update depends on the input, so that no weight does the same; whole modules are copied."""
    method = entry.method
    if method.info.slug == "full":
        return False
    return method.merging == "never" or (isinstance(method, Bottleneck) and not method.constant)


def _exact(entry: Entry) -> Plain:
    """Return the factors of a plain bottleneck, with alpha such that alpha / rank is its scale."""
    method, site = entry.method, entry.site
    assert isinstance(method, Bottleneck)
    a, b = method.factors(entry.tensors(), site)
    rank = a.shape[-2]
    return Plain(site, rank, method.scale(site) * rank, {"A": a.detach().cpu(), "B": b.detach().cpu()})


def _truncated(entry: Entry, rank: int | None) -> tuple[Plain, float, float, float]:
    """Return the best product of rank `rank`, the squared norms of what is lost and of the update, and the
    largest error.
    """
    site = entry.site
    if rank is None or rank < 1:
        raise AdapterError(
            f"The update of {type(entry.method).__name__} at '{site.path}' is no product of two thin "
            f"factors, so it is approximated: give a rank of at least 1, found {rank}."
        )
    delta = entry.delta().detach().to(torch.float64)
    kept = min(rank, site.out_features, site.in_features)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = s[..., :kept].sqrt()
    b, a = u[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., :kept, :]
    b, a = b.float(), a.float()
    gap = delta - b.double() @ a.double()
    item = Plain(site, kept, float(kept), {"A": a.cpu(), "B": b.cpu()})
    return item, float(gap.square().sum()), float(delta.square().sum()), float(gap.abs().max())
