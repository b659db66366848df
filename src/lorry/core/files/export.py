"""Exporting any adapter whose update does not depend on the input as a plain LoRA in PEFT's format."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.families import Bottleneck
from lorry.core.files.folders import PEFT_CONFIG, TENSORS, write_folder
from lorry.core.files.peft_write import NotPlain, Plain, peft_form
from lorry.core.files.save import _base_name, _check, _rank, gathered, serialised
from lorry.core.receipt import Receipt

if TYPE_CHECKING:
    from lorry.core.adapter import Adapter
    from lorry.core.entry import Entry


def export_plain(
    adapter: Adapter, path: str | os.PathLike[str], rank: int | None = None, *, overwrite: bool = True
) -> Receipt:
    """Write an adapter as a plain LoRA in PEFT's format, which any tool reads.

    A method whose update is ``scale · B A`` is exported exactly, from its factors (PiSSA as rank 2r). Any other constant
    update (a weight delta, DoRA) becomes the best approximation of rank `rank`, by a truncated singular value decomposition
    (Eckart and Young), and the receipt gives the error.

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
        ``relative_error`` is the norm of what was cut off relative to the update's; a note says it for each site.

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
            f"Adapter '{adapter.name}' cannot be exported as a plain LoRA: {', '.join(never)} depends on the input of the layer or "
            "replaces its forward. Serve it with Lorry."
        )
    tensors, sharded = gathered(adapter)
    if sharded:
        raise AdapterError("Exporting needs whole tensors; save the sharded adapter first, load it in one process and export it there.")
    plain: list[Plain] = []
    whole: dict[str, dict[str, Tensor]] = {}
    notes: list[str] = []
    lost = size = worst = 0.0
    with torch.no_grad():
        for site_path, entry in adapter.entries.items():
            if entry.method.info.slug == "full":
                whole[site_path] = tensors[site_path]
            elif isinstance(entry.method, Bottleneck) and entry.method.plain:
                plain.append(_exact(entry))
            else:
                item, error, norm, highest = _truncated(entry, rank)
                plain.append(item)
                lost, size, worst = lost + error, size + norm, max(worst, highest)
                notes.append(f"'{site_path}': rank {item.rank}, relative error {math.sqrt(error / norm) if norm else 0.0:.2e}")
    try:
        form = peft_form(adapter.state.root, plain, whole, base=_base_name(adapter), task=adapter.metadata.get("task_type"))
    except NotPlain as reason:
        raise CheckpointError(f"Adapter '{adapter.name}' cannot be said in PEFT's format: {reason}.") from None
    _check(form.tensors, adapter.name)
    if _rank() == 0:
        blob, _ = serialised(form.tensors)
        write_folder(Path(path), {TENSORS: blob, PEFT_CONFIG: form.config_bytes()}, overwrite=overwrite)
    count = len(form.tensors)
    relative = math.sqrt(lost / size) if size else 0.0
    return Receipt(
        "export", adapter.name, count, count, len(adapter.entries), "match", worst, relative, tuple(notes + form.notes)
    )


def _never(entry: Entry) -> bool:
    return entry.method.info.merge == "never" and entry.method.info.slug != "full"


def _exact(entry: Entry) -> Plain:
    """Return the factors of a plain bottleneck, with alpha such that alpha / rank is its scale."""
    method, site = entry.method, entry.site
    assert isinstance(method, Bottleneck)
    a, b = method.factors(entry.tensors(), site)
    rank = a.shape[-2]
    return Plain(site, rank, method.scale(site) * rank, {"A": a.detach().cpu(), "B": b.detach().cpu()})


def _truncated(entry: Entry, rank: int | None) -> tuple[Plain, float, float, float]:
    """Return the best product of rank `rank`, the squared norms of what is lost and of the update, and the largest error."""
    site = entry.site
    if rank is None or rank < 1:
        raise AdapterError(
            f"The update of {type(entry.method).__name__} at '{site.path}' is no product of two thin factors, so it is approximated: "
            f"give a rank of at least 1, found {rank}."
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
