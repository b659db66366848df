"""Input directions: A begins with the principal directions of the layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.training.starts import LowRankStart, low_rank, register_start


@register_start("input-directions", paper="arXiv 2410.07170")
@dataclass(frozen=True)
class InputDirections(LowRankStart):
    """The rows of A are the principal directions of the layer's inputs, as EVA has them, without moving ranks; rows for
    which there is no direction stay as they are. B is zero.
    """

    product: ClassVar[bool] = False
    probes: ClassVar[tuple[str, ...]] = ("input",)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the directions by decreasing variance."""
        (a, b), rows = low_rank(entry, self), seen["input"].inputs
        assert rows is not None
        return torch.linalg.svd(rows, full_matrices=False)[2][: len(a)], torch.zeros_like(b)
