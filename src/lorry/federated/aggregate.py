"""How a server makes one state of the clients' updates: a registry of functions.

With weights p, scale s and the clients' factors, the update that should come out is ``s Σ p_i B_i A_i``. Averaging the
factors gives ``s (Σ p_i B_i)(Σ p_i A_i)``, which is off by ``s Σ p_i (B_i - B̄)(A_i - Ā)``: zero where all clients have
one factor in common (FFA-LoRA, arXiv 2403.12313), and else made good by the other ways here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorry.core.registry import Registry
from lorry.merging.factors import Factors, decompose, stack

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """What one client sends in a round.

    Attributes
    ----------
    pairs
        Site path -> A ``(rank, in)`` and B ``(out, rank)``, the frozen one filled in.
    scales
        Site path -> scale of the product at this client.
    weight
        Its weight p; those of all clients of a round sum to 1.
    extra
        Whatever is trained besides (whole modules), by name.
    """

    pairs: Pairs
    scales: Mapping[str, float]
    weight: float
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def factors(self, path: str) -> Factors:
        """Return the client's update at a site in float64, the scale folded in."""
        a, b = self.pairs[path]
        return Factors(a.double(), b.double() * self.scales[path])


@dataclass(frozen=True)
class State:
    """What the server knows between rounds.

    Attributes
    ----------
    pairs
        Site path -> A and B that clients start from; None lets them start anew in each round.
    offset
        Site path -> an update that is no longer trained and applies beside the pairs.
    folded
        Whether the pairs have the scale folded in, so that a client divides B by its own.
    extra
        Whatever is trained besides (whole modules), by name; every aggregation averages it.
    """

    pairs: Pairs | None
    offset: Mapping[str, Factors] = field(default_factory=dict)
    folded: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregation:
    """What the registry knows of a way to aggregate.

    Attributes
    ----------
    function
        Makes the next state of the last one, the updates of a round and the names of the trained factors.
    equal_ranks
        Whether all clients must have one rank.
    frozen
        Whether one factor may be frozen at all clients.
    exact
        Whether the product that comes out is the weighted mean of the clients' products, whatever was trained.
    fresh
        Whether clients start anew in each round.
    """

    name: str
    function: Callable[[State, Sequence[Update], frozenset[str]], State]
    equal_ranks: bool
    frozen: bool
    exact: bool
    fresh: bool


AGGREGATIONS: Registry[Aggregation] = Registry("aggregation")


def register_aggregation(
    name: str, *, equal_ranks: bool = True, frozen: bool = True, exact: bool = True, fresh: bool = False
) -> Callable[[Callable[..., State]], Callable[..., State]]:
    """Return a decorator that registers an aggregation; see `Aggregation` for the facts."""

    def add(function: Callable[..., State]) -> Callable[..., State]:
        AGGREGATIONS.add(name, Aggregation(name, function, equal_ranks, frozen, exact, fresh))
        return function

    return add


@register_aggregation("average", exact=False)
def average(state: State, updates: Sequence[Update], trained: frozenset[str]) -> State:
    """Average each trained factor by itself; exact where the other one is frozen (FFA-LoRA)."""
    assert state.pairs is not None
    pairs: Pairs = {}
    for path, kept in state.pairs.items():
        a, b = (
            _mean([u.pairs[path][i] for u in updates], updates) if name in trained else kept[i]
            for i, name in enumerate("AB")
        )
        pairs[path] = (a, b)
    return State(pairs, state.offset)


@register_aggregation("stack", equal_ranks=False, fresh=True)
def stacked(state: State, updates: Sequence[Update], trained: frozenset[str]) -> State:
    """Put all clients' factors side by side into the offset, and start anew (FLoRA, arXiv 2409.05976)."""
    offset = {path: _with(state.offset.get(path), ideal(updates, path)) for path in updates[0].pairs}
    return State(None, offset)


@register_aggregation("exact")
def exact(state: State, updates: Sequence[Update], trained: frozenset[str]) -> State:
    """Average the factors, and keep what that misses as an offset (FedEx-LoRA, arXiv 2410.09432)."""
    averaged = average(state, updates, trained)
    if trained != frozenset("AB"):
        return averaged  # nothing is missed where a factor is common
    assert averaged.pairs is not None
    offset = {}
    for path, (a, b) in averaged.pairs.items():
        mean = Factors(a.double(), b.double() * updates[0].scales[path])
        offset[path] = _with(state.offset.get(path), stack([ideal(updates, path), mean], [1.0, -1.0]))
    return State(averaged.pairs, offset)


@register_aggregation("svd", equal_ranks=False, frozen=False, exact=False)
def svd(state: State, updates: Sequence[Update], trained: frozenset[str]) -> State:
    """Take the best approximation of the mean product at the largest rank (FlexLoRA, arXiv 2402.11505)."""
    pairs: Pairs = {}
    for path in updates[0].pairs:
        rank = max(u.pairs[path][0].shape[0] for u in updates)
        best = decompose(ideal(updates, path)).truncated(rank).padded(rank)
        pairs[path] = (best.a.float(), best.b.float())
    return State(pairs, state.offset, folded=True)


def aggregate(name: str, state: State, updates: Sequence[Update], trained: frozenset[str]) -> State:
    """Return the next state by a registered aggregation; `trained` holds the names of the trained factors, A and B."""
    made = AGGREGATIONS.find(name).function(state, updates, trained)
    extra = {key: _mean([u.extra[key] for u in updates], updates) for key in updates[0].extra}
    return replace(made, extra=extra)


def ideal(updates: Sequence[Update], path: str) -> Factors:
    """Return ``s Σ p_i B_i A_i`` at a site as a stack of factors in float64."""
    return stack([u.factors(path) for u in updates], [u.weight for u in updates])


def error(state: State, before: State, updates: Sequence[Update]) -> float:
    """Return the norm of what a state misses of the clients' mean product, relative to that product's norm."""
    missed, whole = 0.0, 0.0
    for path in updates[0].pairs:
        wanted = ideal(updates, path)
        parts, signs = [wanted], [-1.0]
        if state.pairs is not None:
            a, b = state.pairs[path]
            parts.append(Factors(a.double(), b.double() * (1.0 if state.folded else updates[0].scales[path])))
            signs.append(1.0)
        for offset, sign in ((state.offset.get(path), 1.0), (before.offset.get(path), -1.0)):
            if offset is not None:
                parts.append(offset)
                signs.append(sign)
        missed += stack(parts, signs).norm() ** 2
        whole += wanted.norm() ** 2
    return (missed / whole) ** 0.5 if whole else 0.0


def compressed(update: Factors) -> Factors:
    """Return the same update at its numerical rank, so that offsets do not grow beyond the layer's width."""
    found = decompose(update)
    return found.truncated(max(int(found.s.shape[0]), 1))


def _with(offset: Factors | None, more: Factors) -> Factors:
    return compressed(more if offset is None else stack([offset, more]))


def _mean(tensors: Sequence[Tensor], updates: Sequence[Update]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, update in zip(tensors, updates, strict=True):
        total += tensor.double() * update.weight
    return total.to(tensors[0].dtype)
