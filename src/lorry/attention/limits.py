"""Whether the attention of a model, head by head, is where fast gradients can exist (arXiv 2406.03136).

With Γ the largest entry of queries and keys, gradients of attention over L tokens can be had in almost linear time if Γ
is below about ``√ln L`` (Theorems 3.1 and A.1), and not in less than quadratic time above it, unless the strong
exponential time hypothesis fails (Theorem 4.1). This is asymptotic: what decides at a real length is the logit radius R
and the number of polynomial features that it takes, so both are reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.attention.call import AttentionCall, AttentionError
from lorry.attention.polynomial import feature_count, predicted_degree
from lorry.attention.sites import chosen_sites
from lorry.attention.watching import watch
from lorry.core.forward.taps import Tap
from lorry.core.life.api import adapters, tap

#: Names of the projections of queries and keys, where a module has them apart.
_QUERY = ("q_proj", "query", "to_q", "q", "q_lin", "wq", "query_proj")
_KEY = ("k_proj", "key", "to_k", "k", "k_lin", "wk", "key_proj")


@dataclass(frozen=True)
class HeadLimits:
    """What one head's attention is like over some rows of data; norms are largest entries by size.

    Queries and keys are those that attend, after norms and rotation, each with ``√scaling`` in it; a padded row has no
    place here.

    Attributes
    ----------
    path, head
        The attention module and the number of the query head.
    length
        Keys of the longest row, L.
    q_max, k_max
        Norms of queries and keys: ``‖C1 W‖`` and ``‖C2‖`` of Theorem 3.1.
    gamma, ratio
        The larger of the two, and that over ``√ln L``; 0 for a single key.
    radius, centered
        Largest logit by size, and with the mean key subtracted, which changes no probability.
    degree, features
        Of the polynomial that the smaller radius needs at the tolerance; None beyond all bounds.
    feasible
        Whether ``features · width of v < L``, so that factors are smaller than the probabilities.
    mixed, x_max
        ``‖X_Q W_Q W_Kᵀ‖`` and ``‖X_K‖`` of Theorem A.1, for adapters on queries and keys both, before norms and
        rotation; None where a module keeps its projections together.
    base_key, query_update
        ``‖X_K W*_K‖`` of the frozen base and ``‖scale · X_Q B_Q A_Q‖`` of the active adapters (Theorem 4.1), before
        norms and rotation; None as above.
    """

    path: str
    head: int
    length: int
    q_max: float
    k_max: float
    gamma: float
    ratio: float
    radius: float
    centered: float
    degree: int | None
    features: int | None
    feasible: bool
    mixed: float | None = None
    x_max: float | None = None
    base_key: float | None = None
    query_update: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def head_limits(
    model: nn.Module,
    rows: Iterable[Mapping[str, Tensor]],
    *,
    tolerance: float = 1e-3,
    targets: str | Sequence[str] | None = None,
    kinds: str | Iterable[str] | None = None,
) -> list[HeadLimits]:
    """Run rows through a model, one by one and without a gradient, and measure each head.

    Nothing that the model computes is changed.

    Parameters
    ----------
    model
        The model, with whatever adapters are active on it.
    rows
        Keyword arguments of each call; without padding.
    tolerance
        Of the polynomial (`lorry.attention.polynomial.predicted_degree`).
    targets, kinds
        As for `lorry.attention.watch`.

    Raises
    ------
    SiteError
        Nothing matches.
    AttentionError
        A site's attention cannot be seen, or there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise AttentionError("There are no rows to measure attention on; give data with at least one record.")
    tables = {site.path: _Table(module, tolerance) for site, module in chosen_sites(model, targets, kinds)}
    paths = {id(module): path for path, module in model.named_modules()}

    def see(call: AttentionCall) -> None:
        tables[call.site.path].attended(call)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch(model, see, targets=targets, kinds=kinds, want=("q", "k", "v")))
        for table in tables.values():
            if table.query is not None and table.key is not None:
                _listen(stack, model, table, paths)
        for row in rows:
            model(**row)
            for table in tables.values():
                table.finish()
    return [head for path, table in tables.items() for head in table.heads(path)]


