"""Starts: how an adapter's tensors are set before training, where that is chosen apart from the method.

A start is a frozen dataclass in a file of its own, which registers itself. It may look at calibration batches, by
naming probes (`lorry.core.life.probes`); what they saw of each site is given to it. It sets A and B and thinks of
nothing else: where their product is not zero, `apply_start` gives the adapter a frozen pair that takes it back
(`lorry.methods.offset`), so that the function is unchanged, and so is the base, which other adapters may share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import LossFn, exchange_method, observe, replace_entry
from lorry.core.method.base import Method
from lorry.core.method.families import Bottleneck
from lorry.core.method.spec import Observed
from lorry.core.method.start import mix_seed
from lorry.core.options import check_options
from lorry.core.registry import Registry
from lorry.core.sites.site import Site
from lorry.methods.offset import Offset, unfit


class Start:
    """How tensors begin. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    #: Reference of what published it, e.g. ``arXiv 2407.05000``.
    paper: ClassVar[str] = ""
    #: What it wants to know of the calibration batches.
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check every option against its declared range, then the rules between options."""
        check_options(self)
        self.check()

    def check(self) -> None:
        """Check rules between options; raise `OptionError` with the rule and the values."""
        return

    @property
    def keeps_function(self) -> bool:
        """Whether the adapter leaves the model's function unchanged at the start: what it sets is taken back by a
        frozen pair then.
        """
        return True

    def check_entry(self, entry: Entry) -> None:
        """Refuse a site whose method the start cannot set, before any data is looked at; raise `SiteError` with the
        reason.
        """
        return

    def components(self, sites: Sequence[Site]) -> int:
        """Return how many directions of inputs the probes keep for each of these sites."""
        return 256

    def probe_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Return options of the probes by their names, where they have any."""
        return {}

    def allocate(self, entries: Mapping[str, Entry], seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the sites whose options change (ranks) with the method there from now on; None leaves a site out.

        Parameters
        ----------
        entries
            Site path -> the site, with its method.
        seen
            Site path -> what the first of `probes` saw.
        """
        return {}

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Set the tensors of a site in place.

        Parameters
        ----------
        entry
            The site, its method, and its tensors as the method starts them.
        seen
            Probe -> what it saw of the site, on the CPU in float32.
        generator
            Source of randomness; the same for the same seed and site.
        """
        raise NotImplementedError


S = TypeVar("S", bound=type[Start])
STARTS: Registry[type[Start]] = Registry("start", "`lorry methods --kind start` lists them.")
STARTS.source(__name__, __path__)


def register_start(name: str, *, paper: str = "") -> Callable[[S], S]:
    """Return a decorator that registers a start under a name, with the reference of what published it."""
    return STARTS.named(name, paper=paper)


def apply_start(start: Start, adapter: Adapter, batches: Sequence[Any], loss_fn: LossFn, seed: int) -> None:
    """Set a fresh adapter's tensors, with a look at calibration batches where the start wants one.

    Parameters
    ----------
    start
        The start.
    adapter
        Just attached. Where the start makes a product that is not zero, its method becomes
        `lorry.methods.offset.Offset` of what it was.
    batches
        A few batches; each counts the same. A start without probes looks at none.
    loss_fn
        Called with the model and a batch; returns the scalar loss.
    seed
        Of all that is drawn; the same seed gives the same tensors.

    Raises
    ------
    AdapterError
        The start wants calibration batches and there are none.
    SiteError
        A site whose method has no tensors that the start could set, or that its probes do not know what to do with.
        The adapter is to be detached then.
    """
    entries = adapter.entries
    for entry in entries.values():
        start.check_entry(entry)
    if start.probes and not len(batches):
        raise AdapterError(
            f"The start '{start.name}' looks at calibration batches ({', '.join(start.probes)}), and there are none. "
            "Give training data, or take a start that needs none (kaiming, orthogonal, pissa)."
        )
    seen: Mapping[str, Mapping[str, Observed]] = {}
    if start.probes:
        probes = dict.fromkeys(start.probes, sites := [entry.site for entry in entries.values()])
        options, components = start.probe_options(), start.components(sites)
        seen = observe(adapter, probes, batches, loss_fn, components=components, options=options)
        _exchange(adapter, start.allocate(entries, seen[start.probes[0]]), seed)
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            generator = torch.Generator().manual_seed(mix_seed(seed, start.name, path))
            start.set(entry, {name: found[path] for name, found in seen.items()}, generator)
        if start.keeps_function:
            _take_back(start, adapter)
    adapter.metadata["start"] = start.name
    adapter.state.changed()


def _exchange(adapter: Adapter, changes: Mapping[str, Method | None], seed: int) -> None:
    """Give sites another method (another rank), with tensors that start as it starts them."""
    if not changes:
        return
    was = adapter.trainable
    adapter.train(False)
    for path, method in changes.items():
        exchange_method(adapter, path, method, seed)
    adapter.train(was)


def _take_back(start: Start, adapter: Adapter) -> None:
    """Give each site whose product is not zero a frozen pair with the same product."""
    changed: dict[str, tuple[Method, dict[str, Tensor]]] = {}
    for path, entry in adapter.entries.items():
        method = entry.method
        if not isinstance(method, Bottleneck) or "B" not in entry.home.tensors() or unfit(method) is not None:
            continue
        a, b = (t.detach().clone() for t in method.factors(entry.tensors(), entry.site))
        if bool(a.any()) and bool(b.any()):
            tensors = {**entry.home.tensors(), "A0": a, "B0": b}
            changed[path] = (Offset(of=method, rank=a.shape[-2]), tensors)
    if not changed:
        return
    was = adapter.trainable
    adapter.train(False)
    for path, (method, tensors) in changed.items():
        replace_entry(adapter, path, method, tensors)
    adapter.train(was)
    adapter.method = Counter(e.method for e in adapter.entries.values()).most_common(1)[0][0]


class LowRankStart(Start):
    """A start of the factors A and B of low-rank methods; subclasses give `factors`."""

    #: Whether the product B A may be another than zero, which only methods without gates can take back.
    product: ClassVar[bool] = True

    def check_entry(self, entry: Entry) -> None:
        """Refuse a method without such factors."""
        low_rank(entry, self)

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Set A and B; what `factors` gives may have fewer rank units, and the rest stays as the method starts it."""
        for own, value in zip(low_rank(entry, self), self.factors(entry, seen, generator), strict=True):
            by_rank = own if value.shape[-1] == own.shape[-1] else own[..., : value.shape[-1]]
            by_rank[..., : value.shape[-2], :].copy_(value.to(own))

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Return A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` as they start; arguments are those of `set`."""
        raise NotImplementedError


def low_rank(entry: Entry, start: LowRankStart) -> tuple[Tensor, Tensor]:
    """Return A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` of a low-rank method at a site, to be set in place.

    Parameters
    ----------
    entry
        The site.
    start
        Who asks.

    Raises
    ------
    SiteError
        The method there has no such factors of its own, or cannot take the product back; with the reason.
    """
    method, site = entry.method, entry.site
    tensors, specs = entry.home.tensors(), entry.home.specs
    where = f"'{site.path}' has the method {method.info.slug}, which cannot begin with the start '{start.name}': "
    if not isinstance(method, Bottleneck):
        raise SiteError(f"{where}it has no factors A and B. Take a low-rank method, or no start.")
    a, b = tensors.get("A"), tensors.get("B")
    wanted = None if a is None or a.ndim < 2 else (*site.lead, a.shape[-2], site.in_features)
    fits = a is not None and b is not None and a.shape == wanted
    if not fits or b is None or a is None or b.shape != (*site.lead, site.out_features, a.shape[-2]):
        raise SiteError(
            f"{where}it has no A of (rank, in) and B of (out, rank) as its own. Take LoRA, DoRA or LoRA-FA."
        )
    if {"A0", "B0"} & tensors.keys():
        raise SiteError(f"{where}it has a start of its own. Take the method lora with this start.")
    if not start.product and not specs["B"].trained:
        raise SiteError(f"{where}B is zero then, and the method never trains it. Take a start of both factors.")
    if start.product and start.keeps_function:
        reason = unfit(method)
        if reason is not None:
            raise SiteError(f"{where}{reason}. Take LoRA, DoRA or LoRA-FA, or a start whose B is zero.")
    return a, b


def scale_of(entry: Entry) -> float:
    """Return the factor of B A in the update at a site."""
    assert isinstance(entry.method, Bottleneck)
    return entry.method.scale(entry.site)


def rank_of(entry: Entry) -> int:
    """Return the rank of the factors at a site."""
    return int(entry.home.tensors()["A"].shape[-2])
