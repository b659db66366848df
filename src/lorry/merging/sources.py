"""What goes into a merge: adapters as data, each site given as factors with the scale folded in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters
from lorry.core.method.base import Expert
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.file import AdapterFile
from lorry.formats.load import load
from lorry.formats.reader import open_adapter
from lorry.formats.snapshot import as_file
from lorry.formats.updates import NeedsBase, SiteFacts

AdapterLike = str | os.PathLike[str] | Adapter | AdapterFile


class Source:
    """An adapter to merge.

    Parameters
    ----------
    file
        The adapter as data.
    name
        Under which it takes part; unique in a merge.
    origin
        Where it came from, for the receipt.
    live
        The adapter on a model that it was taken from, if any.

    Attributes
    ----------
    sites
        Path -> facts, for the sites that have an update of a weight.
    whole
        Paths of modules that were trained whole, which no update of a weight describes.
    approximated
        Path -> relative error of the factors, where the update is not a product of thin factors.

    Raises
    ------
    AdapterError
        It has no sites; `NeedsBase` where only a model tells them.
    """

    def __init__(self, file: AdapterFile, name: str, origin: str = "", live: Adapter | None = None) -> None:
        self.file, self.name, self.live = file, name, live
        self.origin = origin or file.where
        self.method = file.method.info.slug
        self.base = file.base
        self.fingerprint: Fingerprint | None = file.fingerprint
        self.metadata: Mapping[str, Any] = file.metadata
        self.notes = list(file.notes)
        self.sites: dict[str, SiteFacts] = {}
        self.whole: list[str] = []
        self.approximated: dict[str, float] = {}
        if file.needs_model:
            raise NeedsBase(f"'{file.where}': {file.needs_model}")
        if file.flat:
            raise NeedsBase(f"'{file.where}' names its layers with underscores, which only the model can resolve")
        for path, stored in file.sites.items():
            if stored.kind == "block":
                self.whole.append(path)
            else:
                self.sites[path] = file.facts(path)
                file.check_complete(path)
        if file.base_copies:
            self.notes.append(f"{len(file.base_copies)} unchanged parameters of the base in the file were left aside")
        if not file.sites:
            raise AdapterError(f"'{file.where}' has no sites; there is nothing to merge.")

    def read(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` in float64, the scale folded into B.

        Raises
        ------
        CheckpointError
            A value is not finite, or a tensor is empty.
        AdapterError
            The update depends on the input; `NeedsBase` where it depends on a base weight that is not there.
        """
        plain = self.file.plain(path)
        if self.live is not None and self.live.state.fused and not plain:
            raise AdapterError(
                f"Adapters are fused into the base ({', '.join(self.live.state.fused)}), and the update of "
                f"{type(self.file.sites[path].method).__name__} depends on its weights. Unfuse them first."
            )
        with torch.no_grad():
            a, b, error = self.file.factors(path)
        if not plain:
            self.approximated[path] = error
        if not a.numel() or not b.numel():
            raise CheckpointError(
                f"Adapter '{self.name}' ({self.origin}) has empty tensors at '{path}'; nothing was merged."
            )
        # one sum is enough: finite values of single precision do not overflow it, and NaN or infinity stay in it
        if not (torch.isfinite(a.sum()) and torch.isfinite(b.sum())):
            raise CheckpointError(
                f"Adapter '{self.name}' ({self.origin}) holds NaN or infinite values at '{path}'; nothing was merged. "
                "The training run that wrote it diverged; use an earlier checkpoint."
            )
        return a, b


def open_source(item: AdapterLike, name: str, model: nn.Module | None, stack: ExitStack) -> Source:
    """Open an adapter; what its file alone cannot tell is worked out on `model`, where it is loaded until `stack`
    closes.

    Raises
    ------
    AdapterError, CheckpointError
        It depends on its input, or needs a model that was not given; with the reason.
    """
    if isinstance(item, Adapter):
        return _live(item, name)
    file = open_adapter(item)
    if not isinstance(item, AdapterFile):
        stack.callback(file.close)
    try:
        source = Source(file, name)
        _check_ungated(file, name)
        for path in source.sites:  # an update that needs the base weight is found out at the first site of each method
            if not file.plain(path):
                source.read(path)
                break
        return source
    except NeedsBase as reason:
        if model is None:
            raise AdapterError(
                f"Adapter '{name}' cannot be merged from its file alone: {reason}. Pass the base model (model=...)."
            ) from None
    loaded = load(model, file, name=_free_name(model), activate=False)
    stack.callback(loaded.detach)
    return _live(loaded, name, origin=file.where)


def open_expert(item: AdapterLike, model: nn.Module | None, stack: ExitStack) -> AdapterFile:
    """Open an adapter as data for `lorry.formats.mixture`, which takes gated ones too; errors as for `open_source`."""
    if isinstance(item, Adapter):
        return as_file(item, copy=False)
    file = open_adapter(item)
    if not isinstance(item, AdapterFile):
        stack.callback(file.close)
    if not (file.needs_model or file.flat):
        return file
    if model is None:
        raise AdapterError(f"'{file.where}' cannot be read from its file alone. Pass the base model (model=...).")
    loaded = load(model, file, name=_free_name(model), activate=False)
    stack.callback(loaded.detach)
    return as_file(loaded, copy=False)


def _check_ungated(file: AdapterFile, name: str) -> None:
    """Refuse an adapter without an update of the weight, if its own method can merge it, and say so."""
    for path, method in file.methods.items():
        if method.fusing != "never" or not method.adopts():
            continue
        try:
            method.with_experts([Expert(name, method, file.all_tensors(path), file.site(path))])
        except AdapterError:
            return  # it takes in others, but not its own kind
        slug = method.info.slug
        raise AdapterError(
            f"Adapter '{name}' ({slug}) depends on the input of the layer (its units are gated for each token), so it "
            f"has no update of the weight to merge. Merge such adapters by their own method: method='{slug}'."
        )


def _live(adapter: Adapter, name: str, origin: str = "") -> Source:
    text = origin or f"adapter '{adapter.name}' on {adapter.state.base_name}"
    return Source(as_file(adapter, copy=False), name, text, adapter)


def _free_name(model: nn.Module) -> str:
    taken, number = adapters(model), 1
    while f"merge-{number}" in taken:
        number += 1
    return f"merge-{number}"
