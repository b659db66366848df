"""VeRA: one frozen random pair for all layers, and two trained vectors for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, constant
from lorry.core.options import option
from lorry.core.sites.site import Site


def he_uniform(tensor: Tensor, generator: Generator) -> None:
    """Fill uniformly with variance 2/fan_in."""
    bound = math.sqrt(6 / tensor.shape[-1])
    tensor.uniform_(-bound, bound, generator=generator)


@register("vera", paper="arXiv 2310.11454")
@dataclass(frozen=True)
class VeRA(Bottleneck):
    """``ΔW = diag(b) B diag(d) A`` with A, B random, frozen and shared, b zero and d constant at the start
    (equation 2).

    The shared pair has the largest widths of all sites; each site uses its first rows and columns. ``out +
    rank`` values are trained at each site.

    Use it where very many adapters are kept and a large shared random pair is no hindrance; it wants a high rank
    and a high rate.
    """

    rank: int = option(256, "Rank of the shared projections; it may exceed the widths of the layers.", at_least=1)
    d_initial: float = option(0.1, "Start of the vector d.")
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)
    save_projection: bool = option(
        False,
        "Write the shared pair to the checkpoint instead of drawing it again from the seed when loading.",
    )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return b ``(out,)`` and d ``(rank,)``."""
        return {
            "lambda_b": TensorSpec((*site.lead, site.out_features)),
            "lambda_d": TensorSpec((*site.lead, self.rank), constant(self.d_initial)),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return each site's vectors and the shared pair."""
        wide, tall = max(s.in_features for s in sites), max(s.out_features for s in sites)
        shapes = {"projection_A": (self.rank, wide), "projection_B": (tall, self.rank)}
        shared = {n: TensorSpec(s, he_uniform, trained=False, saved=self.save_projection) for n, s in shapes.items()}
        return Layout({site.path: self.tensors(site) for site in sites}, shared)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the scaled slices of the shared pair."""
        a = tensors["projection_A"][:, : site.in_features]
        b = tensors["projection_B"][: site.out_features]
        return tensors["lambda_d"].unsqueeze(-1) * a, tensors["lambda_b"].unsqueeze(-1) * b
