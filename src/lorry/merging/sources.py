"""Where adapters to merge come from: live ones on a model, or directories that are read one site at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.method.base import Method
from lorry.core.method.families import Bottleneck
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.kinds import kind_named
from lorry.core.sites.site import Site
from lorry.formats.info import AdapterFile, read_info
from lorry.formats.parts import Part
from lorry.merging.factors import NUMERICAL_ZERO

AdapterLike = str | os.PathLike[str] | Adapter


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site without its model: kind, ``(*lead, out, in)``, and a convolution's
    ``(channels, *kernel)``.
    """

    kind: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()


class FileSite(Site):
    """A site of a model that is not there: its shape is known, its weight is not."""

    def matrix(self) -> Tensor:
        """Refuse: there is no weight."""
        raise NeedsBase(f"the update at '{self.path}' depends on the base weight")


class NeedsBase(AdapterError):
    """An update cannot be worked out from the file alone."""


@dataclass
class Source(ABC):
    """An adapter to merge.

    Attributes
    ----------
    name
        Under which it takes part; unique in a merge.
    origin
        Where it came from, for the receipt.
    sites
        Path -> facts, for the sites that have an update of a weight.
    whole
        Paths of modules that were trained whole, which no update of a weight describes.
    approximated
        Path -> relative error of the factors, where the update is not a product of thin factors.
    """

    name: str
    origin: str
    method: str
    base: str
    fingerprint: Fingerprint | None
    metadata: Mapping[str, Any]
    sites: dict[str, SiteFacts] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    approximated: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def update(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` in float64, the scale folded into B.

        Raises
        ------
        CheckpointError
            A value is not finite.
        """

    def read(self, path: str) -> tuple[Tensor, Tensor]:
        """Return `update`, checked to be finite and not empty."""
        a, b = self.update(path)
        if not a.numel() or not b.numel():
            raise CheckpointError(
                f"Adapter '{self.name}' ({self.origin}) has empty tensors at '{path}'; nothing was merged."
            )
        # one sum is enough: finite values of single precision do not overflow it, and NaN or infinity stay in it
        if not (torch.isfinite(a.sum()) and torch.isfinite(b.sum())):
            raise CheckpointError(
                f"Adapter '{self.name}' ({self.origin}) holds NaN or infinite values at '{path}'; nothing was "
                "merged. The training "
                "run that wrote it diverged; use an earlier checkpoint."
            )
        return a, b


def exact_factors(method: Method, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor, float]:
    """Return factors of any update that does not depend on the input, and the relative error of the factors.

    ``scale · B A`` is taken as it is. Any other update is decomposed down to rounding (relative 1e-13 in float64), so
    its rank may be as large as the layer.

    Raises
    ------
    AdapterError
        The update depends on the input, with the method's name; `NeedsBase` where the base weight is missing.
    """
    exact = {
        n: t.detach().to("cpu", torch.float64) if t.is_floating_point() else t.detach().cpu()
        for n, t in tensors.items()
    }
    if isinstance(method, Bottleneck) and method.plain:
        a, b = method.factors(exact, site)
        return a, b * method.scale(site), 0.0
    merging = getattr(method, "merging", method.info.merge)
    if merging == "never":
        raise AdapterError(
            f"{type(method).__name__} at '{site.path}' depends on the input of the layer (gates for each token, or "
            "its own forward), so it "
            "has no update of the weight to merge. Serve such adapters side by side instead."
        )
    delta = method.delta(exact, site).double()
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    top = float(s.max()) if s.numel() else 0.0
    # single precision inside a method's own arithmetic leaves noise of that size
    keep = max(
        int((s > max(NUMERICAL_ZERO, 1e-7) * top).flatten(0, -2).any(0).sum())
        if s.ndim > 1
        else int((s > 1e-7 * top).sum()),
        1,
    )
    total = float(s.square().sum())
    lost = float(s[..., keep:].square().sum())
    root = s[..., :keep].sqrt()
    a, b = root.unsqueeze(-1) * vt[..., :keep, :], u[..., :keep] * root.unsqueeze(-2)
    return a, b, (lost / total) ** 0.5 if total else 0.0


class LiveSource(Source):
    """An adapter on a model."""

    def __init__(self, adapter: Adapter, name: str, origin: str = "") -> None:
        super().__init__(
            name,
            origin or f"adapter '{adapter.name}' on {adapter.state.base_name}",
            adapter.method.info.slug,
            adapter.fingerprint.base,
            adapter.fingerprint,
            adapter.metadata,
        )
        self.adapter = adapter
        for path, entry in adapter.entries.items():
            if entry.site.kind.name == "block":
                self.whole.append(path)
            else:
                kernel = entry.site.stored.shape[1:] if entry.site.kind.name == "conv" else ()
                self.sites[path] = SiteFacts(entry.site.kind.name, entry.site.shape, tuple(kernel))
        if not adapter.entries:
            raise AdapterError(f"Adapter '{adapter.name}' has no sites; there is nothing to merge.")

    def update(self, path: str) -> tuple[Tensor, Tensor]:
        """Return the factors at one site."""
        entry = self.adapter.entries[path]
        plain = isinstance(entry.method, Bottleneck) and entry.method.plain
        if self.adapter.state.merged and not plain:
            raise AdapterError(
                f"Adapters are merged into the base ({', '.join(self.adapter.state.merged)}), and the update of "
                f"{type(entry.method).__name__} depends on its weights. Unmerge them first."
            )
        with torch.no_grad():
            a, b, error = exact_factors(entry.method, entry.tensors(), entry.site)
        if not plain:
            self.approximated[path] = error
        return a, b


class FileSource(Source):
    """A saved adapter, read one site at a time."""

    def __init__(self, file: AdapterFile, name: str) -> None:
        super().__init__(
            name,
            str(file.path),
            file.method.info.slug,
            file.base,
            file.fingerprint,
            file.metadata,
            notes=list(file.notes),
        )
        self.file = file
        self._stubs: dict[str, Site] = {}
        for path, part in file.sites.items():
            if part.kind == "block":
                self.whole.append(path)
                continue
            facts = _facts(file, part, path)
            self.sites[path] = facts
            self._stubs[path] = _stub(path, facts)
            self._check(path, part)
        if file.base_copies:
            self.notes.append(f"{len(file.base_copies)} unchanged parameters of the base in the file were left aside")
        if not file.sites:
            raise CheckpointError(f"'{file.path}' has no sites; there is nothing to merge.")

    def _check(self, path: str, part: Part) -> None:
        site = self._stubs[path]
        wanted = {n for n, spec in part.method.layout([site]).sites[path].items() if spec.saved}
        if not wanted <= part.keys.keys() | self.file.shared.keys():
            raise NeedsBase(
                f"'{self.file.path}' lacks {sorted(wanted - part.keys.keys())} of '{path}', which come from the base "
                "weight"
            )

    def update(self, path: str) -> tuple[Tensor, Tensor]:
        """Return the factors at one site."""
        tensors = {n: self.file.read(key) for n, key in self.file.shared.items()} | self.file.tensors(path)
        part = self.file.sites[path]
        a, b, error = exact_factors(part.method, tensors, self._stubs[path])
        if not (isinstance(part.method, Bottleneck) and part.method.plain):
            self.approximated[path] = error
        return a, b


def _facts(file: AdapterFile, part: Part, path: str) -> SiteFacts:
    """Return kind and shape of a site: from the manifest, else from the factors."""
    if file.format in ("kohya",):
        raise NeedsBase(f"'{file.path}' names its layers with underscores, which only the model can resolve")
    key = part.keys.get("A")
    shape_a = file.file.places[key].shape if key is not None else ()
    kernel = tuple(shape_a[1:]) if len(shape_a) > 2 and not file.native else ()
    if part.shape is not None and part.kind is not None:
        return SiteFacts(part.kind, part.shape, kernel if part.kind == "conv" else ())
    if key is None or "B" not in part.keys:
        raise NeedsBase(f"'{file.path}' does not say the shape of '{path}'")
    rank = getattr(part.method, "rank", shape_a[0])
    if part.depth or shape_a[0] != rank or "mid" in part.keys:
        raise NeedsBase(
            f"'{file.path}' holds a bank or a three-step convolution at '{path}', whose layout only the model tells"
        )
    out = file.file.places[part.keys["B"]].shape[0]
    embedding = "lora_embedding" in key
    kind = part.kind or ("embedding" if embedding else "conv" if kernel else "linear")
    inner = 1
    for size in shape_a[1:]:
        inner *= size
    return SiteFacts(kind, (out, inner), kernel)


def _stub(path: str, facts: SiteFacts) -> Site:
    nothing = nn.Module()
    *lead, out, inner = facts.shape
    return FileSite(path, kind_named(facts.kind), nothing, nothing, "weight", out, inner, lead=tuple(lead))


def open_source(item: AdapterLike, name: str, model: nn.Module | None, stack: ExitStack) -> Source:
    """Open an adapter; what its file alone cannot tell is worked out on `model`, where it is loaded until `stack`
    closes.

    Raises
    ------
    AdapterError, CheckpointError
        It depends on its input, or needs a model that was not given; with the reason.
    """
    if isinstance(item, Adapter):
        return LiveSource(item, name)
    file = read_info(item)
    try:
        source = FileSource(file, name)
        for path in source.sites:  # an update that needs the base weight is found out at the first site of each method
            if not isinstance(file.sites[path].method, Bottleneck) or not file.sites[path].method.plain:  # type: ignore[attr-defined]
                source.update(path)
                break
        return source
    except NeedsBase as reason:
        if model is None:
            raise AdapterError(
                f"Adapter '{name}' cannot be merged from its file alone: {reason}. Pass the base model (model=...)."
            ) from None
    from lorry.formats.load import load

    loaded = load(model, item, name=_free_name(model, name), activate=False)
    stack.callback(loaded.detach)
    return LiveSource(loaded, name, origin=str(file.path))


def _free_name(model: nn.Module, name: str) -> str:
    from lorry.core.life.api import adapters

    taken, number = adapters(model), 1
    while f"merge-{number}" in taken:
        number += 1
    return f"merge-{number}"