def _listen(stack: ExitStack, model: nn.Module, table: _Table, paths: Mapping[int, str]) -> None:
    """Let a table see inputs and outputs of its projections, those of the base and of adapters apart."""

    def outputs(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        table.projected(module is table.query, args[0] if args else next(iter(kwargs.values())), output)

    for module in (table.query, table.key):
        assert module is not None
        stack.callback(module.register_forward_hook(outputs, with_kwargs=True).remove)
    adapted = {id(e.site.owner) for a in adapters(model).values() for e in a.entries.values()}
    for module, reader in ((table.query, table.query_tapped), (table.key, table.key_tapped)):
        if id(module) in adapted:
            stack.enter_context(tap(model, reader, paths[id(module)]))


class _Table:
    """Running figures of one site's heads."""

    def __init__(self, module: nn.Module, tolerance: float) -> None:
        self.tolerance = tolerance
        self.query, self.key = _projection(module, _QUERY), _projection(module, _KEY)
        self.length = self.width = self.value_width = self.group = 0
        self.half = 1.0
        self.largest: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def attended(self, call: AttentionCall) -> None:
        q, k = call.q.double(), call.k.double()
        half = math.sqrt(abs(call.scaling))
        self.length = max(self.length, k.shape[-2])
        self.width, self.value_width, self.group = q.shape[-1], call.v.shape[-1], q.shape[1] // k.shape[1]
        self.half = half
        self._note("q_max", half * q.abs().amax((0, 2, 3)))
        self._note("k_max", half * call.expand(k).abs().amax((0, 2, 3)))
        for name, keys in (("radius", k), ("centered", k - k.mean(-2, keepdim=True))):
            self._note(name, half**2 * (q @ call.expand(keys).mT).abs().amax((0, 2, 3)))

    def projected(self, query: bool, x: Tensor, output: Tensor) -> None:
        self.seen["query" if query else "key"] = output.detach()
        if not query:
            self.seen["x"] = x.detach()

    def query_tapped(self, seen: Tap) -> None:
        update = sum((u.value for u in seen.updates), start=torch.zeros(()))
        if update.ndim:
            self.seen["update"] = update.detach()

    def key_tapped(self, seen: Tap) -> None:
        self.seen["base"] = seen.base.detach()

    def finish(self) -> None:
        """Work out, at the end of a row, what needs the projections."""
        seen, self.seen = self.seen, {}
        if "query" not in seen or "key" not in seen or not self.group:
            return
        heads = len(self.largest["q_max"])
        base = seen.get("base", seen["key"])
        by_head = self._split(base, heads // self.group).repeat_interleave(self.group)
        self._note("base_key", self.half * by_head)
        update = seen.get("update")
        self._note("query_update", self.half * (self._split(update, heads) if update is not None else by_head * 0))
        self._note("x_max", seen["x"].double().abs().max().expand(heads))
        mixed = self._mixed(seen["query"], seen["x"], heads)
        if mixed is not None:
            self._note("mixed", self.half**2 * mixed)

    def _split(self, values: Tensor, heads: int) -> Tensor:
        """Return the largest entry of each head's part of a projection."""
        return values.double().unflatten(-1, (heads, -1)).abs().amax(tuple(range(values.ndim - 1)) + (-1,))

    def _mixed(self, query: Tensor, x: Tensor, heads: int) -> Tensor | None:
        """Return ``‖X_Q W_Q W_Kᵀ‖`` of each head: what a vector-Jacobian product of the key projection gives."""
        assert self.key is not None
        if query.shape[:-1] != x.shape[:-1]:
            return None  # keys of another sequence
        parts = query.unflatten(-1, (heads, -1))
        found = []
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            keys = self.key(leaf).unflatten(-1, (heads // self.group, -1))
            for head in range(heads):
                towards = torch.zeros_like(keys)
                towards[..., head // self.group, :] = parts[..., head, :]
                (back,) = torch.autograd.grad(keys, leaf, towards, retain_graph=True)
                found.append(back.double().abs().max())
        self.seen.clear()  # of the call just made
        return torch.stack(found)

    def _note(self, name: str, values: Tensor) -> None:
        values = values.detach().cpu()
        self.largest[name] = torch.maximum(self.largest[name], values) if name in self.largest else values

    def heads(self, path: str) -> list[HeadLimits]:
        """Return the figures; none for a site that did not run."""
        figures = {name: values.tolist() for name, values in self.largest.items()}
        return [
            self._head(path, head, {name: values[head] for name, values in figures.items()})
            for head in range(len(figures.get("q_max", ())))
        ]

    def _head(self, path: str, head: int, figures: dict[str, float]) -> HeadLimits:
        gamma = max(figures["q_max"], figures["k_max"])
        try:
            degree = predicted_degree(min(figures["radius"], figures["centered"]), self.tolerance)
        except AttentionError:
            degree = None
        count = None if degree is None else feature_count(self.width, degree)
        return HeadLimits(
            path=path,
            head=head,
            length=self.length,
            gamma=gamma,
            ratio=gamma / math.sqrt(math.log(self.length)) if self.length > 1 else 0.0,
            degree=degree,
            features=count,
            feasible=count is not None and count * self.value_width < self.length,
            **figures,
        )


def _projection(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """Return the one child of these names; None where queries, keys and values are projected together."""
    found = [child for name, child in module.named_children() if name in names]
    return found[0] if len(found) == 1 else None
