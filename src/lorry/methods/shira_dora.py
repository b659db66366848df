"""SHiRA-DoRA: a DoRA of high rank, of whose change of the weight only a few entries are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import SiteError
from lorry.core.method.families import WeightDelta, check_rank, norms_of_sum
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming, ones
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.kernels.sparse import scatter


@register("shira-dora", paper="arXiv 2406.13175", linear_in_scale=False)
@dataclass(frozen=True)
class SHiRADoRA(WeightDelta):
    """``ΔW = M ⊙ (m ⊙ (W + scale · B A) / ‖W + scale · B A‖ - W)`` with M the largest ``|W|`` of each matrix.

    The paper gives one sentence: a DoRA of high rank (6.25 % of the weights are trained) whose change is multiplied by
    a mask (1 % of the weights change). The norms are constant in the gradient, as in DoRA. What is trained is the DoRA;
    what fuses, switches and disturbs other adapters is sparse.

    Use it in SHiRA's place where a dense update should be trained and only the result be sparse.
    """

    rank: int = option(32, "Rank of the DoRA.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    density: float = option(0.01, "Fraction of the positions that change.", above=0, at_most=1)
    part: int = option(0, "Which of the largest positions, counted in their number.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer, and more positions than the weight has."""
        check_rank(site, self.rank)
        needed, size = self._count(site) * (self.part + 1), site.out_features * site.in_features
        if needed > size:
            raise SiteError(f"'{site.path}' has {size} positions, but part {self.part} needs {needed}.")

    def _count(self, site: Site) -> int:
        return max(1, round(self.density * site.out_features * site.in_features))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, the magnitude m ``(out,)`` and the flat positions in ``(*lead, out, in)``, ascending."""
        kind = torch.int32 if math.prod(site.shape) < 2**31 else torch.int64
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, self.rank)),
            "magnitude": TensorSpec((*site.lead, site.out_features), ones),
            "index": TensorSpec(
                (math.prod(site.lead) * self._count(site),),
                trained=False,
                dtype=kind,
                within=range(math.prod(site.shape)),
                rising=True,
            ),
        }

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Start the magnitude at the norms of the weight, and choose the positions."""
        tensors["magnitude"].copy_(norms_of_sum(site, None, None, 0.0))
        count, size = self._count(site), site.out_features * site.in_features
        flat = site.matrix().abs().reshape(-1, size).float().cpu()
        best = flat.sort(descending=True, stable=True).indices[:, self.part * count : (self.part + 1) * count]
        tensors["index"].copy_((best.sort().values + torch.arange(len(flat))[:, None] * size).flatten())

    def sparse(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return positions, and the change there."""
        a, b, index = tensors["A"], tensors["B"], tensors["index"].long()
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        # a site's matrix is ``(*lead, out, in)``: positions of all experts count on
        row, column = index // site.in_features, index % site.in_features
        expert = row // site.out_features
        down = a.reshape(-1, self.rank, site.in_features)[expert, :, column]
        up = b.reshape(-1, self.rank)[row]
        with torch.no_grad():
            norms = norms_of_sum(site, a, b, scale).reshape(-1)
            own = site.matrix().reshape(-1)[index].to(a.dtype)
        gain = tensors["magnitude"].reshape(-1)[row] / norms[row].to(a.dtype)
        return tensors["index"], gain * (own + scale * (up * down).sum(-1)) - own

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the change at its positions."""
        index, values = self.sparse(tensors, site)
        return scatter(values, index, math.prod(site.shape)).view(site.shape)
