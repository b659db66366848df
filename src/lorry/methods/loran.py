"""LoRAN: LoRA whose output is bent by a small sine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors
from lorry.core.options import option
from lorry.methods.lora import LoRA


@register("loran", paper="arXiv 2509.21870", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class LoRAN(LoRA):
    """``y = W x + scale · f(B A x)`` with ``f(z) = z + amplitude · sin(frequency · z) · z`` (Sinter).

    f acts on the layer's output, so there is no weight that does the same, and it never fuses; a public program fuses
    ``B A`` all the same. With amplitude 0 it is LoRA.

    Use it in LoRA's place at small ranks where fusing is no matter: f costs no value, and lifts the output out of
    the span of B.
    """

    amplitude: float = option(5e-5, "Size of the sine.", at_least=0)
    frequency: float = option(1000.0, "Frequency of the sine.", above=0)

    @property
    def constant(self) -> bool:
        """Whether nothing is bent."""
        return self.amplitude == 0

    def bend(self, update: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Return ``f(z)``."""
        return update + self.amplitude * torch.sin(self.frequency * update) * update
