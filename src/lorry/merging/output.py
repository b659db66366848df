"""The result of a merge: a plain LoRA of scale 1, attached to a model or written as an ordinary adapter directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import CheckpointError, SiteError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.build import build
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.method.spec import TensorSpec
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.kinds import kind_named
from lorry.core.sites.site import Site
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.manifest import Manifest
from lorry.formats.peft_write import NotPlain, PeftForm, Plain, peft_form
from lorry.formats.save import serialised
from lorry.formats.tensors import check_finite
from lorry.merging.receipt import MergeReceipt
from lorry.merging.sources import SiteFacts

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
        from lorry.core.life.api import check_name, install
        from lorry.core.life.state import open_state

        state = open_state(model)
        check_name(name or self.name, state)
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
        sites = [state.sites[p] for p in self.sites]
        state.check_owners(sites)
        if self.fingerprint.sites:
            self.fingerprint.require(state.fingerprint(sites), "The merged adapter")
        flat = {f"{p}.{n}": t for p, own in self.tensors.items() for n, t in own.items()}

        def value(full: str, spec: TensorSpec) -> Tensor:
            return flat[full].clone()

        chosen = [(site, self._method(site.path)) for site in sites]
        dtype = next(iter(flat.values())).dtype
        adapter = build(
            state, name or self.name, self._common(), chosen, dtype=dtype, values=value, seed=0, metadata=self.metadata
        )
        adapter.receipt = Receipt("merge adapters", adapter.name, len(flat), len(flat), len(sites), "match")
        return install(adapter, trainable=trainable, activate=activate)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Receipt:
        """Write an adapter directory, in PEFT's format too where that is exact, with the full receipt beside it.

        Raises
        ------
        CheckpointError
            A value is not finite after rounding, or the folder cannot be written; what was there before is left.
        """
        notes = []
        form: PeftForm | None = None
        try:
            form = self._peft()
        except NotPlain as reason:
            notes.append(f"saved in Lorry's format only, because {reason}")
        flat = form.tensors if form else {f"{p}.{n}": t for p, own in self.tensors.items() for n, t in own.items()}
        check_finite(flat, path)
        blob, digest = serialised(flat)
        files = {TENSORS: blob}
        if form:
            files[PEFT_CONFIG] = form.config_bytes()
        files[RECEIPT] = json.dumps(self.receipt.to_dict(), indent=1).encode()
        files[MANIFEST] = self._manifest(len(flat), "peft" if form else "lorry", digest).to_bytes()
        write_folder(Path(path), files, overwrite=overwrite)
        return Receipt("save", self.name, len(flat), len(flat), len(self.sites), "match", notes=tuple(notes))

    def _method(self, path: str) -> Method:
        return method_from({"method": "lora", "rank": self.rank(path)})

    def _common(self) -> Method:
        ranks = [self.rank(p) for p in self.sites]
        return method_from({"method": "lora", "rank": max(set(ranks), key=lambda r: (ranks.count(r), r))})

    def _peft(self) -> PeftForm:
        plain = []
        root = nn.Module()
        for path, facts in self.sites.items():
            if facts.kind == "conv" and not facts.kernel:
                raise NotPlain(f"the kernel of the convolution '{path}' is not in the inputs")
            plain.append(Plain(_site(path, facts), self.rank(path), float(self.rank(path)), self.tensors[path]))
        form = peft_form(root, plain, {}, base=self.base)
        # without the model, only whole paths are certain to mean these modules and no others
        modules = [p.site.path for p in plain if p.site.kind.name not in ("experts", "qkv")]
        if isinstance(form.config.get("target_modules"), list) and len(modules) == len(plain):
            form.config["target_modules"] = modules
        elif len(modules) != len(plain):
            raise NotPlain("banks and packed weights are written in PEFT's format only beside their model")
        return form

    def _manifest(self, count: int, layout: str, digest: str) -> Manifest:
        dtypes = {str(t.dtype).removeprefix("torch.") for own in self.tensors.values() for t in own.values()}
        return Manifest(
            name=self.name,
            layout=layout,
            method=self._common(),
            methods={p: self._method(p) for p in self.sites},
            kinds={p: f.kind for p, f in self.sites.items()},
            shapes={p: f.shape for p, f in self.sites.items()},
            shared=(),
            tensors=count,
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            fingerprint=self.fingerprint,
            metadata=self.metadata,
            digest=digest,
        )


def _site(path: str, facts: SiteFacts) -> Site:
    """Return a site for writing: a convolution's module carries its kernel's shape, without any data."""
    owner: nn.Module = nn.Module()
    *lead, out, inner = facts.shape
    if facts.kind == "conv":
        channels, *kernel = facts.kernel
        cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(kernel))
        if cls is None or inner != channels * int(torch.tensor(kernel).prod()):
            raise CheckpointError(f"'{path}': kernel {facts.kernel} does not fit {inner} inputs.")
        owner = cls(channels, out, tuple(kernel), device="meta")  # type: ignore[arg-type]
    kind = kind_named(facts.kind)
    return Site(path, kind, owner, owner, "weight", out, inner, lead=tuple(lead))


@contextmanager
def trial_adapter(
    model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], *, trainable: bool = False
) -> Iterator[Adapter]:
    """Let a model carry factors ``{path: {"A", "B"}}`` of scale 1, and nothing else, while the context lasts."""
    from lorry.core.life.api import install
    from lorry.core.life.state import open_state

    state = open_state(model)
    before = state.active

    def value(full: str, spec: TensorSpec) -> Tensor:
        path, _, name = full.rpartition(".")
        return tensors[path][name].clone()

    chosen = [
        (state.sites[p], method_from({"method": "lora", "rank": int(own["A"].shape[-2])})) for p, own in tensors.items()
    ]
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
