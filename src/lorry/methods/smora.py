"""SMoRA: one LoRA whose ranks are experts that a learned router switches for each token."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.routing import balance_step, counts, precise, report, top_k_mask


@register("smora", paper="arXiv 2501.15103", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class SMoRA(Bottleneck):
    """``ΔW x = alpha/k · B (g ⊙ A x)``, g from ``sigmoid(G x) + d``: the k highest, scaled to a sum of k, the
    others 0.

    One expert has `partition` neighbouring ranks; with 1, each rank is one. In the published program the
    balance bias d enters the gates and not only the choice; gates are kept positive here, and
    ``bias_in_gate=False`` leaves d out of them. There d has an entry for each rank and moves in every
    forward; here it has one for each expert and moves once after an optimizer step.

    Use it for many tasks at once: experts as fine as single ranks, at the cost of one LoRA and a router.
    """

    rank: int = option(64, "Ranks of all experts together.", at_least=1)
    top_k: int = option(8, "Ranks that are active for a token.", at_least=1)
    partition: int = option(1, "Ranks of one expert.", at_least=1)
    alpha: float = option(16.0, "Numerator of the scale alpha/top_k.", above=0)
    rate: float = option(1e-5, "Step of the balance bias; 0 turns balancing off.", at_least=0)
    bias_in_gate: bool = option(True, "Let the balance bias enter the gates as well as the choice.")
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse experts that do not divide, and more active ranks than there are; warn where the router
        cannot learn.
        """
        if self.top_k > self.rank or self.rank % self.partition or self.top_k % self.partition:
            raise OptionError(
                f"SMoRA: partition must divide rank and top_k, and top_k be at most rank; found rank={self.rank}, "
                f"top_k={self.top_k}, partition={self.partition}."
            )
        if self.top_k == self.partition and self.rank > self.partition:
            warnings.warn(
                f"SMoRA: with a single active expert (top_k={self.top_k}, partition={self.partition}) every gate is "
                "exactly 1 and the router gets no gradient; choose top_k of at least twice the partition.",
                stacklevel=4,
            )

    @property
    def experts(self) -> int:
        """Return the number of experts."""
        return self.rank // self.partition

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, the router ``(experts, in)`` and the balance bias ``(experts,)``."""
        return {
            "A": TensorSpec((self.rank, site.in_features), kaiming),
            "B": TensorSpec((site.out_features, self.rank)),
            "router": TensorSpec((self.experts, site.in_features), kaiming),
            "bias": TensorSpec((self.experts,), trained=False, dtype=torch.float32),
        }

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A with the router below it, which sees the same dropped input, and B."""
        return torch.cat([tensors["A"], tensors["router"]]), tensors["B"]

    def scale(self, site: Site) -> float:
        """Return alpha/top_k: gates average to 1 over the active ranks."""
        return self.alpha / self.top_k

    @property
    def alpha_rank(self) -> int:
        """The number of active ranks."""
        return self.top_k

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return the rank units times their gates."""
        units, logits = h.split([self.rank, self.experts], dim=-1)
        affinity = precise(logits).sigmoid()
        score = affinity + tensors["bias"]
        mask = top_k_mask(score.detach(), self.top_k // self.partition)
        value = (score.clamp_min(1e-6) if self.bias_in_gate else affinity) * mask
        gates = value * (self.top_k // self.partition) / value.sum(-1, keepdim=True)
        if call.training and self.rate:
            call.record("counts", lambda: counts(mask, call.of_tokens(call.context.padding_mask)), always=True)
        report(call, gates)
        spread = gates.repeat_interleave(self.partition, -1).to(units.dtype)
        return torch.mul(units, spread)

    def after_step(self, tensors: Tensors, site: Site, record: Mapping[str, Tensor]) -> None:
        """Move the bias against the loads of the step."""
        if "counts" in record:
            balance_step(tensors["bias"], record["counts"], self.rate)
