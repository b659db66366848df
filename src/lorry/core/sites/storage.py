"""Storage: how the base weight of a site is kept (dense, quantised), and how it is read and exchanged.

The forward pass never asks: it calls the layer's own ``forward``. Only what needs the weight itself does, i.e.
fusing, norms, fingerprints and methods that start from the weight. A new storage is one class, registered by
`register_storage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from lorry.core.errors import SiteError


class Stored(Protocol):
    """What a storage needs to know of the place of a weight; a `lorry.core.sites.site.Site` is one."""

    @property
    def path(self) -> str:
        """Name of the place, for errors."""

    @property
    def stored(self) -> Tensor:
        """The weight as the model stores it."""

    @property
    def holder(self) -> nn.Module:
        """The module that stores it, and that may keep scales and other facts of it."""


class Storage(ABC):
    """One way of keeping a weight."""

    name: ClassVar[str]
    #: Whether a value that is written can be read back without loss (up to the weight's dtype).
    lossless: ClassVar[bool]

    @abstractmethod
    def keeps(self, weight: Tensor) -> bool:
        """Whether `weight` is stored this way."""

    @abstractmethod
    def read(self, place: Stored) -> Tensor:
        """Return the weight in its native layout as an ordinary floating tensor; it may share memory with the model."""

    @abstractmethod
    def encode(self, place: Stored, value: Tensor) -> nn.Parameter:
        """Return a new parameter that stores `value` (native layout, float32 or better) as the present one is
        stored.
        """

    def codes(self, place: Stored) -> Sequence[Tensor] | None:
        """Return the tensors of a lossy storage that tell one stored weight from another, the same for as long as the
        weight is the same; None if there are no such.
        """
        return None


_STORAGES: list[Storage] = []


def register_storage(storage: Storage) -> Storage:
    """Add a storage; the last one registered is asked first."""
    _STORAGES.insert(0, storage)
    return storage


def find_storage(weight: Tensor) -> Storage | None:
    """Return the storage that keeps `weight`, or None if none knows its type."""
    if DENSE.keeps(weight):
        return DENSE
    return next((storage for storage in _STORAGES if storage.keeps(weight)), None)


def storage_of(place: Stored) -> Storage:
    """Return the storage of a site's weight.

    Raises
    ------
    SiteError
        The weight is of a type that no storage knows.
    """
    weight = place.stored
    storage = find_storage(weight)
    if storage is None:
        raise SiteError(
            f"The weight of '{place.path}' is a {type(weight).__name__} of {weight.dtype}, which no storage can read. "
            f"Known: {', '.join(s.name for s in _STORAGES)}. Adapters still run on it; fusing and weight-based starts "
            "do not."
        )
    return storage


class Dense(Storage):
    """An ordinary floating-point tensor."""

    name = "dense"
    lossless = True

    def keeps(self, weight: Tensor) -> bool:
        """Whether it is a plain floating tensor or parameter."""
        return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1

    def read(self, place: Stored) -> Tensor:
        """Return the tensor itself."""
        return place.stored.detach()

    def encode(self, place: Stored, value: Tensor) -> nn.Parameter:
        """Round once to the weight's dtype."""
        return nn.Parameter(value.to(place.stored.dtype), requires_grad=place.stored.requires_grad)


DENSE = register_storage(Dense())
