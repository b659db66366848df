"""C3A: an update of circulant blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("c3a", paper="arXiv 2407.19342", kinds=("linear",))
@dataclass(frozen=True)
class C3A(WeightDelta):
    """``ΔW_mn[t, j] = w_mn[(j - t) mod b] / in`` in square blocks of width b, w zero at the start (section 3.3).

    Use it where a full-rank update of very few values is wanted and the widths have a common divisor.
    """

    block_size: int = option(
        64, "Width b of the blocks; the largest common divisor of the layer's widths up to it is used.", at_least=1
    )

    def size(self, site: Site) -> int:
        """Return the width of the blocks at a site."""
        widths = site.out_features, site.in_features
        return next(b for b in range(min(self.block_size, *widths), 0, -1) if not any(w % b for w in widths))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the kernels w ``(out / b, in / b, b)``."""
        size = self.size(site)
        return {"kernel": TensorSpec((site.out_features // size, site.in_features // size, size))}

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the circulant blocks put together."""
        kernel = tensors["kernel"]
        step = torch.arange(kernel.shape[-1], device=kernel.device)
        blocks = kernel[:, :, (step[None, :] - step[:, None]) % len(step)]
        return blocks.transpose(1, 2).reshape(site.shape) / site.in_features
