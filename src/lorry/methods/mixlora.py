"""MixLoRA: a frozen feed-forward block becomes a mixture of experts, each the block with LoRAs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.method.base import Method
from lorry.core.method.call import Call
from lorry.core.method.families import Block
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.dora import DoRA
from lorry.methods.lora import LoRA
from lorry.methods.parts.feedforward import ACTIVATIONS, parts_of, with_blocks
from lorry.methods.parts.mixtures import ExpertUpdates, expert_specs, jittered, mixed_feed_forward, start_magnitudes
from lorry.methods.parts.routing import (
    balance_loss,
    balance_sums,
    check_top_k,
    choose,
    report,
    router_logits,
    within_capacity,
)
from lorry.methods.parts.routing import z_loss as z_loss_of


@register("mixlora", paper="arXiv 2404.15159", kinds=lambda kind: kind.whole)
@dataclass(frozen=True)
class MixLoRA(Block):
    """``y = Σ_{e in top k} w_e FFN_e(x)``: FFN_e has a LoRA at each projection, w the renormalised softmax of one
    router per block.

    Target the projections of feed-forward blocks (or the blocks): they become mixtures; other linear layers get a plain
    LoRA. What every expert shares is computed once. The balance loss is pooled over layers, as in the published
    program. ``routing``: "top_k"; "top_p" (all experts up to a total probability) and "switch" (the best one, with a
    capacity), whose weights are probabilities that do not sum to 1, so a fresh adapter changes the model. The published
    switch lets tokens beyond the capacity keep the block's input and, in inference, never applies the experts; here the
    experts always apply, and such tokens get the frozen block's output.

    Use it for several tasks at once in a model with ordinary feed-forward blocks, where slower steps and no fusing
    are acceptable.
    """

    gathers = ("linear",)

    experts: int = option(8, "Experts of each feed-forward block.", at_least=1)
    top_k: int = option(2, "Experts of a token.", at_least=1)
    rank: int = option(16, "Rank of each expert's LoRAs.", at_least=1)
    alpha: float | None = option(None, "Scale is alpha/rank; twice the rank if not given.", above=0)
    rank_stabilized: bool = option(False, "Scale by alpha/sqrt(rank).")
    dropout: float = option(0.0, "Dropped fraction of the LoRAs' input.", at_least=0, below=1)
    dora: bool = option(False, "Give each expert's projection a trained magnitude (MixDoRA).")
    attention_rank: int | None = option(None, "Rank outside the blocks, if another.", at_least=1)
    attention_alpha: float | None = option(None, "Alpha outside the blocks, if another ratio.", above=0)
    projections: tuple[str, ...] = option((), "With LoRAs, all if empty; filled in from the targets.")
    activation: str = option("own", "'own' is the block's.", choices=("own", *ACTIVATIONS))
    routing: str = option("top_k", "How experts are chosen.", choices=("top_k", "top_p", "switch"))
    top_p: float = option(0.8, "Total probability at which top_p stops.", above=0, at_most=1)
    capacity: int = option(32, "Tokens of a sequence that an expert takes in switch routing.", at_least=1)
    load_balance: float = option(0.01, "Weight of the balance loss.", at_least=0)
    z_loss: float = option(0.0, "Weight of the mean squared logsumexp of the logits.", at_least=0)
    jitter: float = option(0.0, "Multiplicative noise on a block's input in training.", at_least=0, below=1)
    router_std: float = option(0.02, "Standard deviation of the router at the start.", at_least=0)

    def check(self) -> None:
        """Refuse more active experts than there are."""
        check_top_k(self, self.top_k, self.experts)

    @property
    def scaling(self) -> float:
        """Return the factor of each expert's LoRAs."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rank_stabilized else self.rank))

    def place(self, sites: Sequence[Site], root: nn.Module) -> Sequence[tuple[Site, Method]]:
        """Let blocks take the place of their projections; those that are targeted have LoRAs."""
        own = bool(self.projections)
        blocks = with_blocks(sites, root)
        placed = [(s, self.with_options(projections=n) if n and not own else self) for s, n in blocks]
        if not any(site.kind.whole for site, _ in placed):
            raise SiteError("MixLoRA needs feed-forward blocks; target 'all-linear', 'mlp' or their projections.")
        return placed

    def bases(self, site: Site) -> Sequence[Site]:
        """Return the projections of the block."""
        return list(parts_of(site).sites.values())

    def for_site(self, site: Site) -> Method:
        """Return the method itself at a block, a LoRA elsewhere."""
        if site.kind.whole:
            return self
        rank = self.attention_rank or self.rank
        ratio = 2.0 if self.alpha is None else self.alpha / self.rank
        alpha = rank * ratio if self.attention_alpha is None else self.attention_alpha
        return (DoRA if self.dora else LoRA)(rank, alpha, self.dropout, self.rank_stabilized)

    def check_site(self, site: Site) -> None:
        """Refuse modules that are no feed-forward blocks, and projections they do not have."""
        parts_of(site, self.projections, activation=self.activation == "own")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the router ``(experts, width)`` and A, B (and a magnitude) of all experts at each projection."""
        parts = parts_of(site)
        router = TensorSpec((self.experts, parts.sites[parts.inputs[0]].in_features), normal(self.router_std))
        specs = expert_specs(parts, self.projections or parts.names, self.experts, self.rank, self.dora)
        return {"router": router, **specs}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Start magnitudes at the norms of the base weights."""
        start_magnitudes(parts_of(site), tensors)

    def forward(self, base: Callable[..., Any], call: Call, tensors: Tensors, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the mixture in the place of its feed-forward block."""
        parts = parts_of(call.site)
        seed = call.seed() if call.training and (self.dropout or self.jitter) else None
        updates = ExpertUpdates(tensors, self.scaling, self.dropout, seed)

        def mixture(x: Tensor) -> Tensor:
            x = jittered(x, self.jitter, seed)
            gates, mask = self._route(call, x, tensors["router"])
            return mixed_feed_forward(parts, x, gates, mask, parts.activate(self.activation), updates)

        return parts.replaced(base, mixture, *args, **kwargs)

    def _route(self, call: Call, x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and choices ``(..., experts)``."""
        logits = router_logits(x, router)
        p = logits.softmax(-1)
        real = call.of_tokens(call.context.padding_mask)
        most = {"top_k": self.top_k, "switch": 1, "top_p": self.experts}[self.routing]
        order, mask = choose(p, most, self.top_p if self.routing == "top_p" else None)
        gates = p * mask
        if self.routing == "top_k":
            gates = gates / gates.sum(-1, keepdim=True)
        if call.training and self.load_balance:
            call.leave("balance", balance_sums(p, order, real))
        if call.training and self.z_loss:
            call.add_loss("z", self.z_loss * z_loss_of(logits, real))
        report(call, gates, p)
        if self.routing == "switch" and x.ndim == 3:
            mask = within_capacity(mask if real is None else mask & real.unsqueeze(-1), self.capacity)
        return gates, mask

    def joint_loss(self, left: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        """Return the balance loss, pooled over the layers."""
        sums = [tensors["balance"] for tensors in left.values() if "balance" in tensors]
        return self.load_balance * balance_loss(torch.stack(sums).sum(0)) if sums else None


preset("mixlora-dynamic", of="mixlora", paper="TUDB-Labs/MoE-PEFT", routing="top_p")
_SWITCH = {"routing": "switch", "router_std": 1.0, "jitter": 0.01, "z_loss": 0.001}
preset("mixlora-switch", of="mixlora", paper="TUDB-Labs/MoE-PEFT", **_SWITCH)
preset("mixdora", of="mixlora", paper="arXiv 2404.15159", dora=True)
