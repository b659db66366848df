"""Linear layers: ``nn.Linear`` and its subclasses with any storage, and transformers' ``Conv1D``."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind
from lorry.kernels.thin import thin_linear


@register_kind
class LinearKind(Kind):
    """``y = x Wᵀ + bias``. Transformers' ``Conv1D`` stores the transposed weight ``(in, out)``."""

    name = "linear"
    priority = 0
    presets = ("all-linear",)
    plain_product = True

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself."""
        if isinstance(module, nn.Linear):
            yield Site(path, self, module, module, "weight", module.out_features, module.in_features)
        elif _transposed(module):
            inner, out = module.weight.shape  # type: ignore[misc]
            yield Site(path, self, module, module, "weight", int(out), int(inner))

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Return ``x Aᵀ``."""
        return thin_linear(x, a)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Return ``x Wᵀ``."""
        return F.linear(x, matrix)

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose what is stored transposed."""
        return weight.t() if _transposed(site.owner) else weight

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        return matrix.t() if _transposed(site.owner) else matrix


def _transposed(module: nn.Module) -> bool:
    """Whether it is a ``Conv1D``; recognised by its name and fields, so that transformers need not be imported."""
    if isinstance(module, nn.Linear) or type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return False
    return isinstance(getattr(module, "weight", None), Tensor)
