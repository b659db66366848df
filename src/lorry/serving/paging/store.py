"""What is stored: keys and values of every layer, as views of the pages of a pool."""

from __future__ import annotations

from torch import Tensor

from lorry.core.life.page_pool import PagePool
from lorry.kernels.lists import serves
from lorry.serving.paging.shape import CacheShape


class Store:
    """Keys and values on the pages of a pool. On a page the layers follow each other, in each the keys of all the
    page's tokens and then their values.

    Attributes
    ----------
    page_tokens
        Tokens of a page.
    keys, values
        The model's number of a layer -> ``(pages, page_tokens, heads · width)``, views of the pool.
    listed
        Whether a page is a whole number of heads' keys and of values in every layer, and there are operations that
        read them where they lie.
    """

    def __init__(self, pool: PagePool, shape: CacheShape, page_tokens: int) -> None:
        self.shape = shape
        self.page_tokens = page_tokens
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        memory, start = pool.rows(shape.dtype), 0
        self.listed = serves(shape.dtype, shape.device) and all(
            layer.key == layer.value and memory.shape[1] % layer.key == 0 for layer in shape.layers.values()
        )
        for number, layer in shape.layers.items():
            for views, width in ((self.keys, layer.keys), (self.values, layer.values)):
                stop = start + page_tokens * width
                views[number] = memory[:, start:stop].unflatten(1, (page_tokens, width))
                start = stop

    def write(self, layer: int, keys: Tensor, values: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Store keys and values ``(1, heads, tokens, width)`` of tokens at their places on pages."""
        for stored, given in ((self.keys[layer], keys), (self.values[layer], values)):
            stored[pages, offsets] = given[0].transpose(0, 1).flatten(1)
