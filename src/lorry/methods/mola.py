"""MoLA: mixtures of LoRAs whose number of experts depends on the depth of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorry.core.method.base import Method
from lorry.core.method.registry import register
from lorry.core.options import option
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.site import Site
from lorry.core.sites.stacks import find_stacks
from lorry.methods.loramoe import LoRAMoE

#: Experts in each quarter of the model, as multiples of the option.
SHAPES = {
    "inverted-triangle": (0.25, 0.5, 2.0, 4.0),
    "triangle": (4.0, 2.0, 0.5, 0.25),
    "hourglass": (4.0, 0.25, 0.25, 4.0),
    "rectangle": (1.0, 1.0, 1.0, 1.0),
}


@register("mola", paper="arXiv 2402.08562", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class MoLA(LoRAMoE):
    """``ΔW x = scale · Σ_e g_e(x) B_e A_e x`` as in LoRAMoE, with `experts` times a factor experts in each quarter of
    the model's depth (section 3.2).

    The factors from below to above are 1/4, 1/2, 2, 4 for the inverted triangle, in which higher layers have more; 4,
    2, 1/2, 1/4 for the triangle; 4, 1/4, 1/4, 4 for the hourglass. Sites outside the model's main stack have `experts`.
    A public program works the numbers out and never makes the experts.

    Use it in place of LoRAMoE in deep models: in the paper, more experts above do better than as many everywhere.
    """

    shape: str = option("inverted-triangle", "How the number of experts goes with depth.", choices=tuple(SHAPES))

    def place(self, sites: Sequence[Site], root: nn.Module) -> Sequence[tuple[Site, Method]]:
        """Give each site the number of experts of its depth."""
        stacks = find_stacks(catalogue(root), root)
        depth = stacks.lengths.get(stacks.main, 0) if stacks.main else 0
        return [(site, self._at(site.layer, depth)) for site in sites]

    def _at(self, layer: int | None, depth: int) -> Method:
        factor = 1.0 if layer is None or not depth else SHAPES[self.shape][min(4 * layer // depth, 3)]
        experts = max(1, round(self.experts * factor))
        # with its own number, so that it is not multiplied again
        return self.with_options(experts=experts, top_k=min(self.top_k, experts), shape="rectangle")
