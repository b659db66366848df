"""MoS: the LoRAs of all blocks are put together from shared pools of vector shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Init, Layout, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.sharing import type_of, uniform


@register("mos", paper="arXiv 2410.00938")
@dataclass(frozen=True)
class MoS(Bottleneck):
    """``ΔW = scale · B A``: A and B of rank `rank` whose vectors are concatenations of `shards` rows of pools that
    sites of one type share (section 3).

    Sites are of one type if their paths differ in numbers of layers only and their shapes are equal. The pools of a
    type with L sites have as many values as L LoRAs of rank `budget`, whatever `rank` is. Which rows a site
    uses is drawn once; the last ``private`` ranks of each site are rows that no other site uses. Nothing
    depends on the input.

    Use it where the count of trained values is the limit and sites are alike, as in deep models with equal blocks.
    """

    budget: int = option(2, "Rank e of the LoRA that has as many parameters.", at_least=1)
    rank: int | None = option(
        None, "Rank that is built; four times the budget if not given, or what the pools allow.", at_least=1
    )
    private: int = option(0, "Ranks of each site that are its own, of the budget.", at_least=0)
    shards: int | None = option(
        None,
        "Shards for each vector, dividing both widths; the largest of 4, 2 and 1 that does if not given.",
        at_least=1,
    )
    dissociated: bool = option(True, "Draw the rows of A and of B independently.")
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse ranks that contradict each other."""
        if self.private > self.budget:
            raise OptionError(
                f"MoS: private must be at most budget, found private {self.private} and budget {self.budget}."
            )
        if self.rank is not None and self.rank < self.private:
            raise OptionError(f"MoS: rank must be at least private, found rank {self.rank} and private {self.private}.")
        if self.rank is not None and self.private == self.budget != self.rank:
            raise OptionError(
                f"MoS: without public rows (private = budget = {self.budget}) rank must be {self.budget}, "
                f"found {self.rank}."
            )

        if self.rank is None and self.alpha is not None:
            raise OptionError("MoS: alpha needs an explicit rank, since the scale is alpha/rank.")

    def check_site(self, site: Site) -> None:
        """Refuse shards that do not divide both widths."""
        if self.shards and (site.in_features % self.shards or site.out_features % self.shards):
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: shards must divide both, "
                f"found {self.shards}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the site's choice of rows; the pools belong to all sites of its type."""
        return self.layout([site]).sites[site.path]

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the pools of every type, and each site's choice of rows."""
        types: dict[str, list[Site]] = {}
        for site in sites:
            types.setdefault(type_of(site), []).append(site)
        layout = Layout({site.path: {} for site in sites})
        for name, members in types.items():
            first, count, shards = members[0], len(members), self._shards(members[0])
            rows, rank = self.budget * count * shards, self._rank(count)
            inner, outer = first.in_features // shards, first.out_features // shards
            layout.shared[f"{name}.A"] = TensorSpec((*first.lead, rows, inner), uniform(first.in_features))
            layout.shared[f"{name}.B"] = TensorSpec((*first.lead, rows, outer))
            for number, site in enumerate(members):
                choice = self._choice(rank, count, number, shards)
                spec = TensorSpec((rank * shards,), choice, False, torch.int64, within=range(rows))
                layout.sites[site.path].update({f"index_{f}": spec for f in ("AB" if self.dissociated else "A")})
        return layout

    def _shards(self, site: Site) -> int:
        divides = [n for n in (4, 2, 1) if site.in_features % n == 0 == site.out_features % n]
        return self.shards or divides[0]

    def _rank(self, count: int) -> int:
        most = self.private + (self.budget - self.private) * count
        if self.rank is not None and self.rank > most:
            raise SiteError(
                f"MoS: {count} sites of one type with budget {self.budget} and private {self.private} allow rank "
                f"{most} at most, found {self.rank}."
            )
        return self.rank or min(4 * self.budget, most)

    def _choice(self, rank: int, count: int, number: int, shards: int) -> Init:
        public = (self.budget - self.private) * count * shards
        own = torch.arange(self.private * shards) + public + number * self.private * shards

        def draw(tensor: Tensor, generator: Generator) -> None:
            drawn = torch.randperm(public, generator=generator)[: (rank - self.private) * shards]
            tensor.copy_(torch.cat([drawn, own]))

        return draw

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A with row t, and B with column t, put together from shards t·l to t·l + l - 1 of the site's
        choice.
        """
        name = type_of(site)
        chosen = tensors["index_A"]
        a = tensors[f"{name}.A"].index_select(-2, chosen)
        b = tensors[f"{name}.B"].index_select(-2, tensors.get("index_B", chosen))
        return a.reshape(*site.lead, -1, site.in_features), b.reshape(*site.lead, -1, site.out_features).mT

    def scale(self, site: Site) -> float:
        """Return alpha over the rank that is built."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
