"""Updates of biases, put into the base beside those of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lorry.core.forward.entry import Entry, TensorHome
from lorry.core.life.base_edits import Exchanged
from lorry.core.method.base import FuseClass
from lorry.core.method.families import WeightDelta
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.sites.site import Kind, Site


class _BiasKind(Kind):
    """The bias of a layer as a matrix ``(out, 1)``; it stands for a place to write to and carries no adapters."""

    name = "bias"
    additive = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield nothing: a bias is reached by the site of its layer."""
        return iter(())

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Return the bias as a column."""
        return weight.unsqueeze(-1)

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Return the column as a bias."""
        return matrix.squeeze(-1)


class _Known(WeightDelta):
    """An update that was worked out already."""

    fusing: FuseClass = "exact"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the update itself."""
        return {"delta": TensorSpec(site.shape)}

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return it."""
        return tensors["delta"]


class _NoBias(Site):
    """A bias that the layer does not have: it reads as zeros."""

    @property
    def stored(self) -> Tensor:
        """Zeros in the type of the layer's output."""
        weight = next(p for p in self.owner.parameters(recurse=False))
        kind = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
        return torch.zeros(self.out_features, dtype=kind, device=weight.device)


class AddedBias(Exchanged):
    """A bias at a layer that had none; putting back takes it away."""

    def __init__(self, holder: nn.Module, name: str, fused: nn.Parameter, keep: bool) -> None:
        super().__init__(holder, name, nn.Parameter(torch.zeros(0), requires_grad=False) if keep else None, fused)

    def put_back(self) -> None:
        """Take the bias away."""
        self.holder._parameters[self.name] = None


_KIND, _KNOWN = _BiasKind(), _Known()


def with_biases(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of an adapter, and one more for each bias that its methods change."""
    found = list(entries)
    for entry in entries:
        update = entry.method.bias_delta(entry.tensors(), entry.site)
        if update is not None:
            found.append(_entry(entry, update.detach()))
    return found


def _entry(entry: Entry, update: Tensor) -> Entry:
    site = entry.site
    cls = _NoBias if site.owner._parameters.get("bias") is None else Site
    bias = cls(f"{site.path}.bias", _KIND, site.owner, site.owner, "bias", site.out_features, 1)
    values = {"delta": update.unsqueeze(-1)}
    return Entry(entry.name, bias, _KNOWN, TensorHome(_KNOWN.tensors(bias), values), None)


def added_notes(entries: Sequence[Entry]) -> list[str]:
    """Return what should be known of biases that were added where the base has none."""
    added = [entry.site.path for entry in entries if isinstance(entry.site, _NoBias)]
    if not added:
        return []
    return [
        f"{len(added)} layers got a bias that their architecture does not have, e.g. '{added[0]}': the fused model "
        "computes with it here, but transformers leaves it out when the model is saved and loaded"
    ]
