"""Offset: any low-rank method less a frozen pair, so that a start that is not zero leaves base and function alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.base import Capability, FuseClass, Method
from lorry.core.method.declared import plain_lora
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import method_from, register
from lorry.core.method.spec import Layout, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("offset", paper="arXiv 2407.05000")
@dataclass(frozen=True)
class Offset(Bottleneck):
    """``ΔW = scale · (B A - B0 A0)``, where A and B are the factors of another method and ``A0, B0`` are frozen.

    Published starts (PiSSA, LoRA-GA, OLoRA and others) put a product that is not zero into the adapter and take it out
    of the base weight, which is then no longer the base of other adapters. Here what is taken out stays with the
    adapter, as the pair that it started from: any number of such adapters share a base, and ``[A; A0]``, ``[B, -B0]``
    is the same update as a plain LoRA of twice the rank. A gain by output channel (DoRA) acts on the sum.

    Use it through a start (``start: lora-ga`` in a job); the start attaches it and sets the pair.
    """

    of: Method | None = option(
        None, "Method whose factors are A and B, as its slug or with its options; LoRA of this rank if not given."
    )
    rank: int = option(8, "Rank of the frozen pair.", at_least=1)

    def check(self) -> None:
        """Build the other method from plain data, and refuse those whose update no frozen pair can take back."""
        if self.of is None:
            object.__setattr__(self, "of", plain_lora(self.rank))
        elif isinstance(self.of, str | Mapping):
            object.__setattr__(self, "of", method_from(self.of))
        assert self.of is not None
        reason = unfit(self.of)
        if reason is not None:
            raise OptionError(f"Offset: {reason}.")

    @property
    def _of(self) -> Bottleneck:
        assert isinstance(self.of, Bottleneck)
        return self.of

    def check_site(self, site: Site) -> None:
        """Let the other method check its options, and refuse one that has such a pair of its own."""
        self._of.check_site(site)
        if self._of.tensors(site).keys() & self._pair(site).keys():
            raise SiteError(
                f"'{site.path}' has the method {type(self.of).__name__}, which has tensors A0 and B0 of its own; put "
                "the offset on plain LoRA."
            )

    def bases(self, site: Site) -> Sequence[Site]:
        """Return what the other method builds on."""
        return self._of.bases(site)

    @property
    def fusing(self) -> FuseClass:
        """The other method's way of fusing."""
        return self._of.fusing

    @property
    def plain(self) -> bool:
        """Whether the other method's update is a plain product."""
        return self._of.plain

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """The other method's, but that the factors are made at each call."""
        return self._of.capabilities - {"stored"}

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """The other method's; the pair sees the same input, so that a start changes nothing in training either."""
        return self._of.dropout

    @property
    def rate_factors(self) -> Mapping[str, float]:  # type: ignore[override]
        """Return the other method's."""
        return self._of.rate_factors

    @property
    def scaled_by_alpha(self) -> bool:
        """Whether the other method's update is."""
        return self._of.scaled_by_alpha

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the other method's tensors, and the frozen ``A0`` and ``B0``."""
        return {**self._of.tensors(site), **self._pair(site)}

    def _pair(self, site: Site) -> dict[str, TensorSpec]:
        return {
            "A0": TensorSpec((*site.lead, self.rank, site.in_features), trained=False),
            "B0": TensorSpec((*site.lead, site.out_features, self.rank), trained=False),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the other method's layout with the pair at each site."""
        other = self._of.layout(sites)
        own = {site.path: {**other.sites[site.path], **self._pair(site)} for site in sites}
        return Layout(own, other.shared, other.sharing)

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Let the other method fill its tensors."""
        self._of.setup(tensors, site, generator)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the other method's factors beside the frozen pair with the opposite sign."""
        a, b = self._of.factors(tensors, site)
        # a model that is cast takes what is trained along, and not the frozen pair
        return torch.cat([a, tensors["A0"].to(a)], dim=-2), torch.cat([b, -tensors["B0"].to(b)], dim=-1)

    def scale(self, site: Site) -> float:
        """Return the other method's."""
        return self._of.scale(site)

    def gain(self, a: Tensor, b: Tensor, tensors: Tensors, site: Site) -> Tensor | None:
        """Return the other method's, for both pairs together."""
        return self._of.gain(a, b, tensors, site)

    def with_options(self, **options: Any) -> Self:
        """Return a copy with some options changed; what is no option of its own is one of the other method's.

        `rank` is that of the frozen pair, since the other method's decides the shapes of its tensors.
        """
        names = {f.name for f in dataclasses.fields(self)}
        inner = {k: v for k, v in options.items() if k not in names}
        own = {k: v for k, v in options.items() if k in names}
        return super().with_options(**own, **({"of": self._of.with_options(**inner).to_dict()} if inner else {}))


def unfit(method: Method) -> str | None:
    """Return why no frozen pair can take back what a method's factors start at, as a sentence without its end; None if
    one can.
    """
    name = type(method).__name__
    if isinstance(method, Offset):
        return f"{name} has a frozen pair already"
    if not isinstance(method, Bottleneck) or not {"plain", "gained"} & method.capabilities:
        return f"{name} has gates, or no product of two factors, so a frozen pair cannot take its start back"
    for acts in ("after_step", "adjust", "penalty", "joint_loss", "apply", "delta"):
        plainly = Bottleneck if acts in ("apply", "delta") else Method
        if getattr(type(method), acts) is not getattr(plainly, acts):
            return f"{name} follows rules of its own ({acts}) that a frozen pair beside its factors would change"
    if method.calibration != "none":
        return f"{name} sets its own tensors from calibration batches"
    return None
