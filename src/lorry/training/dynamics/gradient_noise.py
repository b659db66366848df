"""Gradient noise that fades (Neelakantan et al. 2015, arXiv 1511.06807)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic


@register_dynamic("gradient-noise")
@dataclass(frozen=True)
class GradientNoise(Dynamic):
    """Adds N(0, eta / (1 + t)^gamma) to every element of the gradient of step t, from 0 (equation 1 of the paper)."""

    neutral: ClassVar = {"eta": 0.0}

    eta: float = option(0.01, "Variance of the noise at the first step; 0 adds none.", at_least=0)
    gamma: float = option(0.55, "How fast it fades; 0 keeps it.", at_least=0)

    def before_step(self, at: Moment) -> None:
        """Add the noise of this step."""
        if not self.eta:
            return
        deviation = (self.eta / (1 + at.step) ** self.gamma) ** 0.5
        for name, gradient in at.groups.gradients().items():
            noise = torch.randn(gradient.shape, generator=at.generator(name))
            gradient.add_(noise.to(gradient), alpha=deviation)
