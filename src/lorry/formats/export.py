"""Exporting any adapter whose update does not depend on the input as a plain LoRA in PEFT's format."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.life.writers import WRITERS
from lorry.core.method.base import Method
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.folders import PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.peft_write import NotPlain, Plain, peft_folder
from lorry.formats.save import check_tensors, model_name, process_rank, saved_tensors, sealed
from lorry.formats.snapshot import as_file, is_sharded


def export_plain(
    adapter: Adapter | AdapterFile,
    path: str | os.PathLike[str],
    rank: int | None = None,
    *,
    overwrite: bool = True,
) -> Receipt:
    """Write an adapter as a plain LoRA in PEFT's format, which any tool reads.

    A method whose update is ``scale · B A`` is exported exactly, from its factors (PiSSA as rank 2r). Any
    other constant update (a weight delta, DoRA) becomes the best approximation of rank `rank`, by a truncated
    singular value decomposition (Eckart and Young), and the receipt gives the error.

    Parameters
    ----------
    adapter
        Attached to its model, or as data.
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
    file, plain, error, notes = plain_updates(adapter, rank)
    whole = {p: saved_tensors(file, p) for p, m in file.methods.items() if m.whole}
    chosen = file.targets() if file.targets is not None else None
    task = file.metadata.get("task_type")
    try:
        form = peft_folder(file.root, plain, whole, base=model_name(file), task=task, chosen=chosen)
    except NotPlain as reason:
        raise CheckpointError(f"Adapter '{adapter.name}' cannot be said in PEFT's format: {reason}.") from None
    check_tensors(form.tensors, adapter.name)
    if process_rank() == 0:
        files = {TENSORS: sealed(form.tensors)[0], PEFT_CONFIG: form.config_bytes()}
        write_folder(Path(path), files, overwrite=overwrite)
    count, said = len(form.tensors), tuple(notes + form.notes)
    return Receipt("export", adapter.name, count, count, len(file.sites), "match", *error, said)


WRITERS.add("plain", export_plain)


def plain_updates(
    adapter: Adapter | AdapterFile, rank: int | None
) -> tuple[AdapterFile, list[Plain], tuple[float, float], list[str]]:
    """Return an adapter with each of its low-rank sites as a plain LoRA; modules that were trained whole are left out.

    Parameters and errors are those of `export_plain`.

    Returns
    -------
    tuple
        The adapter as data, its sites, the largest and the relative error, and a note for each inexact site.
    """
    methods = [e.method for e in adapter.entries.values()] if isinstance(adapter, Adapter) else adapter.methods.values()
    never = sorted({type(m).__name__ for m in methods if _never(m)})
    if never:
        raise AdapterError(
            f"Adapter '{adapter.name}' cannot be exported as a plain LoRA: {', '.join(never)} depends on "
            "the input of the layer or replaces its forward. Serve it with Lorry."
        )
    if is_sharded(adapter):
        raise AdapterError("Export needs whole tensors: save the adapter, load it in one process, export it there.")
    file = as_file(adapter, copy=False)
    plain: list[Plain] = []
    notes: list[str] = []
    lost = size = worst = 0.0
    with torch.no_grad():
        for path, method in file.methods.items():
            if method.whole:
                continue
            if isinstance(method, Bottleneck) and method.plain:
                plain.append(_exact(file, path, method))
                continue
            item, error, norm, highest = _truncated(file, path, method, rank)
            plain.append(item)
            lost, size, worst = lost + error, size + norm, max(worst, highest)
            relative = math.sqrt(error / norm) if norm else 0.0
            notes.append(f"'{path}': rank {item.rank}, relative error {relative:.2e}")
    return file, plain, (worst, math.sqrt(lost / size) if size else 0.0), notes


def _never(method: Method) -> bool:
    """Whether the update depends on the input, so that no weight does the same; whole modules are copied."""
    if method.whole:
        return False
    return method.fusing == "never" or (isinstance(method, Bottleneck) and not method.constant)


def _exact(file: AdapterFile, path: str, method: Bottleneck) -> Plain:
    """Return the factors of a plain bottleneck, with alpha such that alpha / rank is its scale."""
    site = file.site(path)
    a, b = method.factors(file.all_tensors(path), site)
    rank = a.shape[-2]
    return Plain(site, rank, method.scale(site) * rank, {"A": a.detach().cpu(), "B": b.detach().cpu()})


def _truncated(file: AdapterFile, path: str, method: Method, rank: int | None) -> tuple[Plain, float, float, float]:
    """Return the best product of rank `rank`, the squared norms of what is lost and of the update, and the
    largest error.
    """
    site = file.site(path)
    if rank is None or rank < 1:
        raise AdapterError(
            f"The update of {type(method).__name__} at '{path}' is no product of two thin "
            f"factors, so it is approximated: give a rank of at least 1, found {rank}."
        )
    delta = method.delta(file.all_tensors(path), site).detach().to("cpu", torch.float64)
    kept = min(rank, site.out_features, site.in_features)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = s[..., :kept].sqrt()
    b, a = u[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., :kept, :]
    b, a = b.float(), a.float()
    gap = delta - b.double() @ a.double()
    item = Plain(site, kept, float(kept), {"A": a.cpu(), "B": b.cpu()})
    return item, float(gap.square().sum()), float(delta.square().sum()), float(gap.abs().max())
