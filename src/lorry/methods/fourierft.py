"""FourierFT: an update of which a few entries of the spectrum are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("fourierft", paper="arXiv 2405.03003", kinds=("linear",))
@dataclass(frozen=True)
class FourierFT(WeightDelta):
    """``ΔW = scale · Re(F⁻¹(S))`` with a real spectrum S that is trained at `count` random positions (equation 3).

    Use it where the file must be tiny and the pattern of a change is smooth or periodic; for most tasks LoRA of
    rank 1 is as small.
    """

    count: int = option(1000, "Trained entries of the spectrum; all of them where the layer has fewer.", at_least=1)
    scale: float = option(150.0, "Constant factor of the update.", above=0)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the trained entries ``(count,)`` and their flat positions in ``(out, in)``."""
        count = min(self.count, site.out_features * site.in_features)
        return {
            "spectrum": TensorSpec((count,)),
            "index": TensorSpec((count,), trained=False, dtype=torch.int64),
        }

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Draw the positions."""
        order = torch.randperm(math.prod(site.shape), generator=generator)
        tensors["index"].copy_(order[: len(tensors["index"])])

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the real part of the inverse transform; half precision has none, so it is done in float32."""
        spectrum, index = tensors["spectrum"], tensors["index"]
        exact = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        dense = exact.new_zeros(math.prod(site.shape)).index_put((index,), exact).view(site.shape)
        return (torch.fft.ifft2(dense).real * self.scale).to(spectrum.dtype)
