"""What a network is told of each picture: text embeddings and sizes, one row for each picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Conditions:
    """Tensors by name, each with rows first.

    Attributes
    ----------
    tensors
        Names are those of the family that made them. A tensor whose name ends in ``_mask`` says which tokens are real;
        where rows of several lengths come together, shorter ones are filled up with zeros.
    """

    tensors: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """Number of pictures."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.tensors[name]

    def with_(self, **tensors: Tensor) -> Conditions:
        """Return them with some tensors replaced or added."""
        return Conditions({**self.tensors, **tensors})

    def take(self, rows: Sequence[int]) -> Conditions:
        """Return some rows, in the order of `rows`; a row may come several times."""
        return self.each(lambda t: t[torch.tensor(list(rows), device=t.device)])

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """Return them on a device, floating ones in a type."""
        return self.each(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Return them with every tensor changed."""
        return Conditions({name: change(tensor) for name, tensor in self.tensors.items()})


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Return the rows of several conditions one after another, the tokens of shorter ones filled up with zeros."""
    names = parts[0].tensors
    return Conditions({name: _joined([part[name] for part in parts]) for name in names})


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(t.shape[1] for t in tensors) if tensors[0].ndim > 1 else 0
    short = [longest - t.shape[1] if longest else 0 for t in tensors]
    filled = [
        F.pad(t, (*[0] * (2 * (t.ndim - 2)), 0, less)) if less else t for t, less in zip(tensors, short, strict=True)
    ]
    return torch.cat(filled)
