"""An adapter as data, without a model: what `lorry.open` gives, and what merging, conversion and inspection work on."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError, near_misses
from lorry.core.life.adapter import Adapter
from lorry.core.life.writers import WRITERS
from lorry.core.method.base import Method
from lorry.core.method.registry import methods
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.site import Site
from lorry.formats.peft_config import PeftConfig
from lorry.formats.registry import LOADERS
from lorry.formats.resize import Changed, rescaled, resized
from lorry.formats.stored import OUT_PROJ_TIMES, StoredSite, canonical, doubled_by_peft, unfolded_mid
from lorry.formats.tensors import Loaded, TensorFile, check_finite
from lorry.formats.updates import NeedsBase, SiteFacts, exact_delta, exact_factors, is_plain, stand_in

#: Formats of `AdapterFile.save` that are one folder, with or without PEFT's names.
FOLDER_FORMATS = ("auto", "peft", "lorry")


@dataclass(eq=False)
class AdapterFile:
    """An adapter without a model, read from a file tensor by tensor, taken from a model, or made by a merge.

    Tensors carry Lorry's names and layout whatever the file's own are: A ``(*lead, rank, in)``, B
    ``(*lead, out, rank)``. Changes are kept in memory; the file on disk stays as it is until `save`. It may be used as
    a context manager, which gives the file back at the end.

    Attributes
    ----------
    name
        Under which it was saved, else the name of its folder.
    method
        The method at most of its sites.
    sites
        Site path -> what is stored there, in the order of the model where the file tells it. Paths of kohya's files
        have underscores for dots; those of a bundle have the root in front.
    format
        The reader's name (``lorry``, ``peft``, ...); ``memory`` for an adapter that is no file. A folder of Lorry's
        that PEFT can load too is ``lorry``.
    path
        Folder or single file, if it is one.
    layout
        How its tensors are laid out: ``lorry``, or ``peft`` for PEFT's, kohya's and diffusers'.
    fingerprint
        Of the base it was made for; None if the file does not say.
    base
        What the base is called; may be empty.
    metadata
        Lineage and training facts; a dict to edit.
    notes
        What the reader should know.
    shared
        Name of each tensor that the sites share -> its name in the file.
    config
        PEFT's config, where it decides how the file is read.
    base_copies
        Parameters of the base that were saved along (PEFT's ``save_embedding_layers``): path -> key.
    targets
        Gives PEFT's config that the sites were chosen by, if there is one.
    flat, pipeline
        Whether paths have underscores for dots; whether the file may hold models that the given one is not.
    loader
        Name of the way onto a model, in `lorry.formats.registry.LOADERS`.
    needs_model
        Why nothing can be said of its sites without a model; empty for almost all.
    root
        The model of an adapter that was taken from one.
    partial
        Whether its file holds other adapters too (a component of a bundle).
    components
        For a bundle, the adapter of each root, by the root's name.
    """

    name: str
    method: Method
    sites: dict[str, StoredSite]
    format: str = "memory"
    path: Path | None = None
    layout: str = "lorry"
    file: TensorFile | None = None
    loaded: Loaded | None = None
    fingerprint: Fingerprint | None = None
    base: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shared: dict[str, str] = field(default_factory=dict)
    shared_values: dict[str, Tensor] = field(default_factory=dict)
    shared_unsaved: frozenset[str] = frozenset()
    config: PeftConfig | None = None
    base_copies: dict[str, str] = field(default_factory=dict)
    targets: Callable[[], Mapping[str, Any]] | None = None
    flat: bool = False
    pipeline: bool = False
    loader: str = "sites"
    needs_model: str = ""
    root: nn.Module | None = None
    partial: bool = False
    components: dict[str, AdapterFile] = field(default_factory=dict)
    _places: dict[str, Site] = field(default_factory=dict, repr=False)

    def __enter__(self) -> AdapterFile:
        """Return the adapter."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Give the file back."""
        self.close()

    def close(self) -> None:
        """Give the file back; tensors that were read stay."""
        if self.file is not None:
            self.file.close()

    def __iter__(self) -> Iterator[str]:
        """Yield the paths of the sites."""
        return iter(self.sites)

    @property
    def where(self) -> str:
        """What errors call the adapter: its path, else its name."""
        return str(self.path) if self.path is not None else f"adapter {self.name}"

    @property
    def methods(self) -> dict[str, Method]:
        """The method at each site."""
        return {p: s.method for p, s in self.sites.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by site path, for the sites whose method has one."""
        return {p: int(s.method.rank) for p, s in self.sites.items() if hasattr(s.method, "rank")}

    @property
    def native(self) -> bool:
        """Whether the tensors of the file lie in Lorry's own layout already."""
        return self.layout == "lorry"

    @property
    def tensor_count(self) -> int:
        """How many tensors it consists of."""
        if self.file is not None and not self.partial:
            return len(self.file.places)
        if self.components:
            return sum(c.tensor_count for c in self.components.values())
        own = sum(len((s.values or s.keys).keys() - s.unsaved) for s in self.sites.values())
        return own + len(self.shared | self.shared_values) - len(self.shared_unsaved)

    def read(self, key: str) -> Tensor:
        """Return one tensor by its name in the file, as the file lays it out."""
        if self.loaded is not None:
            return self.loaded.tensors[key]
        if self.file is None:
            raise CheckpointError(f"'{self.where}' is no file that holds a tensor '{key}'.")
        return self.file.read(key)

    def read_all(self) -> None:
        """Read everything that is still to be read, in one go, and give the file back.

        A component leaves this to its bundle.
        """
        if self.file is not None and self.loaded is None and not self.partial:
            self.loaded = self.file.load()
        for component in self.components.values():
            component.loaded = self.loaded

    def raw_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the file as it names and lays them out; empty for an adapter that is no file."""
        return {} if self.file is None else {name: self.read(name) for name in self.file.places}

    def check_method(self, expect: str | None) -> None:
        """Raise `CheckpointError` unless the adapter is of the method with this slug; None expects nothing."""
        if expect is None:
            return
        if expect not in methods():
            raise CheckpointError(f"There is no method '{expect}'.{near_misses(expect, methods())}")
        slug = self.method.info.slug
        if slug != expect:
            raise CheckpointError(f"'{self.where}' holds an adapter of the method '{slug}', expected was '{expect}'.")

    def check_finite(self) -> None:
        """Raise `CheckpointError` naming the tensors that hold NaN or infinity."""
        if self.loaded is not None:
            self.loaded.check_finite()
        changed = {f"{p}.{n}": t for p, s in self.sites.items() for n, t in (s.values or {}).items()}
        check_finite({**changed, **self.shared_values}, self.where)

    def stored(self, path: str) -> tuple[AdapterFile, StoredSite]:
        """Return what is stored at a site, and the adapter that stores it (a component of a bundle).

        Raises
        ------
        CheckpointError
            There is no such site, with near misses.
        NeedsBase
            Only a model tells the sites.
        """
        if self.needs_model:
            raise NeedsBase(f"'{self.where}': {self.needs_model}")
        found = self.sites.get(path)
        if found is None:
            raise CheckpointError(f"'{self.where}' has no site '{path}'.{near_misses(path, self.sites)}")
        return self.components.get(found.component, self), found

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Return the tensors of one site in Lorry's names and layout, reading no others; see `stored` for errors."""
        owner, stored = self.stored(path)
        lead = stored.shape[:-2] if stored.shape is not None else ()
        return owner.site_tensors(stored, stored.kind, lead)

    def tensor(self, path: str, name: str) -> Tensor:
        """Return one tensor of a site; see `stored` for errors."""
        tensors = self.tensors(path)
        if name not in tensors:
            raise CheckpointError(f"'{self.where}' has no tensor '{name}' at '{path}'; it has {', '.join(tensors)}.")
        return tensors[name]

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that all sites share."""
        there = {n: k for n, k in self.shared.items() if self.file is not None and k in self.file.places}
        return {**{n: self.read(k) for n, k in there.items() if n not in self.shared_values}, **self.shared_values}

    def site_tensors(self, stored: StoredSite, kind: str | None, lead: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors that are stored for a site, given what is known of it."""
        if stored.values is not None:
            return dict(stored.values)
        values = {name: self.read(key) for name, key in stored.keys.items()}
        if self.native or stored.kind == "block":
            return values
        if doubled_by_peft(stored.path, kind):
            values["B"] = values["B"] * OUT_PROJ_TIMES
        mid = values.pop("mid", None)
        if mid is not None:
            values["A"] = unfolded_mid(values["A"], mid)
        for name, value in values.items():
            if value.ndim > 2 or lead:
                values[name] = canonical(name, value, kind, lead)
        return values

    def facts(self, path: str) -> SiteFacts:
        """Return kind and shape of a site: as the file says, else from its factors.

        Raises
        ------
        NeedsBase
            Only the model tells.
        """
        owner, stored = self.stored(path)
        if stored.site is not None:
            kernel = tuple(stored.site.stored.shape[1:]) if stored.site.kind.name == "conv" else ()
            return SiteFacts(stored.site.kind.name, stored.site.shape, kernel)
        a, b = owner._shape_of(stored, "A"), owner._shape_of(stored, "B")
        laid_out = a is not None and len(a) > 2 and not owner.native
        kernel = tuple(a[1:]) if a is not None and laid_out else stored.kernel
        if stored.shape is not None and stored.kind is not None:
            return SiteFacts(stored.kind, stored.shape, kernel if stored.kind == "conv" else ())
        if a is None or b is None or stored.kind == "qkv":
            raise NeedsBase(f"'{self.where}' does not say the shape of '{path}'")
        if stored.parameter or a[0] != getattr(stored.method, "rank", a[0]) or "mid" in stored.keys:
            raise NeedsBase(
                f"'{self.where}' holds a bank or a three-step convolution at '{path}', whose layout only the model "
                "tells"
            )
        embedding = "lora_embedding" in stored.keys["A"]
        kind = stored.kind or ("embedding" if embedding else "conv" if kernel else "linear")
        return SiteFacts(kind, (b[0], math.prod(a[1:])), kernel)

    def _shape_of(self, stored: StoredSite, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor as the file lays it out, without reading it."""
        key = stored.keys.get(name)
        return self.file.places[key].shape if key is not None and self.file is not None else None

    def site(self, path: str) -> Site:
        """Return the site in its model if the adapter was taken from one, else one that stands in for it."""
        _, stored = self.stored(path)
        if stored.site is not None:
            return stored.site
        if path not in self._places:
            self._places[path] = stand_in(path, self.facts(path))
        return self._places[path]

    def all_tensors(self, path: str) -> dict[str, Tensor]:
        """Return the tensors that the method's functions read at a site: its own, and the shared ones."""
        return {**self.stored(path)[0].shared_tensors(), **self.tensors(path)}

    def _all(self, path: str) -> tuple[Method, dict[str, Tensor], Site]:
        """Return what an update is worked out from, or raise `NeedsBase` if something of it is not stored."""
        self.check_complete(path)
        return self.stored(path)[1].method, self.all_tensors(path), self.site(path)

    def check_complete(self, path: str) -> None:
        """Raise `NeedsBase` if a site lacks tensors of its method, which come from the base weight; reads nothing."""
        owner, stored = self.stored(path)
        if stored.method.whole:
            return
        site = self.site(path)
        layout = stored.method.layout([site])
        wanted = {n for n, spec in layout.sites[site.path].items() if spec.saved} | layout.shared.keys()
        have = {*(stored.keys if stored.values is None else stored.values), *owner.shared, *owner.shared_values}
        if not wanted <= have:
            raise NeedsBase(
                f"'{self.where}' lacks {sorted(wanted - have)} of '{path}', which come from the base weight"
            )

    def factors(self, path: str) -> tuple[Tensor, Tensor, float]:
        """Return factors of the update at a site, and their relative error.

        Returns
        -------
        A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` in float64 with the scale folded into B. The error is 0 for
        ``scale · B A``; any other constant update is decomposed down to rounding.

        Raises
        ------
        AdapterError
            The update depends on the input of the layer, or the module was trained whole; `NeedsBase` where the file
            alone does not suffice.
        """
        return exact_factors(*self._all(path))

    def delta(self, path: str) -> Tensor:
        """Return the update of the weight at a site as ``(*lead, out, in)`` in float64; errors as in `factors`."""
        return exact_delta(*self._all(path))

    def plain(self, path: str) -> bool:
        """Whether the update at a site is ``scale · B A`` of stored factors."""
        return is_plain(self.stored(path)[1].method)

    def edit(self, path: str, tensors: Mapping[str, Tensor], method: Method | None = None) -> None:
        """Put other tensors at a site, in Lorry's names and layout; metadata are edited in `metadata` itself.

        Parameters
        ----------
        path
            The site.
        tensors
            By name; those that are not given stay, unless `method` is given, which needs all of its own.
        method
            The method from now on.

        Raises
        ------
        CheckpointError
            A name or a shape is not the method's at this site, or a value is not finite. Nothing is changed then.
        """
        _, stored = self.stored(path)
        chosen = stored.method if method is None else method
        values = dict(tensors) if method is not None else {**self.tensors(path), **tensors}
        if chosen.whole:
            wanted = {n: tuple(t.shape) for n, t in self.tensors(path).items()}
        else:
            site = self.site(path)
            wanted = {n: s.shape for n, s in chosen.layout([site]).sites[site.path].items() if s.saved}
        found = {n: tuple(t.shape) for n, t in values.items()}
        if found != wanted:
            raise CheckpointError(
                f"The tensors of {type(chosen).__name__} at '{path}' must be of the shapes {wanted}, found {found}; "
                "nothing was changed."
            )
        check_finite(values, f"edit of {path}")
        self._change(path, Changed(chosen, {n: t.detach().to("cpu") for n, t in values.items()}))
        self._settle()

    def rescale(self, factor: float) -> Receipt:
        """Multiply the update at every site by a number.

        The number goes into alpha, so plain low rank keeps every byte of its tensors; B changes its sign for negative
        numbers and becomes zero for 0.

        Raises
        ------
        AdapterError
            A site whose update is not proportional to an option alpha, or a module that was trained whole; nothing is
            changed then.
        """
        return self._each("rescale", lambda m, t, s: rescaled(m, t, s, factor))

    def resize(self, rank: int, *, seed: int | None = None) -> Receipt:
        """Give every site another rank, at the same scale; alpha follows.

        A larger rank appends zeros and keeps the function; with a `seed` the rows that are appended to A are drawn as
        LoRA draws them, so that training can use them. A smaller rank is the best approximation (truncated singular
        value decomposition), and the receipt gives its error: that of the low-rank part alone for methods that scale
        the base too (DoRA). Methods that are plain low rank without being LoRA (PiSSA) become LoRA.

        Raises
        ------
        AdapterError
            An update that is no product of two factors, or a rank that does not fit a site; nothing is changed then.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self._each("resize", lambda m, t, s: resized(m, t, s, rank, generator))

    def _each(self, action: str, change: Callable[[Method, dict[str, Tensor], Site], Changed]) -> Receipt:
        """Change all sites that are no whole modules, or none of them."""
        changed: dict[str, Changed] = {}
        notes = []
        for path, stored in self.sites.items():
            if stored.method.whole:
                raise AdapterError(
                    f"'{path}' of '{self.where}' was trained whole, so it has neither scale nor rank to change. "
                    "Nothing was changed."
                )
            owner = self.stored(path)[0]
            if owner.shared or owner.shared_values or stored.method.layout([self.site(path)]).shared:
                raise AdapterError(f"The sites of '{self.where}' share tensors, so none can be changed on its own.")
            changed[path] = change(*self._all(path))
        for path, new in changed.items():
            if not is_plain(new.method) and new.lost:
                notes.append(f"'{path}': the error is that of the low-rank part alone")
            self._change(path, new)
        self._settle()
        lost, size = sum(c.lost for c in changed.values()), sum(c.size for c in changed.values())
        count = sum(len(c.tensors) for c in changed.values())
        worst = max((c.largest for c in changed.values()), default=0.0)
        relative = math.sqrt(lost / size) if size else 0.0
        return Receipt(action, self.name, count, count, len(changed), "unknown", worst, relative, tuple(notes))

    def _change(self, path: str, new: Changed) -> None:
        _, stored = self.stored(path)
        if not stored.method.whole:
            site = self.site(path)
            stored.kind, stored.shape = site.kind.name, site.shape
        stored.method, stored.values = new.method, dict(new.tensors)

    def _settle(self) -> None:
        """Let the method of the whole be the one at most of its sites."""
        for file in (self, *self.components.values()):
            counts = Counter(m for m in file.methods.values() if not m.whole)
            if counts:
                file.method = counts.most_common(1)[0][0]

    def save(self, path: str | os.PathLike[str], *, format: str = "auto", **options: Any) -> Receipt:
        """Write the adapter.

        Parameters
        ----------
        path
            A folder, or a file for the formats of single files.
        format
            ``auto`` (Lorry's folder, in PEFT's form too wherever that is exact), ``lorry``, ``peft``, ``kohya``,
            ``diffusers``, or another one of `lorry.core.life.writers.WRITERS`.
        options
            Of the writer, e.g. ``overwrite``.

        Raises
        ------
        CheckpointError
            There is no such format, it cannot say the adapter, or the disk refuses.
        """
        if format in FOLDER_FORMATS:
            return WRITERS.find("folder")(self, path, format=format, **options)
        return WRITERS.find(format)(self, path, **options)

    def load(self, model: nn.Module, **options: Any) -> Adapter:
        """Load the adapter onto a model; see `lorry.load` for options and errors. It may be loaded several times."""
        adapter = LOADERS.find(self.loader)(self, model, **options)
        assert isinstance(adapter, Adapter)
        return adapter
