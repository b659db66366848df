"""LoRAMoE: LoRAs as experts at every layer, of which a router lets some act on each token."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.routing import (
    balance_loss,
    balance_sums,
    check_top_k,
    over_ranks,
    precise,
    ranked,
    report,
)


@register("loramoe", paper="arXiv 2312.09979", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class LoRAMoE(LoRA):
    """``ΔW x = scale · Σ_e g_e(x) B_e A_e x`` over the `top_k` experts with the highest logits ``R x``, whose gates are
    the softmax of these alone.

    Its loss is `load_balance` times ``E Σ f_e P_e``, with the share f of the choices and the mean probability P. The
    paper lets all experts act: top_k as many as experts. One expert is a plain LoRA and fuses exactly.

    Use it for several kinds of data in one adapter, to keep what the base knows while much is learned.
    """

    rank: int = option(2, "Rank of each expert.", at_least=1)
    experts: int = option(4, "Number of experts at each layer.", at_least=1)
    top_k: int = option(2, "Experts that act on a token.", at_least=1)
    load_balance: float = option(1e-3, "Weight of the balance loss.", at_least=0)
    router_std: float = option(0.02, "Standard deviation of the router at the start.", at_least=0)

    def check(self) -> None:
        """Refuse more active experts than there are."""
        check_top_k(self, self.top_k, self.experts)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B of all experts, and the router ``(experts, in)`` where there is a choice."""
        total = self.rank * self.experts
        a, b = super().tensors(site).values()
        specs = {
            "A": replace(a, shape=(total, site.in_features)),
            "B": replace(b, shape=(site.out_features, total)),
        }
        if self.constant:
            return specs
        return {**specs, "router": TensorSpec((self.experts, site.in_features), normal(self.router_std))}

    @property
    def constant(self) -> bool:
        """Whether there is a single expert."""
        return self.experts == 1

    def gates(self, logits: Tensor, call: Call) -> Tensor:
        """Return the gates ``(..., experts)``: softmax over the chosen ones."""
        chosen = ranked(logits.detach(), self.top_k)
        self.leave_balance(logits.softmax(-1), chosen, call)
        weights = logits.gather(-1, chosen).softmax(-1)
        return logits.new_zeros(logits.shape).scatter(-1, chosen, weights)

    def leave_balance(self, p: Tensor, chosen: Tensor, call: Call) -> None:
        """Leave the balance loss of probabilities ``(..., experts)`` and choices ``(..., k)``."""
        if call.training and self.load_balance:
            real = call.of_tokens(call.context.padding_mask)
            real = None if real is None or real.shape != p.shape[:-1] else real
            call.add_loss("balance", self.load_balance * balance_loss(balance_sums(p, chosen, real)))

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Weigh the experts' rank units."""
        if self.constant:
            return h
        gates = self.gates(precise(call.project(tensors["router"])), call)
        report(call, gates)
        spread = over_ranks(gates, (self.rank,) * self.experts).to(h.dtype)
        return h.unflatten(-1, (-1, spread.shape[-1])).mul(spread.unsqueeze(-2)).flatten(-2)
