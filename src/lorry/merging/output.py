"""The result of a merge: a plain LoRA of scale 1, attached to a model or written as an ordinary adapter directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import SiteError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import install
from lorry.core.life.build import build
from lorry.core.life.state import open_state
from lorry.core.method.base import Method
from lorry.core.method.declared import plain_lora
from lorry.core.method.spec import TensorSpec
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.file import AdapterFile
from lorry.formats.stored import StoredSite
from lorry.formats.updates import SiteFacts, stand_in
from lorry.merging.receipt import MergeReceipt

RECEIPT = "merge_receipt.json"


@dataclass
class MergedAdapter:
    """Factors of the merged adapter and the proof of how they came about.

    Attributes
    ----------
    name
        Under which it is saved or attached.
    tensors
        Site path -> ``{"A": (*lead, rank, in), "B": (*lead, out, rank)}``; the update is ``B A``.
    sites
        Site path -> kind and shape.
    fingerprint
        Of the base that the inputs were made for, over all sites that they cover.
    receipt
        See `MergeReceipt`.
    metadata
        Lineage, for the checkpoint.
    """

    name: str
    tensors: dict[str, dict[str, Tensor]]
    sites: dict[str, SiteFacts]
    fingerprint: Fingerprint
    receipt: MergeReceipt
    base: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def rank(self, path: str) -> int:
        """Return the rank at a site."""
        return int(self.tensors[path]["A"].shape[-2])

    def delta(self, path: str) -> Tensor:
        """Return the update at a site as ``(*lead, out, in)`` in float64."""
        own = self.tensors[path]
        return own["B"].double() @ own["A"].double()

    def file(self) -> AdapterFile:
        """Return the result as data, which can be edited, saved in any format, loaded, and merged again."""
        sites = {}
        for path, facts in self.sites.items():
            kernel_known = facts.kind != "conv" or facts.kernel
            site = stand_in(path, facts) if kernel_known else None
            sites[path] = StoredSite(
                path, self._method(path), kind=facts.kind, shape=facts.shape, values=self.tensors[path], site=site
            )
        return AdapterFile(
            name=self.name,
            method=self._common(),
            sites=sites,
            fingerprint=self.fingerprint,
            base=self.base,
            metadata=self.metadata,
        )

    def attach(
        self, model: nn.Module, name: str | None = None, *, activate: bool = True, trainable: bool = False
    ) -> Adapter:
        """Attach the result to a model.

        Raises
        ------
        SiteError
            The model lacks a site, or it is of another shape; nothing is changed.
        FingerprintError
            The model is not the base of the inputs.
        """
        state = open_state(model)
        missing = [p for p in self.sites if p not in state.sites]
        if missing:
            raise SiteError(
                f"The model {type(state.root).__name__} lacks {len(missing)} of {len(self.sites)} sites: "
                f"{some(missing)}."
            )
        for path, facts in self.sites.items():
            if state.sites[path].shape != facts.shape:
                raise SiteError(
                    f"'{path}' is {state.sites[path].shape} in this model, the merged adapter is for {facts.shape}."
                )
        adapter = self.file().load(model, name=name or self.name, activate=activate, trainable=trainable)
        applied, total = adapter.receipt.tensors_applied, adapter.receipt.tensors_total
        adapter.receipt = Receipt("merge adapters", adapter.name, applied, total, len(self.sites), "match")
        return adapter

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Receipt:
        """Write an adapter directory, in PEFT's format too where that is exact, with the full receipt beside it.

        Raises
        ------
        CheckpointError
            A value is not finite after rounding, or the folder cannot be written; what was there before is left.
        """
        receipt = json.dumps(self.receipt.to_dict(), indent=1).encode()
        return self.file().save(path, overwrite=overwrite, extra={RECEIPT: receipt})

    def _method(self, path: str) -> Method:
        return plain_lora(self.rank(path))

    def _common(self) -> Method:
        ranks = [self.rank(p) for p in self.sites]
        return plain_lora(max(set(ranks), key=lambda r: (ranks.count(r), r)))


@contextmanager
def trial_adapter(
    model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], *, trainable: bool = False
) -> Iterator[Adapter]:
    """Let a model carry factors ``{path: {"A", "B"}}`` of scale 1, and nothing else, while the context lasts."""
    state = open_state(model)
    before = state.active

    def value(full: str, spec: TensorSpec) -> Tensor:
        path, _, name = full.rpartition(".")
        return tensors[path][name].clone()

    chosen = [(state.sites[p], plain_lora(int(own["A"].shape[-2]))) for p, own in tensors.items()]
    name = next(f"merge-trial-{i}" for i in range(len(state.adapters) + 1) if f"merge-trial-{i}" not in state.adapters)
    adapter = build(state, name, chosen[0][1], chosen, dtype=torch.float32, values=value, seed=0, metadata={})
    try:
        yield install(adapter, trainable=trainable, activate=True)
    finally:
        adapter.detach()
        state.active = before


def joined(marks: Mapping[str, Fingerprint | None]) -> Fingerprint:
    """Return one fingerprint over the sites of several; those that carry hashes of weights are preferred."""
    sites: dict[str, str] = {}
    base = ""
    for mark in marks.values():
        if mark is None:
            continue
        base = base or mark.base
        for path, value in mark.sites.items():
            if len(value) > len(sites.get(path, "")):
                sites[path] = value
    return Fingerprint(sites, base)
