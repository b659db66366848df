"""BSLoRA: each layer has factors of its own, others shared within its block, and others shared by all blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, kaiming, ones
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.core.sites.stacks import split_at_number


@register("bslora", paper="arXiv 2601.22708", kinds=lambda kind: kind.plain_product)
@dataclass(frozen=True)
class BSLoRA(Bottleneck):
    """``ΔW = scale · (B A + B_i A_i + B_g A_g)``: the second pair is shared by the sites of one block of the model, the
    third by all sites.

    Sites differ in shape; `bridge` says how a shared pair fits them. "slice": it has the largest widths, and a site
    uses its first rows and columns. "kronecker": it has the greatest common divisors of the widths, and each site
    repeats it with trained weights. "gate": it has the largest widths, and goes through two trained vectors to the
    site's width.

    Use it where LoRA's values are too many: a low local rank and shared ranks for the rest.
    """

    rank: int = option(2, "Rank of each site's own pair.", at_least=1)
    intra_rank: int = option(2, "Rank of the pair of a block.", at_least=1)
    inter_rank: int = option(2, "Rank of the pair of the whole model.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    bridge: str = option("slice", "How shared pairs fit a site.", choices=("slice", "kronecker", "gate"))
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.rank)

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return what belongs to the site, if it were alone."""
        return self.layout([site]).sites[site.path]

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the sites' own pairs and bridges, and the pairs of the blocks and of the model."""
        layout = Layout({s.path: _pair(self.rank, s.in_features, s.out_features) for s in sites})
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(block_of(site), []).append(site)
        for name, rank, members in [
            *((f"block.{name}", self.intra_rank, group) for name, group in groups.items()),
            ("all", self.inter_rank, list(sites)),
        ]:
            size = math.gcd if self.bridge == "kronecker" else max
            inner, outer = size(*(s.in_features for s in members), 0), size(*(s.out_features for s in members), 0)
            pair = _pair(rank, inner, outer)
            layout.shared.update({f"{name}.{key}": spec for key, spec in pair.items()})
            for site in members:
                bridges = self._bridges(name.partition(".")[0], site, inner, outer)
                layout.sites[site.path].update(bridges)
        return layout

    def _bridges(self, kind: str, site: Site, inner: int, outer: int) -> dict[str, TensorSpec]:
        if self.bridge == "slice":
            return {}
        if self.bridge == "kronecker":
            return {
                f"{kind}_in": TensorSpec((site.in_features // inner,), ones),
                f"{kind}_out": TensorSpec((site.out_features // outer,), ones),
            }
        gates = {"in": (inner, site.in_features), "out": (outer, site.out_features)}
        return {
            f"{kind}_{side}_{n}": TensorSpec((s,), kaiming) for side, pair in gates.items() for n, s in enumerate(pair)
        }

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the three pairs side by side."""
        pairs = [(tensors["A"], tensors["B"])]
        for kind, name in (("block", f"block.{block_of(site)}"), ("all", "all")):
            a = self._fitted(tensors[f"{name}.A"], tensors, f"{kind}_in", site.in_features)
            b = self._fitted(tensors[f"{name}.B"].mT, tensors, f"{kind}_out", site.out_features)
            pairs.append((a, b.mT))
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)

    def _fitted(self, shared: Tensor, tensors: Tensors, name: str, width: int) -> Tensor:
        """Return a shared matrix ``(rank, shared width)`` as ``(rank, width)``."""
        if self.bridge == "slice":
            return shared[:, :width]
        if self.bridge == "kronecker":
            return (tensors[name].unsqueeze(-1) * shared.unsqueeze(-2)).flatten(-2)
        return (shared @ tensors[f"{name}_0"]).unsqueeze(-1) * tensors[f"{name}_1"]


def block_of(site: Site) -> str:
    """Return the block that a site lies in: its path up to the first number; empty outside all blocks."""
    found = split_at_number(site.path)
    return "" if found is None else f"{found[0]}.{found[1]}"


def _pair(rank: int, inner: int, outer: int) -> dict[str, TensorSpec]:
    return {"A": TensorSpec((rank, inner), kaiming), "B": TensorSpec((outer, rank))}
