"""DoRA: LoRA for the direction of each output channel, and a trained magnitude for its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.method.families import norms_of_sum
from lorry.core.method.forms import PeftForm
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, ones
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register(
    "dora",
    paper="arXiv 2402.09353",
    kinds=lambda kind: not kind.whole and kind.row_channels,
    linear_in_scale=False,
)
@dataclass(frozen=True)
class DoRA(LoRA):
    """``W' = m ⊙ (W + scale · B A) / ‖W + scale · B A‖`` by output channel, the norm constant in the gradient (section
    4.3).

    Use it in LoRA's place at small ranks, where a little more work in each step is no hindrance; in use it costs
    nothing once it is fused.
    """

    peft_form: ClassVar[PeftForm | None] = PeftForm({"use_dora": True})

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B and the magnitude m ``(out,)``."""
        return {**super().tensors(site), "magnitude": TensorSpec((*site.lead, site.out_features), ones)}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Start the magnitude at the norms of the base weight, so that the layer is unchanged."""
        tensors["magnitude"].copy_(norms_of_sum(site, None, None, 0.0))

    def gain(self, a: Tensor, b: Tensor, tensors: Tensors, site: Site) -> Tensor | None:
        """Return ``m / ‖W + ΔW‖`` for each output channel."""
        with torch.no_grad():
            norms = norms_of_sum(site, a, b, self.scale(site))
        return tensors["magnitude"].to(norms.dtype) / norms  # rounded once, where it is used
