"""LoRA-Mixer: a learned router over task LoRAs, trained here or brought from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.base import Expert
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, constant, kaiming, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.experts import pair, side_by_side
from lorry.methods.parts.routing import check_top_k, entropy, input_router, over_ranks, report, top_k_mask
from lorry.methods.parts.tasks import one_hot_tasks

_MODES = ("soft", "sparse", "hard")
_SIGNS = ("specialise", "paper_formula")


@register("lora-mixer", paper="arXiv 2507.00029", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class LoRAMixer(Bottleneck):
    """``ΔW x = Σ_e p_e(x) scale_e B_e A_e x`` with ``p = softmax(R x)``: all experts in training, the best k later, or
    the labelled one.

    It can be made from LoRAs (of any ranks) that exist, see `lorry.formats.mixture`; those stay as they are, and a
    weight multiplies its expert. With ``router_std=0`` and soft routing it is their average until the router is
    trained. Its loss is ``load_balance Σ p̄ f̄ ± entropy mean H(p)`` (equation 5). As printed, the sign is
    minus, which makes routing flat, while the text wants it selective: ``entropy_sign`` is "specialise" by default,
    "paper_formula" is as printed.
    f̄ is the share of tokens whose best expert it is (equation 3), or the mass in the first k, as a later passage has
    it. One expert is a plain LoRA in every mode.

    Use it for several tasks with labelled examples, or to route between LoRAs that exist already.
    """

    experts: int = option(4, "Number of LoRAs at each layer.", at_least=1)
    rank: int = option(8, "Rank of each.", at_least=1)
    ranks: tuple[int, ...] | None = option(None, "Rank of each expert where they differ.")
    alpha: float | None = option(None, "Scale is alpha/rank; the rank itself if not given.", above=0)
    top_k: int = option(3, "Experts that are kept in sparse routing.", at_least=1)
    renormalize_topk: bool = option(False, "Let the kept weights sum to 1.")
    training_mode: str = option("soft", "Routing in training.", choices=_MODES)
    inference_mode: str = option("sparse", "Routing later.", choices=_MODES)
    shared_router: bool = option(True, "One router for queries, keys and values of an attention.")
    router_std: float = option(0.02, "Standard deviation of the router at the start; 0 is uniform.", at_least=0)
    train_experts: bool = option(True, "Train the experts and not the router alone.")
    load_balance: float = option(0.1, "Weight of the balance loss.", at_least=0)
    entropy: float = option(0.01, "Weight of the entropy of each token's routing.", at_least=0)
    entropy_sign: str = option("specialise", "Minimise or maximise it.", choices=_SIGNS)
    load: str = option("top1", "What counts as an expert's load.", choices=("top1", "mass"))
    preserve: float = option(0.0, "Weight of the experts' squared distance from their start.", at_least=0)
    dropout: float = option(0.0, "Dropped fraction of the input in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse more kept experts than there are, ranks of another number, and a penalty on frozen experts."""
        check_top_k(self, self.top_k, self.experts)
        if self.ranks is not None and (len(self.ranks) != self.experts or min(self.ranks) < 1):
            raise OptionError(f"LoRAMixer: ranks must be {self.experts} positive numbers, found {self.ranks}.")
        if self.preserve and not self.train_experts:
            raise OptionError(f"LoRAMixer: preserve={self.preserve} needs train_experts=True, found False.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the rank of each expert."""
        return self.ranks or (self.rank,) * self.experts

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the experts' A ``(Σ ranks, in)``, B ``(out, Σ ranks)`` and scales, the router; A0, B0 if preserved."""
        total, width = sum(self.sizes), site.in_features
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        specs = {
            "A": TensorSpec((total, width), kaiming, self.train_experts),
            "B": TensorSpec((site.out_features, total), trained=self.train_experts),
            "scales": TensorSpec((self.experts,), constant(scale), trained=False, dtype=torch.float32),
            "router": TensorSpec((self.experts, width), normal(self.router_std), trained=not self.constant),
        }
        if self.preserve:
            specs |= {f"{n}0": TensorSpec(specs[n].shape, trained=False) for n in ("A", "B")}
        return specs

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the tensors of all sites, with the routers that several of them share taken out."""
        layout = super().layout(sites)
        if self.shared_router:
            layout.shared.update({input_router(s): layout.sites[s.path].pop("router") for s in sites})
        return layout

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Remember the start of the experts."""
        if self.preserve:
            tensors["A0"].copy_(tensors["A"])
            tensors["B0"].copy_(tensors["B"])

    def with_experts(self, experts: Sequence[Expert]) -> Self:
        """Return the method for these experts, frozen unless a penalty preserves them."""
        ranks = tuple(len(pair(expert)[0]) for expert in experts)
        most = min(self.top_k, len(ranks))
        return self.with_options(
            experts=len(ranks), ranks=ranks, top_k=most, train_experts=self.preserve > 0, alpha=None
        )

    def adopt(self, tensors: Tensors, site: Site, experts: Sequence[Expert]) -> float:
        """Copy the experts as they are."""
        side_by_side(tensors, [pair(expert) for expert in experts])
        self.setup(dict(tensors), site, Generator())
        return 0.0

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A, and B with each expert's scale."""
        b = tensors["B"]
        return tensors["A"], b * over_ranks(tensors["scales"], self.sizes).to(b.dtype)

    @property
    def constant(self) -> bool:
        """Whether there is a single expert."""
        return self.experts == 1

    @property
    def plain(self) -> bool:
        """Whether there is a single expert and no penalty to leave."""
        return self.constant and not self.preserve

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Weigh the experts' rank units."""
        if self.preserve and call.training:
            distance = sum((tensors[n] - tensors[f"{n}0"]).square().sum() for n in ("A", "B"))
            call.add_loss("preserve", self.preserve * distance)  # type: ignore[arg-type]
        mode = self.training_mode if call.training else self.inference_mode
        if self.constant:
            return h
        if mode == "hard":
            gates = one_hot_tasks(call, self.experts, h.ndim)
            report(call, gates.expand(*h.shape[:-1], -1))
            return h * over_ranks(gates, self.sizes).to(h.dtype)
        router = tensors[input_router(call.site)] if self.shared_router else tensors["router"]
        p = call.project(router).softmax(-1)
        gates = p if mode == "soft" else p * top_k_mask(p.detach(), self.top_k)
        if mode == "sparse" and self.renormalize_topk:
            gates = gates / gates.sum(-1, keepdim=True)
        if call.training and (self.load_balance or self.entropy):
            place = input_router(call.site) if self.shared_router else None
            call.add_loss("routing", self.loss(p, call.of_tokens(call.context.padding_mask)), place)
        report(call, gates, p)
        return h * over_ranks(gates, self.sizes).to(h.dtype)

    def loss(self, p: Tensor, real: Tensor | None) -> Tensor:
        """Return the routing loss of probabilities ``(..., experts)``; loads are constants."""
        flat = p.reshape(-1, self.experts) if real is None else p[real]
        held = flat.detach()
        kept = held * top_k_mask(held, 1 if self.load == "top1" else self.top_k)
        load = (kept > 0).float().mean(0) if self.load == "top1" else kept.sum(0) / kept.sum()
        sign = 1 if self.entropy_sign == "specialise" else -1
        return self.load_balance * (flat.mean(0) * load).sum() + sign * self.entropy * entropy(flat)
