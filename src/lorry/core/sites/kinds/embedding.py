"""Embedding tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind
from lorry.kernels.thin import thin_linear


@register_kind
class EmbeddingKind(Kind):
    """``nn.Embedding``: its weight ``(vocabulary, width)`` is the transpose of the matrix, x is token indices."""

    name = "embedding"
    priority = 2
    presets = ("embeddings",)
    indexed = True

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself."""
        if isinstance(module, nn.Embedding):
            yield Site(path, self, module, module, "weight", module.embedding_dim, module.num_embeddings)

    def _factor(self, site: Site) -> Tensor | float:
        """Some models (Gemma) scale the looked-up rows inside the module; the update is scaled likewise."""
        factor: Tensor | float = getattr(site.owner, "embed_scale", 1.0)
        return factor

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Look up the columns of A; that of the padding token is not trained, as the module's own row is not."""
        return F.embedding(x, a.t(), padding_idx=site.owner.padding_idx)  # type: ignore[arg-type]

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Return ``h Bᵀ``, scaled as the module scales its own rows."""
        factor = self._factor(site)
        delta = thin_linear(h, b)
        return delta if isinstance(factor, float) and factor == 1.0 else delta * factor

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Look up the rows of the transposed matrix."""
        rows = F.embedding(x, matrix.t(), padding_idx=site.owner.padding_idx)  # type: ignore[arg-type]
        return rows * self._factor(site)

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.t()

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Transpose."""
        return matrix.t()

    def bias(self, site: Site) -> Tensor | None:
        """Return None: an embedding has no bias."""
        return None
