"""PiSSA: LoRA that starts from the principal part of the weight and leaves the rest to the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.method.forms import PeftForm
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.decompose import split_evenly, truncated_svd


@register("pissa", paper="arXiv 2404.02948")
@dataclass(frozen=True)
class PiSSA(LoRA):
    """``ΔW = scale · (B A - B_0 A_0)``: A and B start at the top singular triples of W; the same product is subtracted
    as a frozen offset (equations 2 to 4).

    The offset is kept as a second, frozen pair of factors beside the base, so the base stays as it is and is shared.
    As a plain LoRA this is rank 2r: ``[A; A0]`` and ``[B, -B0]``.

    Use it for a quicker start than LoRA's where an SVD of each weight is affordable; not on a weight so coarse
    (quantised) that its SVD says little.
    """

    peft_form: ClassVar[PeftForm | None] = PeftForm(start="pissa", computed=("A0", "B0"))

    iterations: int = option(0, "Subspace iterations of a fast randomised SVD; 0 computes the exact one.", at_least=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B, and the frozen pair they started from."""
        trained = super().tensors(site)
        frozen = {f"{name}0": TensorSpec(spec.shape, trained=False) for name, spec in trained.items()}
        return {**trained, **frozen}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Split the top singular triples evenly between A and B, divided by the scale."""
        triples = truncated_svd(site.matrix().float(), self.rank, self.iterations, generator)
        a, b = split_evenly(*triples, self.scale(site))
        for name, value in {"A": a, "B": b, "A0": a, "B0": b}.items():
            tensors[name].copy_(value)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the trained pair beside the frozen one with the opposite sign."""
        a = torch.cat([tensors["A"], tensors["A0"]], dim=-2)
        return a, torch.cat([tensors["B"], -tensors["B0"]], dim=-1)
