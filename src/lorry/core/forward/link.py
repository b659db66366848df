"""How a layer becomes adapted: its class is exchanged for a subclass whose forward adds what the active set asks for.

The module keeps its identity, its paths, its `isinstance` relations and its storage; its state dict leaves adapter
tensors out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.active import Active, Part
from lorry.core.forward.compiled import PACKED, packed_forward
from lorry.core.forward.entry import Entry
from lorry.core.forward.exchange import exchanged
from lorry.core.method.call import Call, recomputing
from lorry.core.method.families import Block, Bottleneck, WeightDelta
from lorry.core.sites.site import Site
from lorry.kernels.gathered import Stacked, add_stacked, stack, worth_stacking
from lorry.kernels.lowrank import low_rank_linear
from lorry.kernels.segments import Factors, Segment, take
from lorry.kernels.sparse import changed_linear

if TYPE_CHECKING:
    from lorry.core.life.state import ModelState

Base = Callable[..., Any]
PREFIX = "lorry_"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Link:
    """What an adapted module knows: its sites, and the state of the model it belongs to."""

    def __init__(self, state: ModelState, owner: nn.Module, sites: list[Site]) -> None:
        self.state = state
        self.sites = sites
        self.marks = [zlib.crc32(site.path.encode()) for site in sites]
        self.own_forward: Base | None = owner.__dict__.pop("forward", None)
        self.plain_linear = type(owner).forward is nn.Linear.forward and self.own_forward is None
        self.original = type(owner)
        owner.__dict__["_lorry_link"] = self
        owner.__class__ = adapted_class(type(owner))

    def add(self, site: Site) -> None:
        """Serve another weight of the same module."""
        self.sites.append(site)
        self.marks.append(zlib.crc32(site.path.encode()))

    def remove(self, owner: nn.Module) -> None:
        """Give the module its own class and forward back."""
        del owner.__dict__["_lorry_link"]
        owner.__dict__.pop("_lorry_norms", None)
        owner.__class__ = self.original
        if self.own_forward is not None:
            owner.__dict__["forward"] = self.own_forward

    def forward(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module with what is active."""
        state, base = self.state, self.own_forward or base
        active = state._active
        if torch.compiler.is_compiling():
            if active is None:
                return base(*args, **kwargs)
        else:
            if state.inside is not None:
                active = state.inside
            elif recomputing():
                active = state.history.of_running_node()[0]
            if active is None:
                return base(*args, **kwargs)
        kind = self.sites[0].kind
        if kind.additive:
            return self._additive(base, active, *args, **kwargs)
        groups = active.groups(self._batch(args, kwargs)) if active.rows is not None else None
        return self._exchanged(base, active, groups, args, kwargs)

    def _additive(self, base: Base, active: Active, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        site = self.sites[0]
        if site.kind.name == "embedding" and len(x) == 1 and active.rows is not None:
            x = x.expand(active.rows, *x.shape[1:])  # positions, looked up once for all rows
        if torch.compiler.is_compiling():
            packed = PACKED.get(self.state.slot.number)
            if packed is not None:
                return packed_forward(site, base(x, *args, **kwargs), x, packed.get(site.path), site.owner.training)
        stacked = active.stacks.get(site.path)
        if stacked is not None and stacked.serves(x) and not torch.is_grad_enabled() and not site.owner.training:
            return self._stacked(base, stacked, x, args, kwargs)
        terms = active.terms(site, x.shape[0], x.device)
        if not terms:
            return base(x, *args, **kwargs)
        if site.kind.name == "linear" and x.is_floating_point() and not torch.compiler.is_compiling():
            if all(isinstance(entry.method, Bottleneck) and entry.method.constant for entry, _ in terms):
                fused = self._low_rank(base, active, terms, x, args, kwargs)
                if fused is not None:
                    return fused
            if self.plain_linear and not args and not kwargs and _whole(terms) and _fusable(site.owner, x):
                summed = self._summed(terms[0][0], x)
                if summed is not None:
                    return summed
        output = base(x, *args, **kwargs)
        updates = [(part, self._update(entry, part, x, output)) for entry, part in terms]
        return _add_updates(output, updates)

    def _low_rank(
        self,
        base: Base,
        active: Active,
        terms: tuple[tuple[Entry, Part], ...],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Run low-rank updates by one fused operation for all rows, or return None where their gains need the long
        way.
        """
        site, owner = self.sites[0], self.sites[0].owner
        dense = self.plain_linear and not args and not kwargs and _fusable(owner, x)
        segments, factors, frozen = [], [], True
        for entry, part in terms:
            method, tensors = cast(Bottleneck, entry.method), entry.tensors()
            alone = dense and active.exclusive and part.weights is None and part.weight == 1.0
            # what is neither plain nor a gain has its own way of computing (a gradient withheld, a loss to leave)
            if not method.plain and (not alone or type(method).gain is Bottleneck.gain):
                return None
            scale = method.scale(site)
            p = method.dropout if owner.training else 0.0
            a, b = method.factors(tensors, site)
            gain = None if method.plain else method.gain(a, b, tensors, site)
            seed = self._seed(part) if p else 0
            segments.append(Segment(part.rows, part.weight * scale, p, seed, part.weights))
            factors.append(Factors(a, b, gain))
            frozen = frozen and not entry.home.registered
        if frozen and active.rows is not None and not torch.is_grad_enabled() and worth_stacking(x, segments, factors):
            dtype = x.dtype if not torch.is_autocast_enabled(x.device.type) else torch.get_autocast_dtype(x.device.type)
            active.stacks[site.path] = stacked = stack(x, segments, factors, dtype)
            return self._stacked(base, stacked, x, args, kwargs)
        if dense:
            bias = cast(Tensor | None, owner.bias)
            return low_rank_linear(x, cast(Tensor, owner.weight), bias, None, segments, factors, active.plans)
        return low_rank_linear(x, None, None, base(x, *args, **kwargs), segments, factors, active.plans)

    def _summed(self, entry: Entry, x: Tensor) -> Tensor | None:
        """Run one weight update of all rows as a product with ``W + ΔW``, or return None where the update is applied
        in a cheaper way of its own, or where the sum would round it away.
        """
        method, tensors, owner = cast(WeightDelta, entry.method), entry.tensors(), entry.site.owner
        weight, bias = cast(Tensor, owner.weight), cast(Tensor | None, owner.bias)
        if weight.dtype not in (torch.float32, torch.float64):
            return None
        sparse = method.sparse(tensors, entry.site)
        if sparse is not None:
            return changed_linear(x, weight, bias, sparse[1], sparse[0])
        if type(method).bypass is not WeightDelta.bypass:
            return None
        return nn.functional.linear(x, weight + method.delta(tensors, entry.site).to(weight.dtype), bias)

    def _stacked(
        self, base: Base, stacked: Stacked, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        output = base(x, *args, **kwargs)
        # what other modules may see must not change under them: an identity layer returns its input
        return add_stacked(output.clone() if output is x else output, x, stacked)

    def _update(self, entry: Entry, part: Part, x: Tensor, output: Tensor) -> Tensor:
        """Return the weighted update of the part's rows."""
        call = self._call(entry, part, x, output)
        update = call.settle(entry.method.apply(call, entry.tensors()))
        if part.weights is not None:
            return update * part.weights.to(update.dtype).view(-1, *[1] * (update.ndim - 1))
        return update if part.weight == 1.0 else update * part.weight

    def _call(self, entry: Entry, part: Part, x: Tensor, output: Tensor) -> Call:
        rows = part.rows
        index = torch.arange(len(x), device=x.device)[rows] if isinstance(rows, slice) else rows
        mark = entry.site.path
        return Call(
            site=entry.site,
            x=take(x, rows),
            output=take(output, rows) if isinstance(output, Tensor) else output,
            adapter=entry.adapter.name,
            rows=index,
            training=entry.site.owner.training,
            seed=lambda: self._seed(part, mark),
            context=self.state.history.of_running_node()[1] if recomputing() else self.state.context,
            batch=len(x),
        )

    def _seed(self, part: Part, path: str | None = None) -> int:
        """Return this call's seed: from the part if the engine gave one, else from torch's global generator."""
        if part.seed is None:
            return int(torch.randint(0, 2**62, ()).item())
        mark = self.marks[0] if path is None else zlib.crc32(path.encode())
        return (part.seed * 0x9E3779B97F4A7C15 + mark * 0xBF58476D1CE4E5B9) % 2**63

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return int(_first_tensor(args, kwargs).shape[_batch_dim(self.sites[0])])

    def _exchanged(
        self,
        base: Base,
        active: Active,
        groups: list[tuple[Tensor, Active]] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module whose weights or whose forward are exchanged, once for each distinct composition of rows."""
        if groups is None:
            return self._run_exchanged(base, active, None, args, kwargs)
        dim, total = _batch_dim(self.sites[0]), self._batch(args, kwargs)
        outputs, order = [], []
        for rows, group in groups:
            if isinstance(self.sites[0].owner, nn.MultiheadAttention):
                part_args, part_kwargs = _select_attention(self.sites[0].owner, args, kwargs, rows, dim, total)
            else:
                part_args, part_kwargs = _select((args, kwargs), rows, dim, total)
            outputs.append(self._run_exchanged(base, group, (rows, total), part_args, part_kwargs))
            order.append(rows)
        back = torch.argsort(torch.cat(order))
        return _join(outputs, back, dim)

    def _run_exchanged(
        self, base: Base, active: Active, of: tuple[Tensor, int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module with what is active, given the rows of it and their total number if these are not all rows."""
        first = self.sites[0]
        if first.kind.name == "block":
            outer = self.state.inside
            # layers inside see the rows of this group alone, so what applies to them is the group's composition
            self.state.inside = outer if of is None else active
            try:
                return self._run_block(base, active, of, args, kwargs)
            finally:
                self.state.inside = outer
        pairs = []
        device = _first_tensor(args, kwargs).device
        for site in self.sites:
            weight: Tensor | None = None
            for entry, part in active.terms(site, 1, device):
                if getattr(entry.method, "dropout", 0.0) and first.owner.training:
                    raise AdapterError(
                        f"'{site.path}' holds its weight for a larger module, so the input cannot be dropped out "
                        "there; set "
                        f"dropout=0 for adapter '{entry.adapter.name}' or leave the site out."
                    )
                update = site.kind.to_weight(site, entry.delta() * part.weight)
                weight = (site.stored if weight is None else weight) + update.to(site.stored.dtype)
            if weight is not None:
                pairs.append((site.holder, site.parameter, weight))
        with exchanged(pairs):
            return base(*args, **kwargs)

    def _run_block(
        self, base: Base, active: Active, of: tuple[Tensor, int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        site = self.sites[0]
        x = _first_tensor(args, kwargs)
        terms = active.terms(site, x.shape[0], x.device)
        if not terms:
            return base(*args, **kwargs)
        if len(terms) > 1:
            names = ", ".join(e.adapter.name for e, _ in terms)
            raise AdapterError(
                f"Adapters {names} each replace the whole block '{site.path}'; only one can be active in a row."
            )
        entry, part = terms[0]
        method = cast(Block, entry.method)
        call = self._call(entry, Part(part.adapter, seed=part.seed), x, x)
        if of is not None:
            call.rows, call.batch = of[0].to(x.device), of[1]
        result = method.forward(base, call, entry.tensors(), *args, **kwargs)
        if isinstance(result, Tensor):
            result = call.settle(result)
        if part.weight == 1.0:
            return result
        return _blend(base(*args, **kwargs), result, part.weight)


class Adapted:
    """Mark of the classes that `adapted_class` makes."""


def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `cls` whose forward asks the module's link; one for each class."""
    if cls in _CLASSES:
        return _CLASSES[cls]

    class AdaptedLayer(cls, Adapted):  # type: ignore[valid-type, misc]
        _lorry_original = cls

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            link = self.__dict__.get("_lorry_link")
            if link is None:  # a wrapper that was put around this forward outlived the adapter
                return cls.forward(self, *args, **kwargs)
            return link.forward(super().forward, args, kwargs)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for name in self._parameters:
                if name.startswith(PREFIX):
                    destination.pop(prefix + name, None)

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            own = {n: self._parameters.pop(n) for n in list(self._parameters) if n.startswith(PREFIX)}
            try:
                super()._load_from_state_dict(*args, **kwargs)
            finally:
                self._parameters.update(own)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild, (cls,), {k: v for k, v in self.__dict__.items() if k != "_lorry_norms"}

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(AdaptedLayer, name, getattr(cls, name))
    _CLASSES[cls] = AdaptedLayer
    return AdaptedLayer


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)


def _whole(terms: tuple[tuple[Entry, Part], ...]) -> bool:
    """Whether one update of the weight, as it is, acts on all rows alike."""
    (entry, part), *others = terms
    method = entry.method
    return (
        not others
        and isinstance(method, WeightDelta)
        and type(method).apply is WeightDelta.apply
        and part.rows is None
        and part.weights is None
        and part.weight == 1.0
        and not (method.dropout and entry.site.owner.training)
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
        and not torch.is_autocast_enabled(x.device.type)
    )


def _add_updates(output: Tensor, updates: list[tuple[Part, Tensor]]) -> Tensor:
    """Add updates of all rows and of some rows; those of some rows in one go."""
    for part, update in updates:
        if part.rows is None:
            output = output + update
    partial = [(part, update) for part, update in updates if part.rows is not None]
    if not partial:
        return output
    every = torch.arange(len(output), device=output.device)
    index = torch.cat([every[part.rows] for part, _ in partial])
    return output.index_add(0, index, torch.cat([update for _, update in partial]).to(output.dtype))


#: Attributes by which PyTorch's encoder decides for its fused evaluation, with values that rule it out.
_FUSION: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def without_fusion(root: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep PyTorch's encoder layers from evaluating with the weights of adapted layers without calling these layers.

    Returns
    -------
    list
        Module, attribute and value to give back with the last adapter.
    """
    changed = []
    for module in root.modules():
        for cls, name, value in _FUSION:
            before = module.__dict__.get(name) if isinstance(module, cls) else None
            if before and any("_lorry_link" in m.__dict__ for m in module.modules()):
                changed.append((module, name, before))
                module.__dict__[name] = value
    return changed


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise AdapterError("An adapted block was called without any tensor.")


def _batch_dim(site: Site) -> int:
    """Return the dimension that counts rows: attention modules may have the length first."""
    if isinstance(site.owner, nn.MultiheadAttention):
        return 0 if site.owner.batch_first else 1
    return 0


def _select(values: Any, rows: Tensor, dim: int, total: int) -> Any:
    """Restrict every tensor that has `total` entries in its batch dimension to `rows`; others pass as they are."""
    if isinstance(values, Tensor):
        if values.ndim > 2 and values.shape[dim] == total:
            return values.index_select(dim, rows)
        if values.ndim and values.shape[0] == total:
            return values.index_select(0, rows)
        return values
    if isinstance(values, tuple | list):
        return type(values)(_select(v, rows, dim, total) for v in values)
    if isinstance(values, dict):
        return {k: _select(v, rows, dim, total) for k, v in values.items()}
    return values


def _select_attention(
    owner: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, dim: int, total: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Restrict the inputs of an attention module to `rows`; a mask ``(length, length)`` has no rows even if its size
    is `total`.
    """
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("query", "key", "value"):
        given[name] = given[name].index_select(dim, rows)
    if given.get("key_padding_mask") is not None:
        given["key_padding_mask"] = given["key_padding_mask"].index_select(0, rows)
    mask = given.get("attn_mask")
    if mask is not None and mask.ndim == 3:
        heads = mask.view(total, owner.num_heads, *mask.shape[1:])
        given["attn_mask"] = heads.index_select(0, rows).flatten(0, 1)
    return (), given


def _join(outputs: list[Any], back: Tensor, dim: int) -> Any:
    """Put the outputs of groups of rows together in the order of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        along = dim if first.ndim > 2 else 0
        return torch.cat(outputs, dim=along).index_select(along, back)
    if isinstance(first, tuple | list):
        # the second result of an attention module is (rows, ...) whatever the layout of the first
        return type(first)(
            _join(list(group), back, dim if i == 0 else 0) for i, group in enumerate(zip(*outputs, strict=True))
        )
    if isinstance(first, dict):  # model outputs are ordered dictionaries
        return type(first)(**{key: _join([o[key] for o in outputs], back, dim) for key in first})
    if first is None:
        return None
    raise AdapterError(
        f"A module whose rows use different adapters returned a {type(first).__name__}, which cannot be put together "
        "from groups of rows. Use one adapter for the whole batch there."
    )


def _blend(base: Any, result: Any, weight: float) -> Any:
    if isinstance(result, Tensor):
        return base + weight * (result - base)
    if isinstance(result, tuple):
        return tuple(_blend(b, r, weight) for b, r in zip(base, result, strict=True))
    if isinstance(result, dict):
        return type(result)(**{key: _blend(base[key], result[key], weight) for key in result})
    return result
