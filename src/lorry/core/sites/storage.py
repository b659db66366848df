"""Storage: how the base weight of a site is kept (dense, quantised), and how it is read and exchanged.

The forward pass never asks: it calls the layer's own ``forward``. Only what needs the weight itself does, i.e.
merging, norms, fingerprints and methods that start from the weight. A new storage is one class registered here by
`register_storage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.sites.site import Site


class Storage(ABC):
    """One way of keeping a weight."""

    name: ClassVar[str]
    #: Whether a value that is written can be read back without loss (up to the weight's dtype).
    lossless: ClassVar[bool]

    @abstractmethod
    def keeps(self, weight: Tensor) -> bool:
        """Whether `weight` is stored this way."""

    @abstractmethod
    def read(self, site: Site) -> Tensor:
        """Return the weight in its native layout as an ordinary floating tensor; it may share memory with the model."""

    @abstractmethod
    def encode(self, site: Site, value: Tensor) -> nn.Parameter:
        """Return a new parameter that stores `value` (native layout, float32 or better) as the present one is
        stored.
        """


_STORAGES: list[Storage] = []


def register_storage(storage: Storage) -> Storage:
    """Add a storage; the last one registered is asked first."""
    _STORAGES.insert(0, storage)
    return storage


def storage_of(site: Site) -> Storage:
    """Return the storage of a site's weight.

    Raises
    ------
    SiteError
        The weight is of a type that no storage knows.
    """
    weight = site.stored
    if DENSE.keeps(weight):
        return DENSE
    import lorry.core.sites.quantized  # noqa: F401  registers itself; here, so that only those who need it pay for it

    for storage in _STORAGES:
        if storage.keeps(weight):
            return storage
    raise SiteError(
        f"The weight of '{site.path}' is a {type(weight).__name__} of {weight.dtype}, which no storage can read. "
        "Known: "
        f"{', '.join(s.name for s in _STORAGES)}. Adapters still run on it; merging and weight-based starts do not."
    )


class Dense(Storage):
    """An ordinary floating-point tensor."""

    name = "dense"
    lossless = True

    def keeps(self, weight: Tensor) -> bool:
        """Whether it is a plain floating tensor or parameter."""
        return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1

    def read(self, site: Site) -> Tensor:
        """Return the tensor itself."""
        return site.stored.detach()

    def encode(self, site: Site, value: Tensor) -> nn.Parameter:
        """Round once to the weight's dtype."""
        return nn.Parameter(value.to(site.stored.dtype), requires_grad=site.stored.requires_grad)


DENSE = register_storage(Dense())


def lossless(weight: Tensor) -> bool:
    """Whether a weight is stored without loss, so that its values tell one base from another."""
    return any(s.lossless for s in _STORAGES if s.keeps(weight))
