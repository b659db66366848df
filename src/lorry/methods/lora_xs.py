"""LoRA-XS: only a small core is trained between frozen factors of the weight's own SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register("lora-xs", paper="arXiv 2405.17604")
@dataclass(frozen=True)
class LoRAXS(LoRA):
    """``ΔW = scale · B R A`` with ``A = V_rᵀ``, ``B = U_r Σ_r`` of the weight frozen and R ``(rank, rank)``
    trained (equation 3).

    The paper starts R at random values of deviation 1e-5. A zero core learns as well, since neither factor is
    zero, and leaves the model unchanged; it is the default. The factors are written to the checkpoint,
    because an SVD on another machine may differ in signs.

    Use it where very many adapters are kept: one has rank squared trained values for each site, whatever the widths
    are.
    """

    core_std: float = option(0.0, "Deviation of the core's random start (the paper's is 1e-5).", at_least=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the frozen pair and the core."""
        frozen = {n: TensorSpec(s.shape, trained=False) for n, s in super().tensors(site).items()}
        return {**frozen, "core": TensorSpec((*site.lead, self.rank, self.rank), normal(self.core_std))}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Take the top singular triples of the weight, the values with the left vectors."""
        u, s, vt = torch.linalg.svd(site.matrix().float(), full_matrices=False)
        tensors["A"].copy_(vt[..., : self.rank, :])
        tensors["B"].copy_(u[..., : self.rank] * s[..., None, : self.rank])

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the pair with the core multiplied into the thinner factor."""
        a, b = tensors["A"], tensors["B"]
        core = tensors["core"].to(a.dtype)  # a model that is cast takes what is trained along, and not the frozen pair
        return (a, b @ core) if site.out_features <= site.in_features else (core @ a, b)
