"""Adapters as weights: what a model with adapters must give, from a copy of the base that has none.

The tensors are copies of the adapter's own, and the updates are their methods' definitions in float64. What has no
weight update (gates for each token, whole blocks) is run alone on a fresh copy of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import lorry
from lorry.core.method.families import Bottleneck, WeightDelta
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.site import Site

Composition = Mapping[str, float]


class Twin:
    """What a test knows of one adapter, apart from the adapter."""

    def __init__(self, adapter: lorry.Adapter, targets: Any) -> None:
        self.name = adapter.name
        self.targets = targets
        self.method = adapter.method
        self.methods = {path: entry.method for path, entry in adapter.entries.items()}
        self.sharing = {path for path, entry in adapter.entries.items() if entry.shared is not None}
        self.trained = {name for name, _, spec in adapter.named_tensors() if spec.trained}
        self.tensors = {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}

    @property
    def blocks(self) -> set[str]:
        """The sites where it replaces a whole module."""
        return {path for path, method in self.methods.items() if method.family == "block"}

    @property
    def dense(self) -> bool:
        """Whether it is a change of weights, and nothing else in the backward pass."""
        return all(
            isinstance(m, WeightDelta)
            or (isinstance(m, Bottleneck) and (m.plain or type(m).gain is not Bottleneck.gain))
            for m in self.methods.values()
        )

    @property
    def merges(self) -> bool:
        return all(method.fusing != "never" for method in self.methods.values())

    @property
    def exact(self) -> bool:
        """Whether all of its tensors are in float64."""
        return all(t.dtype == torch.float64 for t in self.tensors.values() if t.is_floating_point())

    def at(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that its method reads at a site, in float64."""
        prefixes = [f"{path}."] + (["shared."] if path in self.sharing else [])
        found = {n.removeprefix(p): t for p in reversed(prefixes) for n, t in tensors.items() if n.startswith(p)}
        return {n: t.double() if t.is_floating_point() else t for n, t in found.items()}

    def deltas(self, sites: Mapping[str, Site], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The update of every weight in its native layout, by the parameter's name in the model."""
        found = {}
        for path, method in self.methods.items():
            site = sites[path]
            update = method.delta(self.at(path, self.tensors if tensors is None else tensors), site)
            found[f"{path}.{site.parameter}"] = site.kind.to_weight(site, update)
        return found

    def attach(self, model: Any) -> lorry.Adapter:
        """Give a fresh copy of the base an adapter with these tensors."""
        adapter = lorry.attach(
            model, self.method, targets=self.targets, name=self.name, dtype=torch.float64, activate=False
        )
        with torch.no_grad():
            for name, tensor, _ in adapter.named_tensors():
                tensor.copy_(self.tensors[name])
        return adapter


class Dense:
    """A base that never met Lorry, and what is in its weights now.

    Attributes
    ----------
    plain
        The base as it was.
    base
        A copy with the updates of `inside` in its weights.
    inside
        The adapters that are part of the weights, in the order in which they were merged, with their weights.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = copy.deepcopy(plain)
        self.inside: list[tuple[Twin, float]] = []
        self.refresh()

    def refresh(self) -> None:
        """Work the weights out anew."""
        self.base = copy.deepcopy(self.plain)
        self.sites = catalogue(self.base)
        parameters = dict(self.base.named_parameters())
        with torch.no_grad():
            for twin, weight in self.inside:
                for name, update in twin.deltas(self.sites).items():
                    parameters[name].add_(weight * update)

    def weights(
        self, composition: Composition, twins: Mapping[str, Twin], tensors: Mapping[str, Mapping[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        """The weights of the model under a composition of changes of weights."""
        current = {n: p.detach() for n, p in self.base.named_parameters()}
        here = {twin.name for twin, _ in self.inside}
        for name, weight in composition.items():
            if name in here or not weight:
                continue
            for key, update in twins[name].deltas(self.sites, (tensors or {}).get(name)).items():
                current[key] = current[key] + weight * update
        return current

    def forward(
        self,
        ids: Tensor,
        composition: Composition,
        twins: Mapping[str, Twin],
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Tensor:
        """The logits that a composition must give; with `tensors`, as a function of these."""
        used = [twins[n] for n, w in composition.items() if w]
        if all(twin.dense for twin in used):
            return functional_call(self.base, self.weights(composition, twins, tensors), (ids,)).logits
        model = copy.deepcopy(self.base)
        here = {twin.name for twin, _ in self.inside}
        others = {twin.name: composition[twin.name] for twin in used if twin.name not in here}
        for name in others:
            twins[name].attach(model)
        lorry.activate(model, others or None)
        return model(ids).logits

    def rows(self, ids: Tensor, compositions: Sequence[Composition], twins: Mapping[str, Twin]) -> Tensor:
        """The logits of a batch in which each row has its own composition."""
        with torch.no_grad():
            return torch.cat([self.forward(ids[i : i + 1], c, twins) for i, c in enumerate(compositions)])

    def trained(self, ids: Tensor, name: str, twins: Mapping[str, Twin], rate: float) -> dict[str, Tensor]:
        """The tensors of an adapter after a step of plain gradient descent on `loss_of`, while it alone is active."""
        twin = twins[name]
        tensors = {n: t.clone().requires_grad_(n in twin.trained) for n, t in twin.tensors.items()}
        if twin.dense:
            loss_of(self.forward(ids, {name: 1.0}, twins, {name: tensors})).backward()
            gradients = {n: tensors[n].grad for n in twin.trained}
        else:
            model = copy.deepcopy(self.base)
            adapter = twin.attach(model)
            lorry.activate(model, name)
            loss_of(model(ids).logits).backward()
            gradients = {n: p.grad for n, p in adapter.named_parameters()}
        steps = {n: rate * g for n, g in gradients.items() if g is not None}
        return {n: t.detach() - steps[n] if n in steps else t.detach() for n, t in tensors.items()}


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()
