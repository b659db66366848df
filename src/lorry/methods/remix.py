"""ReMix: a router that selects k of n LoRAs with one fixed weight, trained as a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.causal import generates
from lorry.methods.parts.routing import check_top_k, draw_order, entropy, log_probability, ranked, report


@register("remix", paper="arXiv 2603.10160", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class ReMix(Bottleneck):
    """``ΔW x = ω Σ_{j in J} B_j A_j x`` with k experts drawn without replacement from ``softmax(P x)`` in
    training, the best k later.

    Selection has no gradient, so P learns from the log-probability of what was drawn, by comparing the losses of
    several draws of the same row. The training engine does so by itself (`row_draws`); in a loop of one's own,
    `lorry.training.routing.repeated` and `policy_loss` do. The router sees x without a gradient.
    Sources leave open whether tokens or sequences are routed; both are here, sequences only where a model reads them
    whole: in a language model later tokens would change what was said of earlier ones. All experts active (``top_k =
    experts``) is one LoRA of rank experts · rank and fuses exactly.

    Use it where the experts' weights must not collapse onto one, and where two or more passes for each row are
    affordable.
    """

    experts: int = option(8, "Number of LoRAs at each layer.", at_least=1)
    top_k: int = option(4, "LoRAs selected for a token.", at_least=1)
    rank: int = option(8, "Rank of each.", at_least=1)
    alpha: float = option(2.0, "Numerator of the weight alpha/(top_k rank).", above=0)
    rank_stabilized: bool = option(False, "Use alpha/sqrt(top_k rank) as the weight.")
    draws: int = option(2, "Draws of each row in a training step.", at_least=2)
    granularity: str = option(
        "token",
        "What is routed; a sequence by the mean of its tokens (not in models that generate).",
        choices=("token", "sequence"),
    )
    entropy_bonus: float = option(
        0.0, "Weight of the router's entropy, which is rewarded; none in the paper.", at_least=0
    )
    router_std: float = option(0.0, "Standard deviation of the router at the start.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse more active experts than there are."""
        check_top_k(self, self.top_k, self.experts)

    def check_model(self, root: nn.Module, site: Site) -> None:
        """Refuse to route a sequence by tokens that are not there yet."""
        if self.granularity == "sequence" and not self.constant and generates(root, site.path):
            raise SiteError(
                f"ReMix routes a sequence by the mean of all its tokens, but '{site.path}' lies in a model that "
                f"generates ({type(root).__name__}): later tokens would change the logits of earlier ones, and "
                "decoding with a cache would route by the newest token alone. Use granularity='token' there; "
                "sequences are for encoders and classifiers."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A ``(experts · rank, in)`` and B ``(out, experts · rank)`` of all experts, and the router
        ``(experts, in)``.
        """
        ranks = self.experts * self.rank
        return {
            "A": TensorSpec((ranks, site.in_features), kaiming),
            "B": TensorSpec((site.out_features, ranks)),
            "router": TensorSpec((self.experts, site.in_features), normal(self.router_std)),
        }

    def scale(self, site: Site) -> float:
        """Return ω."""
        ranks = self.top_k * self.rank
        return self.alpha / (math.sqrt(ranks) if self.rank_stabilized else ranks)

    @property
    def constant(self) -> bool:
        """Whether every expert is active for every token."""
        return self.top_k == self.experts

    @property
    def row_draws(self) -> int:
        """Return the draws of each row; one where nothing is drawn."""
        return 1 if self.constant else self.draws

    @property
    def alpha_rank(self) -> int:
        """The ranks of all active experts together."""
        return self.top_k * self.rank

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Keep the units of the selected experts."""
        logits = self._logits(call, tensors["router"])
        if call.training:
            generator = Generator().manual_seed(call.seed())
            order = call.route("order", lambda: draw_order(logits, self.top_k, generator))
            self._leave(call, logits, order)
        else:
            order = ranked(logits, self.top_k)
        gates = torch.zeros_like(logits).scatter(-1, order, 1.0)
        report(call, gates, logits.softmax(-1))
        if self.granularity == "sequence":
            gates = gates.reshape(len(gates), *[1] * (h.ndim - 2), -1)
        return h * gates.repeat_interleave(self.rank, -1).to(h.dtype)

    def _logits(self, call: Call, router: Tensor) -> Tensor:
        """Return the router's logits for each token, or for each row; no gradient reaches x."""
        logits = call.project(router, detach=True)
        if self.granularity == "token" or logits.ndim == 2:
            return logits
        real = call.of_tokens(call.context.padding_mask)
        if real is None:
            return logits.flatten(1, -2).mean(1)
        weight = real.to(logits).unsqueeze(-1)
        return (logits * weight).sum(1) / weight.sum(1).clamp_min(1)

    def _leave(self, call: Call, logits: Tensor, order: Tensor) -> None:
        """Leave the log-probability of each row's routes, padding left out, and the entropy bonus."""
        chosen = log_probability(logits, order)
        real = call.of_tokens(call.context.padding_mask) if self.granularity == "token" else None
        if real is not None:
            chosen = chosen.masked_fill(~real, 0)
        call.leave("log_probability", chosen.reshape(len(chosen), -1).sum(1))
        if self.entropy_bonus:
            call.add_loss("entropy", -self.entropy_bonus * entropy(logits.softmax(-1), real))


preset("remix-rs", of="remix", paper="arXiv 2603.10160", rank_stabilized=True)
