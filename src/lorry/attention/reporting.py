"""How large and how sharp a model's attention is, site by site.

The norms are those of Hu et al., "Computational Limits of LoRA Fine-Tuning" (arXiv 2406.03136): with the largest entry
of queries and keys below about sqrt(ln L), gradients of attention over L tokens can be had in almost linear time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lorry.attention.call import AttentionCall, largest_logit
from lorry.attention.watching import watch


@dataclass(frozen=True)
class SiteReport:
    """What one site's attention is like, over all its calls.

    Attributes
    ----------
    path, kind, heads
        The site.
    calls
        Number of products that were seen.
    keys
        Most keys of a product, L.
    q_max, k_max, v_max
        Largest entry by size of queries, keys and values.
    logit_max
        Largest logit by size before mask and cap, ``max |q k^T| * scaling``.
    ratio
        ``max(q_max, k_max) / sqrt(ln L)``, with ``sqrt(scaling)`` in queries and keys; 0 for a single key.
    entropy
        Mean entropy of the probabilities in nats over queries and heads; ``ln L`` is even attention.
    sharpest_head, sharpest_entropy
        The head whose mean entropy is lowest in the calls with most keys, and that entropy.
    """

    path: str
    kind: str
    heads: int
    calls: int
    keys: int
    q_max: float
    k_max: float
    v_max: float
    logit_max: float
    ratio: float
    entropy: float
    sharpest_head: int
    sharpest_entropy: float


@dataclass(frozen=True)
class AttentionReport:
    """A table of `SiteReport`; ``print(report)`` shows it."""

    sites: tuple[SiteReport, ...]

    def records(self) -> list[dict[str, Any]]:
        """Return the table as one mapping for each site, for JSON or a data frame."""
        return [asdict(site) for site in self.sites]

    def __str__(self) -> str:
        names = [f.name for f in fields(SiteReport)]
        rows = [names] + [[_cell(getattr(site, name)) for name in names] for site in self.sites]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def report(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any] | Tensor | Callable[[nn.Module], object],
    *,
    targets: str | Sequence[str] | None = None,
    kinds: str | Iterable[str] | None = None,
) -> AttentionReport:
    """Run a model once, without a gradient, and measure its attention.

    Parameters
    ----------
    model
        The model, with whatever adapters are active on it.
    inputs
        Keyword arguments, positional arguments, a single tensor, or a function that is given the model and runs it
        (a pipeline, a generation).
    targets, kinds
        As for `lorry.attention.watch`.

    Raises
    ------
    SiteError
        Nothing matches.
    AttentionError
        A site's attention or its probabilities cannot be seen.
    """
    tables: dict[str, _Table] = {}

    def measure(call: AttentionCall) -> None:
        tables.setdefault(call.site.path, _Table(call)).add(call)

    with torch.no_grad(), watch(model, measure, targets=targets, kinds=kinds):
        if callable(inputs):
            inputs(model)
        elif isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, Tensor):
            model(inputs)
        else:
            model(*inputs)
    return AttentionReport(tuple(table.result() for table in tables.values()))


class _Table:
    """Running figures of one site."""

    def __init__(self, first: AttentionCall) -> None:
        self.site = first.site
        self.calls = self.keys = 0
        self.largest = dict.fromkeys(("q", "k", "v", "logit", "norm"), 0.0)
        self.total = self.queries = 0.0
        self.by_head = torch.zeros(0)

    def add(self, call: AttentionCall) -> None:
        self.calls += 1
        keys = call.k.shape[-2]
        found = {name: float(tensor.abs().max()) for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v))}
        found["logit"] = largest_logit(call.q, call.k, call.scaling)
        # the paper has no 1/sqrt(d): half of the scaling belongs to each side
        found["norm"] = max(found["q"], found["k"]) * math.sqrt(abs(call.scaling))
        for name, value in found.items():
            self.largest[name] = max(self.largest[name], value)
        entropy = torch.special.entr(call.probabilities).sum(dim=-1)
        self.total += float(entropy.sum())
        self.queries += entropy.numel()
        if keys >= self.keys:
            self.keys = keys
            self.by_head = entropy.mean(dim=(0, 2)).cpu()

    def result(self) -> SiteReport:
        head = int(self.by_head.argmin())
        return SiteReport(
            path=self.site.path,
            kind=self.site.kind,
            heads=len(self.by_head),
            calls=self.calls,
            keys=self.keys,
            q_max=self.largest["q"],
            k_max=self.largest["k"],
            v_max=self.largest["v"],
            logit_max=self.largest["logit"],
            ratio=self.largest["norm"] / math.sqrt(math.log(self.keys)) if self.keys > 1 else 0.0,
            entropy=self.total / self.queries,
            sharpest_head=head,
            sharpest_entropy=float(self.by_head[head]),
        )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
