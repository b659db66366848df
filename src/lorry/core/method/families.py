"""The families of methods; what can be derived from a method's mathematics is derived here, once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorry.core.errors import AdapterError, SiteError
from lorry.core.method.base import Capability, FuseClass, Method
from lorry.core.method.call import Call
from lorry.core.method.spec import Tensors
from lorry.core.sites.site import Site
from lorry.kernels.products import emulated

#: Weight -> site path -> by what one sees that it is the same, and the squared norms of its channels.
_NORMS: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Bottleneck(Method):
    """``y = base(x) + scale · bend(up(mid(down(x))))``; `mid` and `bend` are the identity unless they are overridden.

    A method gives `tensors` and, where they differ from LoRA's, `factors` and `scale`. A constant between the factors
    (a diagonal, a core matrix) belongs into `factors`: it keeps the update linear, so it fuses and exports exactly.
    What depends on the token (gates, top-k, masks, curves) goes into `mid`, or into `bend` if it acts on the layer's
    output instead of the rank units, and the method never fuses, except for options under which `constant` holds (every
    expert active). `mid` may return another number of rank units than it was given: a router's rows can be stacked
    under A, so that both see the same input.
    """

    family: ClassVar[str] = "bottleneck"
    #: Fraction of input elements dropped in training; methods with an option of this name shadow it.
    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive how the method fuses from whether it overrides `mid` or `bend`."""
        super().__init_subclass__(**kwargs)
        if cls.mid is not Bottleneck.mid or cls.bend is not Bottleneck.bend:
            cls.family = "bottleneck, mid per token"
            cls.fuses = "never"

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A ``(*lead, rank, in)`` and B ``(*lead, out, rank)``."""
        return tensors["A"], tensors["B"]

    def scale(self, site: Site) -> float:
        """Return the constant factor of the update."""
        return 1.0

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return what the rank units ``h`` ``(..., rank)`` become for this call's tokens."""
        return h

    def bend(self, update: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return what the update becomes before it is scaled, in the layer's output layout."""
        return update

    def gain(self, a: Tensor, b: Tensor, tensors: Tensors, site: Site) -> Tensor | None:
        """Return a factor for each output channel of base and update together (DoRA), or None."""
        return None

    @property
    def constant(self) -> bool:
        """Whether the update is the same for every token; a method that gates tokens may be so in a limit."""
        return type(self).mid is Bottleneck.mid and type(self).bend is Bottleneck.bend

    @property
    def fusing(self) -> FuseClass:
        """How the method fuses with these options: exactly in a limit in which the gates are constant."""
        return "exact" if self.info.fuse == "never" and self.constant else self.info.fuse

    def check_site(self, site: Site) -> None:
        """Refuse gates per token where the update can only be applied as a whole."""
        if not self.constant and not site.kind.additive:
            raise SiteError(
                f"{type(self).__name__} has gates for each token, but a larger module uses the weight of '{site.path}' "
                f"({site.kind.name}) itself and takes a dense update only. Leave it out."
            )

    @property
    def plain(self) -> bool:
        """Whether the update is exactly ``scale · B A``: constant, and without an output gain."""
        return self.constant and type(self).gain is Bottleneck.gain

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """Derived from what is overridden; a method that is constant, but says it is not plain, computes its own way
        (it withholds a gradient, or leaves a loss).
        """
        cls = type(self)
        if not self.constant:
            return frozenset({"gated"})
        found: set[Capability] = {"delta"}
        if self.plain:
            found.add("plain")
        elif cls.gain is not Bottleneck.gain:
            found.add("gained")
        if cls.factors is Bottleneck.factors:
            found.add("stored")
        return frozenset(found)

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output."""
        site, kind = call.site, call.site.kind
        a, b = self.factors(tensors, site)
        x, dtype = call.dropout(self.dropout), call.output.dtype
        if x.is_floating_point() and x.dtype != dtype:
            x = x.to(dtype)
        scale = self.scale(site)
        if self.constant and not kind.factors_apply(site):
            update = kind.dense(site, x, (b @ a).mul(scale).to(dtype))
        else:
            h = self.mid(kind.down(site, x, a.to(dtype)), call, tensors)
            if type(self).bend is not Bottleneck.bend:
                return self.bend(kind.up(site, h, b.to(dtype)), call, tensors) * scale
            update = kind.up(site, h if scale == 1.0 else h * scale, b.to(dtype))
        gain = self.gain(a, b, tensors, site)
        return update if gain is None else _with_gain(call, update, gain)

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``scale · B A``, with DoRA's gain ``g ⊙ (W + ΔW) - W``, as ``(*lead, out, in)`` in float32 or
        better.
        """
        self._needs_constant(site)
        a, b = self.factors(tensors, site)
        exact = torch.promote_types(a.dtype, torch.float32)
        update = (
            (b.to(exact) @ a.to(exact)).mul_(self.scale(site)) if not _tracked(a, b) else (b @ a) * self.scale(site)
        )
        gain = self.gain(a, b, tensors, site)
        if gain is None:
            return update
        weight = site.matrix().to(update)
        return gain.to(update).unsqueeze(-1) * (weight + update) - weight

    def _needs_constant(self, site: Site) -> None:
        if not self.constant:
            raise AdapterError(
                f"{type(self).__name__} has no weight update at '{site.path}': its gates depend on the token, so it "
                "can neither be fused nor exported as a plain LoRA with these options. Serve it unfused."
            )


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _with_gain(call: Call, update: Tensor, gain: Tensor) -> Tensor:
    """Return ``(g - 1) ⊙ (y - bias) + g ⊙ update``, so that adding it to y scales base and update together."""
    kind, site = call.site.kind, call.site
    base, bias = kind.channels_last(site, call.output), kind.bias(site)
    base = base if bias is None else base - bias
    # what is added to y has the relative error of g - 1 and not of g, so that a gain near 1 costs no precision
    more, gain = (gain - 1).to(base.dtype), gain.to(base.dtype)
    result = more * base + gain * kind.channels_last(site, update)
    return kind.channels_back(site, result)


class WeightDelta(Method):
    """An update of the weight that is not a product of two thin factors (SHiRA, LoHa, LoKr).

    A method gives `tensors` and `delta`; it may override `bypass` where applying the update to x is cheaper than
    building it.
    """

    family: ClassVar[str] = "weight delta"
    dropout: float = 0.0

    @abstractmethod
    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the update of the weight as ``(*lead, out, in)``."""

    def sparse(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """Return flat positions in ``(*lead, out, in)`` and values if the update is zero elsewhere; see
        `lorry.core.life.switch`.
        """
        return None

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """Derived from what is overridden."""
        cls = type(self)
        found: set[Capability] = {"delta"}
        if cls.sparse is not WeightDelta.sparse:
            found.add("sparse")
        if cls.apply is WeightDelta.apply and (cls.bypass is WeightDelta.bypass or "sparse" in found):
            found.add("summed")
        return frozenset(found)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``ΔW x`` in the layer's output layout."""
        return site.kind.dense(site, x, self.delta(tensors, site).to(x.dtype if x.is_floating_point() else None))

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output."""
        x = call.dropout(self.dropout)
        if x.is_floating_point() and x.dtype != call.output.dtype:
            x = x.to(call.output.dtype)
        return self.bypass(x, tensors, call.site).to(call.output.dtype)


class Block(Method):
    """A method that takes over the forward of a whole module (a mixture of experts in place of a feed-forward
    block).
    """

    family: ClassVar[str] = "block"
    fuses: ClassVar[FuseClass] = "never"

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """It runs a whole module."""
        return frozenset({"block"})

    @abstractmethod
    def forward(self, base: Callable[..., Any], call: Call, tensors: Tensors, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; `base` runs the module as it is on the same arguments."""

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Not used: a block has its own forward."""
        raise AdapterError(f"{type(self).__name__} is a block method; it has no update of a layer's output.")


class Combiner(Method):
    """A method that makes one update of those of other adapters at the same site (a gate over adapters).

    It is attached like any adapter, on the sites where its members sit; its tensors are trained and saved like any
    other's. A method gives `tensors`, `members` (an option, usually) and `combine`.

    A pass may say other members: ``lorry.context(model, combined={combiner: members})``, where `members` are names, or
    name -> weight; a weight is a number, or a tensor ``(rows,)`` of one for each row of the batch (0: not in this row).
    An adapter of which the pass says so, and which does not sit on a site of the combiner, adds nothing there.
    """

    family: ClassVar[str] = "combiner"
    fuses: ClassVar[FuseClass] = "never"

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """It reads other adapters, token by token."""
        return frozenset({"combined", "gated"})

    @abstractmethod
    def combine(self, call: Call, updates: Mapping[str, Tensor], tensors: Tensors) -> Tensor:
        """Return the update of the layer's output, given that of each member, in the layer's output layout."""

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output."""
        asked = call.context.values.get("combined", {}).get(call.adapter, self.members)
        weights = asked if isinstance(asked, Mapping) else dict.fromkeys(asked, 1.0)
        return self.combine(call, {name: _weighted(call, name, w) for name, w in weights.items()}, tensors)

    def check_site(self, site: Site) -> None:
        """Refuse sites where updates of the output cannot be told apart."""
        if not site.kind.additive:
            raise SiteError(
                f"{type(self).__name__} needs the update of each adapter apart, but a larger module uses the weight of "
                f"'{site.path}' ({site.kind.name}) itself. Leave the site out."
            )


def _weighted(call: Call, name: str, weight: float | Tensor) -> Tensor:
    """Return the update of a combiner's member under its weight."""
    assert call.update_of is not None
    update = call.update_of(name)
    if not isinstance(weight, Tensor):
        return update if weight == 1.0 else update * weight
    if not weight.ndim:
        return update * weight.to(update)
    each = call.of_rows(weight)
    assert each is not None
    return update * each.to(update.dtype).view(-1, *[1] * (update.ndim - 1))


def _squares(site: Site, weight: Tensor) -> Tensor:
    """Return the squared norms of the channels of the base weight, kept for as long as the weight is the same."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    stored = site.stored
    if torch.compiler.is_compiling() or stored.is_inference():  # whose changes are not counted
        return torch.linalg.vector_norm(weight, dim=-1, dtype=exact).square()
    kept = _NORMS.setdefault(stored, {})
    found = kept.get(site.path)
    # a parameter that was cast or moved keeps its identity and counts no write
    now = (stored._version, stored.dtype, weight.data_ptr())
    if found is None or found[0] != now:
        squares = torch.linalg.vector_norm(weight, dim=-1, dtype=exact).square()
        found = kept[site.path] = (now, squares)
    return found[1]


def norms_of_sum(site: Site, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Return the norm of each output channel of ``W + scale · B A`` as ``(*lead, out)``, from the factors.

    ``‖w + s b A‖² = ‖w‖² + 2 s b·(A wᵀ) + s² b (A Aᵀ) bᵀ``: no dense update, and ‖w‖² is worked out once for each
    weight.
    """
    weight = site.matrix()
    squares = _squares(site, weight)
    if a is None or b is None:
        return squares.sqrt()
    # what is trained is rounded to the weight's type in the layer's own products too, and a copy of the weight in
    # float32 for each step would cost more than they do; a frozen adapter gets its norms in full
    rounded = (a.requires_grad or b.requires_grad) and weight.dtype == torch.bfloat16 and not emulated(weight)
    a, b = a.detach(), b.detach()
    exact = torch.promote_types(a.dtype, squares.dtype)
    kind = weight.dtype if rounded else exact
    # rank units in rows, so that the products run along contiguous memory
    cross = (a.to(kind) @ weight.to(kind).mT).to(exact)
    a, bt = a.to(exact), b.to(exact).mT
    terms = cross.mul_(2 * scale).add_(a @ a.mT @ bt, alpha=scale**2).mul_(bt)
    return (terms.sum(-2) + squares).clamp_min_(0).sqrt_()


def check_rank(site: Site, rank: int, name: str = "rank") -> None:
    """Raise `SiteError` for a rank above the width of the layer: the product could not use it."""
    most = min(site.out_features, site.in_features)
    if rank > most:
        shape = f"{site.out_features} x {site.in_features}"
        raise SiteError(f"'{site.path}' is {shape}: {name} must be at most {most}, found {rank}.")
