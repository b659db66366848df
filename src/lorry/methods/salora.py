"""SALoRA: each rank unit has a gate that training may close for good."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Places, Tensors, TensorSpec, constant
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA

#: The interval to which the gates' sigmoid is stretched before it is cut to [0, 1].
LOW, HIGH = -0.1, 1.1


@register("salora", paper="Mathematics 2023, 11(20), 4317", fuse="exact")
@dataclass(frozen=True)
class SALoRA(LoRA):
    """``ΔW = scale · B diag(z) A`` with hard-concrete gates ``z = cut(sigmoid(g / β) · 1.2 - 0.1)``, g trained for each
    rank unit (Louizos et al. 2018).

    In training each pass of a layer adds the logit of a uniform number to g; in use the gates are what they are without
    noise, and so constant. The loss gets `sparsity` times the mean probability that a gate is open, and `orthogonality`
    times the mean of ``‖A Aᵀ - I‖`` and ``‖Bᵀ B - I‖``.

    Use it with a generous rank where you do not know how much is needed: closed units can be cut off afterwards.
    """

    gate: float = option(1.0, "Start of g; higher is more open.")
    temperature: float = option(1.0, "Temperature β of the gates.", above=0)
    sparsity: float = option(0.01, "Weight of the probability that gates are open.", at_least=0)
    orthogonality: float = option(0.01, "Weight of the factors' distance from orthonormal ones.", at_least=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B and g ``(rank,)``."""
        return {**super().tensors(site), "gate": TensorSpec((*site.lead, self.rank), constant(self.gate))}

    @property
    def plain(self) -> bool:
        """Not in training, where gates are drawn and a loss is left."""
        return False

    def gates(self, tensors: Tensors) -> Tensor:
        """Return z."""
        logits = tensors["gate"] / self.temperature
        return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return ``diag(z) A`` and B."""
        return self.gates(tensors).unsqueeze(-1) * tensors["A"], tensors["B"]

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update, in training with gates that are drawn."""
        if call.training:
            gate = tensors["gate"]
            uniform = torch.rand(gate.shape, generator=torch.Generator().manual_seed(call.seed()))
            noise = torch.logit(uniform, eps=1e-6).to(gate)
            tensors = {**tensors, "gate": gate + noise}
        return super().apply(call, tensors)

    def penalty(self, places: Places) -> Tensor | None:
        """Return the loss of open gates and of factors that are not orthonormal."""
        if not places or not (self.sparsity or self.orthogonality):
            return None
        shift = self.temperature * math.log(-LOW / HIGH)
        total: Tensor = torch.zeros(())
        for _, t in places:
            a, b = t["A"], t["B"]
            eye = torch.eye(self.rank, dtype=a.dtype, device=a.device)
            gaps = [torch.linalg.matrix_norm(m - eye).mean() for m in (a @ a.mT, b.mT @ b)]
            here = self.sparsity * (t["gate"] - shift).sigmoid().mean() + self.orthogonality * (gaps[0] + gaps[1]) / 2
            total = total.to(here) + here
        return total / len(places)
