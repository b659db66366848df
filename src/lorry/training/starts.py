"""Starts: how an adapter's tensors are set before training, where that is chosen apart from the method.

A start is a frozen dataclass in a file of its own, which registers itself. It may look at calibration batches, by
naming probes (`lorry.core.life.probes`); what they saw of each site is given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, nn

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import LossFn, observe
from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.spec import Observed
from lorry.core.method.start import mix_seed
from lorry.core.options import check_options
from lorry.core.registry import Registry


class Start:
    """How tensors begin. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    #: What it wants to know of the calibration batches.
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)

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
STARTS: Registry[type[Start]] = Registry("start")


def register_start(name: str) -> Callable[[S], S]:
    """Return a decorator that registers a start under a name."""

    def add(cls: S) -> S:
        cls.name = name
        STARTS.add(name, cls)
        return cls

    return add


def apply_start(start: Start, adapter: Adapter, batches: Sequence[Any], loss_fn: LossFn, seed: int) -> None:
    """Set a fresh adapter's tensors, with a look at calibration batches where the start wants one.

    Raises
    ------
    SiteError
        A site that the start or its probes do not know what to do with.
    """
    sites = [entry.site for entry in adapter.entries.values()]
    seen = observe(adapter, {name: sites for name in start.probes}, batches, loss_fn) if start.probes else {}
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            generator = torch.Generator().manual_seed(mix_seed(seed, start.name, path))
            start.set(entry, {name: found[path] for name, found in seen.items()}, generator)
    adapter.metadata["start"] = start.name


def factor(entry: Entry, name: str) -> nn.Parameter:
    """Return a factor of a plain low-rank method at a site.

    Raises
    ------
    SiteError
        The method there has no such factor of its own.
    """
    tensor = entry.home.tensors().get(name)
    if not (isinstance(entry.method, Bottleneck) and entry.method.plain and isinstance(tensor, nn.Parameter)):
        raise SiteError(
            f"'{entry.site.path}' has the method {entry.method.info.slug}, whose tensor {name} this start cannot set; "
            "it takes plain low-rank methods."
        )
    return tensor


@register_start("orthogonal")
@dataclass(frozen=True)
class Orthogonal(Start):
    """The rows of A are orthogonal, with the norm that the method's own start has in the mean."""

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Draw the rows of A."""
        a = factor(entry, "A")
        check_rank(entry.site, len(a))
        drawn = torch.linalg.qr(torch.randn(a.shape[::-1], generator=generator))[0].mT
        a.copy_((drawn * a.norm(dim=-1).mean().cpu()).to(a))


@register_start("input-directions")
@dataclass(frozen=True)
class InputDirections(Start):
    """The rows of A are the principal directions of the layer's inputs, as EVA has them, without moving ranks."""

    probes: ClassVar[tuple[str, ...]] = ("input",)

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Set the rows of A by decreasing variance; rows for which there is no direction stay as they are."""
        a, rows = factor(entry, "A"), seen["input"].inputs
        assert rows is not None
        directions = torch.linalg.svd(rows, full_matrices=False)[2][: len(a)]
        a[: len(directions)] = directions.to(a)
