"""CorDA's start: the singular triples of the weight seen through the covariance of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.decompose import split_evenly
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of


@register_start("corda", paper="arXiv 2406.05223")
@dataclass(frozen=True)
class CorDA(LowRankStart):
    """A and B start at singular triples of ``W C``, brought back by the inverse of C, where C is the second moment of
    the layer's inputs in the calibration batches (equations 1 to 4).

    In the mode of knowledge preservation (kpm) they are the bottom triples, so that what the calibration data use
    stays as it is: calibrate on what is to be kept. In the mode of instruction preview (ipm) they are the top ones, so
    that training begins in the directions that matter to the data: calibrate on what is to be learned.
    """

    probes: ClassVar[tuple[str, ...]] = ("input",)

    mode: str = option("kpm", "Preserve what the data use (kpm), or begin with it (ipm).", choices=("kpm", "ipm"))
    damping: float = option(0.01, "Added to the diagonal of C, relative to its mean.", above=0)

    def components(self, sites: Sequence[Site]) -> int:
        """Return the greatest width: C is taken exactly."""
        return max(site.in_features for site in sites)

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the weight times the second moment of the inputs."""
        moment = second_moment(seen["input"])
        moment.diagonal().add_(self.damping * moment.diagonal().mean())
        weight, rank = entry.site.matrix().double().cpu(), rank_of(entry)
        u, s, vt = torch.linalg.svd(weight @ moment, full_matrices=False)
        kept = slice(-rank, None) if self.mode == "kpm" else slice(None, rank)
        back = torch.linalg.solve(moment.mT, vt[kept].mT).mT
        return split_evenly(u[:, kept], s[kept], back, scale_of(entry))


def second_moment(seen: Observed) -> Tensor:
    """Return the mean of ``x xᵀ`` over the inputs of a site as ``(in, in)`` in float64."""
    assert seen.inputs is not None and seen.mean is not None
    rows, mean = seen.inputs.double(), seen.mean.double()
    return rows.mT @ rows / seen.count + torch.outer(mean, mean)
