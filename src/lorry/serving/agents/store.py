"""What a trajectory's cache holds: tensors that grow, by layer and owner, and the count of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


class Growing:
    """A tensor that grows along its last but one dimension, without being copied at each step."""

    __slots__ = ("_buffer", "length")

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> Tensor:
        """Add entries ``(..., new, width)`` and return all of them."""
        total = self.length + new.shape[-2]
        if self._buffer is None or self._buffer.shape[-2] < total:
            room = max(64, total + total // 2)
            grown = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if self._buffer is not None:
                grown[..., : self.length, :] = self.value
            self._buffer = grown
        self._buffer[..., self.length : total, :] = new
        self.length = total
        return self.value

    @property
    def value(self) -> Tensor:
        """All entries ``(..., length, width)``, a view."""
        assert self._buffer is not None
        return self._buffer[..., : self.length, :]

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return 0 if self._buffer is None else self.value.numel()


@dataclass
class LayerStore:
    """Keys and values of one layer for one owner."""

    keys: Growing = field(default_factory=Growing)
    values: Growing = field(default_factory=Growing)


class Store:
    """All that is kept of a trajectory.

    Parameters
    ----------
    layers
        Decoder layers of the model.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._whole: dict[str, list[LayerStore]] = {}
        self._low: dict[str, list[Growing]] = {}

    def whole(self, owner: str) -> list[LayerStore]:
        """Return keys and values of an owner (a role, or ``""`` for all of them), one for each layer."""
        return self._whole.setdefault(owner, [LayerStore() for _ in range(self.layers)])

    def low(self, owner: str) -> list[Growing]:
        """Return the low-rank values of an owner, ``(1, length, rank)`` for each layer."""
        return self._low.setdefault(owner, [Growing() for _ in range(self.layers)])

    @property
    def numbers(self) -> int:
        """How many numbers are kept in all."""
        whole = sum(s.keys.numbers + s.values.numbers for owner in self._whole.values() for s in owner)
        return whole + sum(low.numbers for owner in self._low.values() for low in owner)

    @contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """Forget what a pass has added if it does not come to its end."""
        before = {id(one): one.length for one in self._all()}
        try:
            yield
        except BaseException:
            for one in self._all():
                one.length = before.get(id(one), 0)
            raise

    def _all(self) -> Iterator[Growing]:
        for owner in self._whole.values():
            for layer in owner:
                yield from (layer.keys, layer.values)
        for lows in self._low.values():
            yield from lows
