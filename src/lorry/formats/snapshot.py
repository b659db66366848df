"""A live adapter as data: the same object that opening a file gives."""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.core.forward.entry import TensorHome
from lorry.core.life.adapter import Adapter
from lorry.formats.file import AdapterFile
from lorry.formats.stored import StoredSite


def as_file(adapter: Adapter | AdapterFile, *, copy: bool = True) -> AdapterFile:
    """Return an adapter as data on the CPU.

    Sharded tensors (FSDP2) are gathered, so every process must call this then.

    Parameters
    ----------
    adapter
        On a model, in training or not; what is data already is returned as it is.
    copy
        Take copies; without, tensors on the CPU are shared and follow training.
    """
    if isinstance(adapter, AdapterFile):
        return adapter
    sites = {}
    for path, entry in adapter.entries.items():
        site = entry.site
        sites[path] = StoredSite(
            path,
            entry.method,
            kind=site.kind.name,
            shape=site.shape,
            values=_gathered(entry.home, copy),
            unsaved=_unsaved(entry.home),
            site=site,
        )
    shared = adapter.shared
    return AdapterFile(
        name=adapter.name,
        method=adapter.method,
        sites=sites,
        fingerprint=adapter.fingerprint,
        base=adapter.fingerprint.base,
        metadata=dict(adapter.metadata),
        shared_values=_gathered(shared, copy) if shared is not None else {},
        shared_unsaved=_unsaved(shared) if shared is not None else frozenset(),
        root=adapter.state.root,
    )


def is_sharded(adapter: Adapter | AdapterFile) -> bool:
    """Whether tensors are spread over processes (FSDP2)."""
    homes = adapter.homes() if isinstance(adapter, Adapter) else ()
    return any(hasattr(t, "full_tensor") for _, home in homes for t in home.tensors().values())


def _unsaved(home: TensorHome) -> frozenset[str]:
    return frozenset(n for n, spec in home.specs.items() if not spec.saved)


def _gathered(home: TensorHome, copy: bool) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for name, tensor in home.tensors().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[name] = whole.detach().to("cpu", copy=copy)
    return found
