"""Kaiming: LoRA's usual start, A random and B zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed, kaiming, normal
from lorry.core.options import option
from lorry.training.starts import LowRankStart, low_rank, register_start


@register_start("kaiming", paper="arXiv 2106.09685")
@dataclass(frozen=True)
class Kaiming(LowRankStart):
    """A is drawn with a variance of the order of 1/in, B is zero.

    The two draws in use differ in variance by three: uniform in ±1/√in (PEFT, and LoRA's own code) has 1/(3 in), the
    normal one 1/in (LoRAFactory). It changes what a learning rate means by √3.
    """

    product: ClassVar[bool] = False

    distribution: str = option(
        "uniform", "Uniform in ±1/√in, or normal of variance 1/in.", choices=("uniform", "normal")
    )

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw A."""
        a, b = (torch.zeros(t.shape) for t in low_rank(entry, self))
        draw = kaiming if self.distribution == "uniform" else normal(1 / math.sqrt(entry.site.in_features))
        draw(a, generator)
        return a, b
