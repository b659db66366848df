"""BitFit: trained biases, alone or beside another method at the same layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.base import Capability, FuseClass, Method
from lorry.core.method.call import Call
from lorry.core.method.registry import method_from, register
from lorry.core.method.spec import Layout, Places, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("bitfit", paper="arXiv 2106.10199", kinds=lambda kind: kind.additive and not kind.whole and not kind.indexed)
@dataclass(frozen=True)
class BitFit(Method):
    """``y = base(x) + update(x) + Δb`` with Δb ``(out,)`` zero at the start (section 2); the update is that of the
    method that it stands beside.

    A layer without a bias gets one while the adapter applies.

    Use it where almost nothing may be trained, or beside a method of weights whose layers have biases worth moving.
    """

    family: ClassVar[str] = "bias"

    beside: Method | None = option(None, "Method that acts at the same layers, as its slug or with its options.")

    def check(self) -> None:
        """Build the other method from plain data, and refuse those that run a module or combine adapters."""
        if isinstance(self.beside, str | Mapping):
            object.__setattr__(self, "beside", method_from(self.beside))
        if self.beside is not None and {"block", "combined"} & self.beside.capabilities:
            name = type(self.beside).__name__
            raise OptionError(f"BitFit: no bias can be trained beside {name}, which gives no update of a layer's own.")

    def check_site(self, site: Site) -> None:
        """Let the other method check its options."""
        if self.beside is not None:
            self.beside.check_site(site)

    def bases(self, site: Site) -> Sequence[Site]:
        """Return what the other method builds on."""
        return [site] if self.beside is None else self.beside.bases(site)

    @property
    def fusing(self) -> FuseClass:
        """The other method's way of merging."""
        return self.info.fuse if self.beside is None else self.beside.fusing

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """Of the other method's, whether there is an update of the weight: what is faster leaves the bias out."""
        other: frozenset[Capability] = frozenset({"delta"}) if self.beside is None else self.beside.capabilities
        kept: frozenset[Capability] = frozenset({"delta", "gated"})
        return other & kept

    @property
    def rate_factors(self) -> Mapping[str, float]:  # type: ignore[override]
        """Return the other method's."""
        return {} if self.beside is None else self.beside.rate_factors

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return Δb as ``bias``, and the other method's tensors."""
        return {**({} if self.beside is None else self.beside.tensors(site)), **self._bias(site)}

    def _bias(self, site: Site) -> dict[str, TensorSpec]:
        return {"bias": TensorSpec((site.out_features,))}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the other method's layout with a bias at each site."""
        if self.beside is None:
            return super().layout(sites)
        other = self.beside.layout(sites)
        own = {site.path: {**other.sites[site.path], **self._bias(site)} for site in sites}
        return Layout(own, other.shared, other.sharing)

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Let the other method fill its tensors."""
        if self.beside is not None:
            self.beside.setup(tensors, site, generator)

    def after_step(self, tensors: Tensors, site: Site, record: Mapping[str, Tensor]) -> None:
        """Let the other method follow the step."""
        if self.beside is not None:
            self.beside.after_step(tensors, site, record)

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Let the other method follow the step."""
        if self.beside is not None:
            self.beside.adjust(places, step, total)

    def penalty(self, places: Places) -> Tensor | None:
        """Return the other method's."""
        return None if self.beside is None else self.beside.penalty(places)

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the other method's update, and Δb at every position."""
        site, kind = call.site, call.site.kind
        bias = tensors["bias"].to(call.output.dtype)
        if self.beside is None:
            return kind.channels_back(site, bias.expand_as(kind.channels_last(site, call.output)))
        update = self.beside.apply(call, tensors)
        return kind.channels_back(site, kind.channels_last(site, update) + bias)

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the other method's update of the weight."""
        if self.beside is None:
            return tensors["bias"].new_zeros(site.shape)
        return self.beside.delta(tensors, site)

    def bias_delta(self, tensors: Tensors, site: Site) -> Tensor | None:
        """Return Δb."""
        return tensors["bias"]

    def to_dict(self) -> dict[str, Any]:
        """Return slug and options; the other method as plain data."""
        return {"method": self.info.slug, "beside": None if self.beside is None else self.beside.to_dict()}
