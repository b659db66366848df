"""How many elements a frozen layer with LoRA reads and writes, by the form in which it is computed (LoRAFusion, arXiv
2510.00206): next to the layer's own product the update is little arithmetic, and costs what it moves.

Counted is each wide or thin floating-point tensor that an operation takes or gives, once; masks and what a cache saves
are not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Elements read and written in the forward and in the backward pass, gradients of x, A and B included."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        """Elements of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Layer:
    """A layer ``(out, in)`` with an adapter, and the tokens that go through.

    Attributes
    ----------
    tokens, width, out, rank
        Sizes of the input ``(tokens, width)``, the output and the factors.
    drops
        Whether the update's input is dropped out.
    """

    tokens: int
    width: int
    out: int
    rank: int
    drops: bool = False

    def _sizes(self) -> tuple[int, int, int, int, int, int]:
        m, k, n, r = self.tokens, self.width, self.out, self.rank
        return m * k, m * n, k * n, m * r, k * r, n * r

    def plain(self) -> Traffic:
        """Return what separate operations move: product, dropout, two thin products, scale and sum."""
        x, y, w, h, a, b = self._sizes()
        dropout = 2 * x if self.drops else 0
        forward = (x + w + y) + dropout + (x + a + h) + (h + b + y) + 2 * y + 3 * y
        up, down = (y + h + b) + (y + b + h), (h + x + a) + (h + a + x)
        return Traffic(forward, (y + w + x) + 2 * y + up + down + dropout + 3 * x)

    def node(self) -> Traffic:
        """Return what one node of the graph moves by calls of a library, without dropout: each update is added in
        place.
        """
        x, y, w, h, a, b = self._sizes()
        forward = (x + w + y) + (x + a + h) + (h + b + 2 * y)
        backward = (h + y + b) + 4 * b + (b + y + h) + 2 * h + (h + x + a) + (y + w + x) + (h + a + 2 * x)
        return Traffic(forward, backward)

    def tiled(self) -> Traffic:
        """Return what the kernels of `lorry.kernels.triton_tiles` move, with dropout or without."""
        x, y, w, h, a, b = self._sizes()
        forward = (x + a + h) + (x + w + h + b + y)
        return Traffic(forward, (y + 2 * b + 2 * h) + (h + x + a) + (y + w + x + h + a))

    def least(self) -> Traffic:
        """Return what must be moved: each tensor once in each pass, rank units nowhere but in the cache."""
        x, y, w, _, a, b = self._sizes()
        return Traffic(x + w + a + b + y, y + w + 2 * x + 2 * (a + b))

    def operations(self) -> int:
        """Return the floating-point operations of all products of both passes."""
        _, _, w, _, a, b = self._sizes()
        return 2 * self.tokens * (2 * w + 3 * (a + b))
