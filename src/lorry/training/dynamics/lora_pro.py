"""LoRA-Pro: steps of A and B whose product moves as the full gradient would (Wang et al. 2024, arXiv 2407.18242)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.low_rank import pairs_of


@register_dynamic("lora-pro")
@dataclass(frozen=True)
class LoRAPro(Dynamic):
    """Takes, for dA and dB, the gradients whose update of ``scale · B A`` is nearest to the gradient of the weight.

    By theorems 2.1 and 2.3 these are::

        dA' = (BᵀB)⁻¹ dA / scale² + X A
        dB' = (I - B (BᵀB)⁻¹ Bᵀ) dB (A Aᵀ)⁻¹ / scale² - B X

    where X, which leaves the product alone, solves ``BᵀB X + X A Aᵀ = -(BᵀB)⁻¹ dA Aᵀ / scale²``, so that dA' and dB'
    are as near to dA and dB as they can be. While B is zero the inverse is zero (a pseudoinverse), and so is dA'.

    Gradients are clipped after this. The paper's AdamW keeps the moments of the whole weight's gradient; here the job's
    optimizer sees dA' and dB'.
    """

    neutral: ClassVar = {"amount": 0.0}
    apart: ClassVar = {
        "lora-fa": "with A frozen there is one factor, whose best gradient is its own",
        "dp-sgd": "noise in dA and dB would be multiplied by the inverse of small matrices",
        "relora": "what is merged is not to be moved",
        "plora": "what is merged is not to be moved",
        "delta-lora": "what is merged is not to be moved",
    }

    amount: float = option(
        1.0, "How much of the correction is made; 0 leaves the gradients as they are.", at_least=0, at_most=1
    )
    tolerance: float = option(
        1e-6, "Singular values of B and A below this fraction of the largest count as zero.", above=0, below=1
    )

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site."""
        if self.amount:
            pairs_of(at.adapter, self.name, own=True)

    def before_step(self, at: Moment) -> None:
        """Correct the gradients."""
        if not self.amount:
            return
        found = at.groups.gradients()
        for pair in pairs_of(at.adapter, self.name, own=True):
            da, db = found.get(f"{pair.path}.A"), found.get(f"{pair.path}.B")
            if da is None or db is None:
                continue
            exact = torch.promote_types(da.dtype, torch.float64 if da.device.type == "cpu" else torch.float32)
            a, b = pair.a.to(exact), pair.b.to(exact)
            better_a, better_b = corrected(a, b, da.to(exact), db.to(exact), pair.scale, self.tolerance)
            da.lerp_(better_a.to(da), self.amount) if self.amount < 1 else da.copy_(better_a)
            db.lerp_(better_b.to(db), self.amount) if self.amount < 1 else db.copy_(better_b)


def corrected(a: Tensor, b: Tensor, da: Tensor, db: Tensor, scale: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return dA' ``(rank, in)`` and dB' ``(out, rank)`` for A, B and their gradients."""
    left, u = torch.linalg.eigh(b.mT @ b)
    right, v = torch.linalg.eigh(a @ a.mT)
    left, right = left.clamp_min(0), right.clamp_min(0)
    # singular values of B are roots of those of BᵀB
    inverse = (u * _inverse(left, tolerance**2)) @ u.mT
    of_a = (v * _inverse(right, tolerance**2)) @ v.mT
    main_a = inverse @ da / scale**2
    main_b = (db - b @ (inverse @ (b.mT @ db))) @ of_a / scale**2
    sums = left[:, None] + right[None, :]
    solved = u.mT @ (-main_a @ a.mT) @ v
    x = u @ torch.where(sums > 0, solved / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0.0) @ v.mT
    return main_a + x @ a, main_b - b @ x


def _inverse(values: Tensor, tolerance: float) -> Tensor:
    kept = values > values.max() * tolerance
    return torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), 0.0)
