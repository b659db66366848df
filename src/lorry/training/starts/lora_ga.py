"""LoRA-GA's start: the singular vectors of the gradient, so that the first step is that of full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import truncated_svd
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of
from lorry.training.starts._gradients import gradient_at

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weightS")


@register_start("lora-ga", paper="arXiv 2407.05000")
@dataclass(frozen=True)
class LoRAGA(LowRankStart):
    """A and B start at different halves of the first 2r singular vectors of the mean gradient G (algorithm 1).

    The first step of gradient descent then changes the weight along the best approximation of G of rank 2r. The paper
    has it with rsLoRA's scale (``method: rslora``). Gradients are taken in evaluation mode, so dropout adds no noise
    to them; the calibration batches are the first of the training data (`calibration` in a job says how many).
    """

    probes: ClassVar[tuple[str, ...]] = ("gradient",)

    direction: str = option("ArB2r", "Which of the first 2r singular vectors go to A and to B.", choices=DIRECTIONS)
    scale: str = option(
        "stable",
        "Length of the vectors: out^(1/4)/√γ; 1; 1/scale of the method; by the weight's singular values.",
        choices=SCALES,
    )
    stable_gamma: float = option(16.0, "γ of the stable scale; smaller starts larger.", above=0)
    norm_clip: bool = option(False, "Shrink A and B where an entry of their product exceeds the weight's largest.")
    iterations: int = option(4, "Subspace iterations of a randomised SVD; 0 computes the exact one.", at_least=0)

    def check_entry(self, entry: Entry) -> None:
        """Refuse a layer that has no 2r directions."""
        super().check_entry(entry)
        rank, site = rank_of(entry), entry.site
        most = min(site.out_features, site.in_features)
        if 2 * rank > most:
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: the start 'lora-ga' takes 2 · rank "
                f"singular vectors, so rank must be at most {most // 2}, found {rank}."
            )

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the gradient."""
        rank = rank_of(entry)
        gradient = gradient_at(entry, seen, self.name)
        u, _, vt = truncated_svd(gradient, 2 * rank, self.iterations, generator, oversampled=4 * rank)
        for_a, for_b = self._halves(rank, generator)
        a, b = vt[..., for_a, :], u[..., for_b]
        factor = self._factor(entry)
        a, b = a * factor, b * factor
        if self.norm_clip:
            most = entry.site.matrix().float().abs().amax().cpu()
            found = (b @ a).abs().amax() * scale_of(entry)
            shrink = (most / found).clamp(max=1).sqrt()
            a, b = a * shrink, b * shrink
        return a, b

    def _halves(self, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
        every = torch.arange(2 * rank)
        if self.direction == "ArBr":
            return every[1::2], every[0::2]
        if self.direction == "random":
            every = torch.randperm(2 * rank, generator=generator)
        first, second = every[:rank], every[rank:]
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def _factor(self, entry: Entry) -> float:
        site, scale = entry.site, scale_of(entry)
        if self.scale == "stable":
            return float(site.out_features**0.25 / math.sqrt(self.stable_gamma))
        if self.scale == "weightS":
            values = torch.linalg.svdvals(site.matrix().float())[..., : rank_of(entry)]
            return float((values / scale).sqrt().mean())
        return 1.0 if self.scale == "unit" else 1 / scale
