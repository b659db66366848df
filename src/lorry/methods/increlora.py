"""IncreLoRA: ranks that grow during training where they matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.families import check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Places, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.adalora import AdaLoRA, importance


@register("increlora", paper="arXiv 2308.12043")
@dataclass(frozen=True)
class IncreLoRA(AdaLoRA):
    """``ΔW = scale · B diag(kept · E) A``: every site begins with `initial_rank` triplets, and gets further ones while
    its importance is among the highest, until the mean is `target_rank`.

    A site's importance is the mean over its triplets of AdaLoRA's (smoothed sensitivity times uncertainty). The budget
    rises evenly over the steps between `warmup` and the last `final` ones; each site gets at most one triplet at a
    time. Triplets in reserve are made orthogonal to the others beforehand, and enter with E zero, so that growing
    changes nothing by itself.

    Use it where you do not know which layers need rank, and training should begin small; give it the length of the
    run.
    """

    initial_rank: int = option(2, "Rank of every site at the start.", at_least=1)
    most_rank: int = option(12, "Largest rank of a site.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/most_rank; that rank if not given.", above=0)

    def check(self) -> None:
        """Refuse a budget that would fall."""
        if not self.initial_rank <= self.target_rank <= self.most_rank:
            raise OptionError(
                "IncreLoRA: target_rank must lie between initial_rank and most_rank, found initial_rank "
                f"{self.initial_rank}, target_rank {self.target_rank} and most_rank {self.most_rank}."
            )

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.most_rank, "most_rank")

    @property
    def stored(self) -> int:
        """The largest rank."""
        return self.most_rank

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the tensors of AdaLoRA; the first triplets are kept."""

        def first(tensor: Tensor, generator: Generator) -> None:
            tensor.zero_()
            tensor[..., : self.initial_rank] = True

        specs = super().tensors(site)
        return {**specs, "kept": TensorSpec(specs["kept"].shape, first, trained=False, dtype=torch.bool)}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return ``diag(kept · E) A`` and B."""
        return (tensors["E"] * tensors["kept"]).unsqueeze(-1) * tensors["A"], tensors["B"]

    def budget(self, step: int, total: int, sites: int) -> int:
        """Return how many triplets of `sites` matrices there may be after `step`."""
        done = min(max((step - self.warmup) / max(total - self.final - self.warmup, 1), 0.0), 1.0)
        return int((self.initial_rank + (self.target_rank - self.initial_rank) * done) * sites)

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Follow the importance of every triplet, and let the most important sites grow."""
        for _, tensors in places:
            self._follow(tensors)
        if step <= self.warmup or step % self.interval:
            return
        kept = torch.cat([t["kept"].reshape(-1, self.stored) for _, t in places])
        scores = torch.cat([importance(t).reshape(-1, self.stored) for _, t in places])
        missing = self.budget(step, total, len(kept)) - int(kept.sum())
        each = (scores * kept).sum(-1) / kept.sum(-1)
        each = each.masked_fill(kept.all(-1), -torch.inf)
        for row in each.sort(descending=True, stable=True).indices[: max(missing, 0)].tolist():
            free = (~kept[row]).nonzero()
            if len(free):
                kept[row, free[0]] = True
        sizes = [t["kept"].numel() // self.stored for _, t in places]
        for (_, tensors), part in zip(places, kept.split(sizes), strict=True):
            tensors["E"].masked_fill_(~tensors["kept"], 0)  # what enters does so at zero, whatever decay did to it
            tensors["kept"].copy_(part.view_as(tensors["kept"]))
