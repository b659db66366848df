"""Fast paths of linear layers: one operation for all low-rank updates of a batch, or one product with ``W + ΔW``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorry.core.forward.active import Active, Term, Terms
from lorry.core.forward.entry import Entry
from lorry.core.forward.layer import Base, Layer, seed_of
from lorry.core.forward.weights import BySite
from lorry.core.method.families import Bottleneck, WeightDelta
from lorry.kernels.gathered import Prepared, stack, worth_stacking
from lorry.kernels.lowrank import low_rank_linear
from lorry.kernels.products import autocasts
from lorry.kernels.ready import ReadyLinear
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.sparse import changed_linear

#: Under which a path keeps what it made for a site while a composition lasts, or finds what others made (`Prepared`).
STACKED = "stacked"


def stacked(layer: Layer, base: Base, active: Active, x: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    """Return the output by factors that were stacked for this batch before, or None where they do not serve."""
    found: Prepared | None = active.kept.get((STACKED, layer.sites[0].path))
    if found is None or torch.is_grad_enabled() or layer.owner.training or not found.serves(x):
        return None
    return _add_stacked(found, base, x, args, kwargs)


class _Ready:
    """A layer made ready with its adapter, and by what one sees that both are still the same."""

    __slots__ = ("bias", "entry", "made", "marks", "weight")

    def __init__(self, made: ReadyLinear, entry: Entry, owner: nn.Module, derived: Sequence[Tensor]) -> None:
        self.made, self.entry = made, entry
        self.weight, self.bias = owner._parameters["weight"], owner._parameters["bias"]
        # what was worked out from tensors follows their changes in place; without a gain nothing was
        self.marks = tuple((t, t._version, t.dtype) for t in derived)

    def holds(self, owner: nn.Module) -> bool:
        """Whether nothing was exchanged or changed; asked at every call."""
        own, home = owner._parameters, self.entry.home
        if own["weight"] is not self.weight or own["bias"] is not self.bias:
            return False
        if home.keeper is not None or home.registered:  # whoever moves or exchanges its tensors is asked for them
            return self.made.fresh(self.weight, self.bias, *home.ready().values())  # type: ignore[arg-type]
        for tensor, version, kind in self.marks:
            if tensor._version != version or tensor.dtype is not kind:
                return False
        return True


def ready(layer: Layer, active: Active, x: Tensor) -> Tensor | None:
    """Return the output of a frozen layer with one adapter on all rows, by what was made ready for it; or None where
    that does not serve.
    """
    owner = layer.owner
    if owner.training:
        return None
    found: _Ready | Literal[False] | None = active.ready.get(layer.path)
    if found is None or (found and not found.holds(owner)):
        found = active.ready[layer.path] = _made_ready(layer, active, x)
    if not found or not found.made.serves(x) or "weight" in owner.__dict__:
        return None
    return None if torch._C._is_any_autocast_enabled() else found.made(x)


def _made_ready(layer: Layer, active: Active, x: Tensor) -> _Ready | Literal[False]:
    """Return a layer made ready with its adapter, or False where another path is needed."""
    site, owner = layer.sites[0], layer.owner
    portions = [p for p in active.portions if site.path in p.adapter.entries and not p.adapter.in_base]
    if len(portions) != 1 or active.layout is not None or active.by_kind or not site.kind.plain_product:
        return False
    (portion,), weight = portions, portions[0].weight
    while isinstance(weight, BySite):
        weight = weight.of(site)
    entry = portion.adapter.entries[site.path]
    able, alone = entry.method.capabilities, isinstance(weight, float) and weight == 1.0 and active.exclusive
    direct = "stored" in able and ("plain" in able or ("gained" in able and alone))
    if not direct or not isinstance(weight, float) or entry.shared is not None:
        return False
    if not layer.plain_linear or not _fusable(owner, x):
        return False
    entry.move(x.device)
    method, tensors = cast(Bottleneck, entry.method), entry.home.ready()
    a, b = method.factors(tensors, site)
    gain = None if "plain" in able else method.gain(a, b, tensors, site)
    if gain is None and set(tensors) != {"A", "B"}:
        return False
    bias = cast(Tensor | None, owner.bias)
    sources = [t for name, t in tensors.items() if name not in ("A", "B")]
    made = ReadyLinear(cast(Tensor, owner.weight), bias, a, b, weight * method.scale(site), gain, sources)
    derived = [] if gain is None else [made_from for made_from in (owner.weight, *tensors.values())]
    if any(cast(Tensor, t).is_inference() for t in derived):  # changes of these are not counted
        return False
    return _Ready(made, entry, owner, cast(list[Tensor], derived))


def fused(layer: Layer, base: Base, active: Active, terms: Terms, x: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    """Return the output by one operation, or None where the general path is needed."""
    if not terms.each or not layer.sites[0].kind.plain_product or not x.is_floating_point():
        return None
    if not all(term.constant for term in terms.each):
        return None
    if terms.tokens and (args[1:] or kwargs):
        return None
    dense = layer.plain_linear and len(args) + len(kwargs) == 1 and _fusable(layer.owner, x)
    if all({"plain", "gained"} & t.entry.method.capabilities for t in terms.each):
        return _low_rank(layer, base, active, terms, x, args, kwargs, dense)
    if dense and _whole(terms.each):
        return _summed(terms.each[0], x)
    return None


def _low_rank(
    layer: Layer, base: Base, active: Active, terms: Terms, x: Tensor, args: Any, kwargs: Any, dense: bool
) -> Tensor | None:
    """Run low-rank updates by one fused operation for all rows, or return None where a method has its own way of
    computing (a gain beside other adapters, a gradient withheld, a loss to leave).
    """
    owner, tokens = layer.owner, x.reshape(-1, x.shape[-1]) if terms.tokens else x
    segments, factors, frozen = [], [], True
    for term in terms.each:
        method, site = cast(Bottleneck, term.entry.method), term.entry.site
        able, tensors = method.capabilities, term.entry.tensors()
        alone = dense and active.exclusive and term.weights is None and term.weight == 1.0
        if "plain" not in able and not (alone and "gained" in able):
            return None
        p = method.dropout if owner.training else 0.0
        a, b = method.factors(tensors, site)
        gain = None if "plain" in able else method.gain(a, b, tensors, site)
        scale = cast(float, term.weight) * method.scale(site)
        segments.append(Segment(term.rows, scale, p, seed_of(term) if p else 0, term.weights))
        factors.append(LowRankPair(a, b, gain))
        frozen = frozen and term.entry.frozen
    # one composition for all rows is asked for with every length; only rows of their own last as they are
    lasting = frozen and active.layout is not None and not terms.tokens and not active.varying
    if lasting and not torch.is_grad_enabled() and worth_stacking(x, segments, factors):
        dtype = x.dtype if not autocasts(x) else torch.get_autocast_dtype(x.device.type)
        made = active.kept[STACKED, layer.sites[0].path] = stack(x, segments, factors, dtype)
        return _add_stacked(made, base, x, args, kwargs)
    if dense:
        weight, bias = cast(Tensor, owner.weight), cast(Tensor | None, owner.bias)
        result = low_rank_linear(tokens, weight, bias, None, segments, factors, active.plans)
    else:
        output = base(*args, **kwargs)
        flat = output.reshape(-1, output.shape[-1]) if terms.tokens else output
        result = low_rank_linear(tokens, None, None, flat, segments, factors, active.plans)
    return result.view(*x.shape[:-1], result.shape[-1]) if terms.tokens else result


def _summed(term: Term, x: Tensor) -> Tensor | None:
    """Run one weight update of all rows as a product with ``W + ΔW``, or return None where the sum would round it
    away.
    """
    entry = term.entry
    method, tensors, owner = cast(WeightDelta, entry.method), entry.tensors(), entry.site.owner
    weight, bias = cast(Tensor, owner.weight), cast(Tensor | None, owner.bias)
    if weight.dtype not in (torch.float32, torch.float64):
        return None
    sparse = method.sparse(tensors, entry.site)
    if sparse is not None:
        return changed_linear(x, weight, bias, sparse[1], sparse[0])
    return nn.functional.linear(x, weight + method.delta(tensors, entry.site).to(weight.dtype), bias)


def _add_stacked(found: Prepared, base: Base, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    output = base(*args, **kwargs)
    # what other modules may see must not change under them: an identity layer returns its input
    return found.add(output.clone() if output is x else output, x)


def _whole(terms: tuple[Term, ...]) -> bool:
    """Whether one update of the weight, as it is, acts on all rows alike."""
    term, *others = terms
    method = term.entry.method
    return (
        not others
        and "summed" in method.capabilities
        and term.rows is None
        and term.weights is None
        and bool(term.weight == 1.0)
        and not (getattr(method, "dropout", 0.0) and term.entry.site.owner.training)
    )


def _fusable(owner: nn.Module, x: Tensor) -> bool:
    """Whether the layer is a plain dense frozen linear map that the fused operation may compute itself."""
    weight = owner._parameters.get("weight")
    if "weight" in owner.__dict__ or weight is None or type(weight) is not nn.Parameter or weight.requires_grad:
        return False
    bias = owner.bias
    return (
        weight.dtype == x.dtype
        and weight.device == x.device
        and (bias is None or not bias.requires_grad)
        and type(x) in (Tensor, nn.Parameter)
        and not autocasts(x)
    )
