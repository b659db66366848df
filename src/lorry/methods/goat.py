"""GOAT: a mixture of LoRAs that start at different segments of the weight's singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.loramoe import LoRAMoE
from lorry.methods.parts.decompose import split_evenly
from lorry.methods.parts.routing import ranked


@register("goat", paper="arXiv 2502.16894", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class GOAT(LoRAMoE):
    """``ΔW x = s · Σ_e g_e(x) (B_e A_e - B_e0 A_e0) x`` with ``s = √(3 · eta · in / rank)``: expert e starts at the
    e-th of as many segments of W's singular triples, divided by ``rho · s`` (sections 3.2 and 3.3).

    The gates are the softmax over all experts, of which the chosen ones are divided by their sum. The paper takes the
    mean of the experts' starts out of W, which leaves the function unchanged in the mean over tokens only; here each
    expert has its own start taken back, exactly for every token. In layers with fewer triples than the experts have
    ranks the segments overlap. With alpha the scale is alpha/rank instead of s.

    Use it in place of LoRAMoE where an SVD of each weight is affordable: the experts begin apart and at full speed.
    """

    segment: str = option("first", "Which triples of its segment an expert takes.", choices=("first", "last"))
    rho: float = option(10.0, "How much smaller the experts start than their triples.", above=0)
    eta: float = option(1.0, "Learning rate of full fine-tuning relative to this one's, in the scale.", above=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the tensors of the mixture, and the frozen pairs that the experts started from."""
        specs = super().tensors(site)
        return {**specs, **{f"{n}0": TensorSpec(specs[n].shape, trained=False) for n in "AB"}}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Give each expert triples of its segment of the spectrum."""
        u, s, vt = torch.linalg.svd(site.matrix().float(), full_matrices=False)
        length, last = len(s) // self.experts, len(s) - self.rank
        first = max(length - self.rank, 0) if self.segment == "last" else 0
        begins = [min(e * length + first, last) for e in range(self.experts)]
        chosen = torch.cat([torch.arange(begin, begin + self.rank) for begin in begins]).to(s.device)
        a, b = split_evenly(u[:, chosen], s[chosen], vt[chosen], self.scale(site) * self.rho)
        for name, value in {"A": a, "B": b, "A0": a, "B0": b}.items():
            tensors[name].copy_(value)

    def scale(self, site: Site) -> float:
        """Return √(3 · eta · in / rank), or what alpha makes of it."""
        if self.alpha is not None or self.rank_stabilized:
            return super().scale(site)
        return math.sqrt(3 * self.eta * site.in_features / self.rank)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the experts beside their starts with the opposite sign."""
        a, b = tensors["A"], tensors["B"]
        return torch.cat([a, tensors["A0"].to(a)]), torch.cat([b, -tensors["B0"].to(b)], -1)

    def gates(self, logits: Tensor, call: Call) -> Tensor:
        """Return the gates ``(..., experts)``: the chosen probabilities over their sum."""
        p = logits.softmax(-1)
        chosen = ranked(p.detach(), self.top_k)
        self.leave_balance(p, chosen, call)
        weights = p.gather(-1, chosen)
        return torch.zeros_like(p).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
