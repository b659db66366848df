"""CoMoL: experts that differ only in a small core between one shared down- and one shared up-projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.base import Expert
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming, normal, zeros
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.experts import pair
from lorry.methods.parts.routing import precise, report


@register("comol", paper="arXiv 2603.00573", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class CoMoL(Bottleneck):
    """``ΔW x = alpha/rank · B (Σ_i g_i M_i) A x`` with gates ``g = softmax(W A x)`` over N cores ``(rank,
    rank)``.

    Gates read the code A x, or x itself (the paper's ablation, ``router_input="full"``). The start is not in
    the sources: with ``start="up"`` B is zero and the cores are random, with "core" the other way round.
    It can be made from LoRAs that exist, see `lorry.formats.mixture`: A and B are the singular vectors of the first,
    and each M_j the projection of LoRA j, times its weight, exact for the first alone. A single core is a plain LoRA
    and fuses exactly.

    Use it for several tasks in one adapter where whole experts would be too many values: a further expert costs
    rank squared.
    """

    rank: int = option(16, "Width of the shared code.", at_least=1)
    experts: int = option(8, "Number of cores.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    router_input: str = option("core", "What the router reads.", choices=("core", "full"))
    router_std: float = option(0.02, "Standard deviation of the router at the start.", at_least=0)
    router_bias: bool = option(False, "Give the router a bias.")
    start: str = option("up", "Which of B and the cores is zero at the start.", choices=("up", "core"))
    train_factors: bool = option(True, "Train A and B and not the cores and the router alone.")
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse a start from which nothing could ever be trained."""
        if not self.train_factors and self.start == "up":
            raise OptionError("CoMoL: with train_factors=False and start='up', B would stay zero; use start='core'.")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A ``(rank, in)``, B ``(out, rank)``, the cores ``(experts, rank, rank)`` and the router."""
        r, n, up = self.rank, self.experts, self.start == "up"
        core = normal(1 / math.sqrt(r)) if up else zeros
        specs = {
            "A": TensorSpec((r, site.in_features), kaiming, self.train_factors),
            "B": TensorSpec((site.out_features, r), zeros if up else kaiming, self.train_factors),
            "cores": TensorSpec((n, r, r), core),
        }
        width, choice = r if self.router_input == "core" else site.in_features, not self.constant
        specs["router"] = TensorSpec((n, width), normal(self.router_std), trained=choice)
        return {**specs, "router_bias": TensorSpec((n,), trained=choice)} if self.router_bias else specs

    def with_experts(self, experts: Sequence[Expert]) -> Self:
        """Return the method with a core for each LoRA, in the code of the first, A and B frozen."""
        return self.with_options(
            rank=len(pair(experts[0])[0]),
            experts=len(experts),
            alpha=None,
            train_factors=False,
            start="core",
            router_bias=True,
            router_std=min(self.router_std, 1e-3),
        )

    def adopt(self, tensors: Tensors, site: Site, experts: Sequence[Expert]) -> float:
        """Take A and B from the singular vectors of the first LoRA, and project each LoRA onto them."""
        pairs = [pair(expert) for expert in experts]
        a, b, _ = pairs[0]
        up = torch.linalg.svd(b.double(), full_matrices=False)[0]
        down = torch.linalg.svd(a.double(), full_matrices=False)[2]
        tensors["A"].copy_(down)
        tensors["B"].copy_(up)
        lost = whole = 0.0
        for core, (a, b, scale) in zip(tensors["cores"], pairs, strict=True):
            left, right = scale * (up.mT @ b.double()), a.double() @ down.mT
            core.copy_(left @ right)
            # norms of products through (r, r) matrices; the rest is orthogonal to what is kept
            size = float(((b.mT @ b).double() * scale**2 * (a @ a.mT).double().mT).sum())
            whole, lost = whole + size, lost + size - float((left @ right).square().sum())
        return math.sqrt(max(lost, 0.0) / whole) if whole else 0.0

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A and B, which takes a single core in."""
        return tensors["A"], tensors["B"] @ tensors["cores"][0] if self.constant else tensors["B"]

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def constant(self) -> bool:
        """Whether there is a single core."""
        return self.experts == 1

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Apply the cores, mixed for each token: all of them in one product, then their weighted sum."""
        if self.constant:
            return h
        # flat, so that products are folded, and rounded, alike whether or not something needs a gradient
        code, router, bias = h.reshape(-1, self.rank), tensors["router"], tensors.get("router_bias")
        full = self.router_input == "full"
        logits = call.project(router).flatten(0, -2) if full else precise(F.linear(code, router.to(h.dtype)))
        gates = (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1)
        shaped = gates.view(*h.shape[:-1], self.experts)
        report(call, shaped, shaped)
        outputs = F.linear(code, tensors["cores"].flatten(0, 1).to(h.dtype)).view(-1, self.experts, self.rank)
        return torch.bmm(gates.to(h.dtype).unsqueeze(1), outputs).view(h.shape)
