"""LoDA: a small network instead of a linear map between the two factors of a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register("loda", paper="MERL TR2023-150", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class LoDA(LoRA):
    """``ΔW x = scale · B (h + σ(M2 σ(M1 σ(h))))`` with ``h = A x`` and σ a leaky ReLU of slope `slope`.

    The linear part beside the network keeps a gradient that is LoRA's. A public program bends the output with a
    further σ and scales by ``1/√out``; set alpha for a scale of your own. With slope 1 and both mixers zero it is LoRA.

    Use it where the change that is to be learned is not linear in the layer's input, and fusing is no matter.
    """

    slope: float = option(0.8, "Slope of σ below zero.", at_least=0, at_most=1)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, and the mixers M1 and M2 ``(rank, rank)``."""
        mixer = TensorSpec((self.rank, self.rank), kaiming)
        return {**super().tensors(site), "M1": mixer, "M2": mixer}

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return the rank units beside what the network makes of them."""
        bent = F.leaky_relu(h, self.slope)
        for name in ("M1", "M2"):
            bent = F.leaky_relu(F.linear(bent, tensors[name].to(h.dtype)), self.slope)
        return h + bent
