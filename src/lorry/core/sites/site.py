"""Sites: the places in a model where an adapter can sit, one description for all kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorry.core.sites.kinds import Kind

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, eq=False)
class Site:
    """One place where an adapter can sit.

    All arithmetic sees the weight as a matrix of shape ``(*lead, out_features, in_features)``, whatever its native
    layout: a convolution's ``in_features`` is input channels times kernel size, an embedding's is its vocabulary,
    ``lead`` is the number of experts of a bank. For a block (a whole module) the numbers are 0.

    Attributes
    ----------
    path
        Name of the site: the module's path, plus the parameter's name where a module holds several sites.
    kind
        The arithmetic of this sort of layer.
    owner
        The module whose ``forward`` uses the weight.
    holder
        The module that stores the weight (differs from `owner` for the output projection of ``nn.MultiheadAttention``).
    parameter
        Attribute of `holder` under which the weight is found; empty for a block.
    tied
        Names of other parameters that are the same tensor.
    """

    path: str
    kind: Kind
    owner: nn.Module
    holder: nn.Module
    parameter: str
    out_features: int
    in_features: int
    lead: tuple[int, ...] = ()
    tied: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Last component of the path, e.g. ``q_proj``."""
        return self.path.rpartition(".")[2]

    @cached_property
    def layer(self) -> int | None:
        """Index of the transformer block that the site lies in: the first number in its path."""
        found = _LAYER.search(self.path)
        return int(found.group(1)) if found else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight seen as a (bank of) matrix: ``(*lead, out, in)``."""
        return (*self.lead, self.out_features, self.in_features)

    @property
    def stored(self) -> Tensor:
        """The weight as the model stores it (it may be quantised)."""
        weight = getattr(self.holder, self.parameter)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Device of the stored weight (of the first parameter for a block)."""
        if self.parameter:
            return self.stored.device
        first = next(self.owner.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    def matrix(self) -> Tensor:
        """Return the weight, dequantised if need be, as ``(*lead, out, in)``."""
        from lorry.core.sites.storage import storage_of

        return self.kind.to_matrix(self, storage_of(self).read(self))

    def __repr__(self) -> str:
        """Return kind, path and shape."""
        return f"Site({self.path}, {self.kind.name}, {'x'.join(map(str, self.shape))})"
