"""What a model keeps of each token, found by asking it, and how that lies on a page."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorry.core.life.images import ALIGNED, rounded


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one token in one layer.

    Attributes
    ----------
    heads
        Heads of keys and values; fewer than those of the queries where these are grouped.
    key, value
        Width of a head's key and value.
    """

    heads: int
    key: int
    value: int

    @property
    def keys(self) -> int:
        """Elements of a token's keys."""
        return self.heads * self.key

    @property
    def values(self) -> int:
        """Elements of a token's values."""
        return self.heads * self.value


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one token in all layers.

    Attributes
    ----------
    layers
        The model's number of a layer -> what it keeps.
    dtype, device
        Of keys and values.
    """

    layers: dict[int, LayerShape]
    dtype: torch.dtype
    device: torch.device

    @property
    def token_elements(self) -> int:
        """Elements that a token takes in all layers."""
        return sum(layer.keys + layer.values for layer in self.layers.values())

    def page_bytes(self, page_tokens: int) -> int:
        """Return the bytes of a page of so many tokens, as the page pool asks for them."""
        return rounded(self.token_elements * page_tokens * self.dtype.itemsize, ALIGNED)
