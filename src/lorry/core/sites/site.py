"""Sites: the places in a model where an adapter can sit, and what a kind of layer must be able to do for them.

`Site` is one description for all sorts of layers. `Kind` is the arithmetic of one sort; a new one is a class in a file
of its own under `lorry.core.sites.kinds` (or in the caller's code), marked with `register_kind`.

Inside, rank units lie in the last dimension whatever the layer's own layout is, so that what happens between `down`
and `up` (scale, gates, masks) is the same code for all kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

import lorry.core.sites.quantized  # noqa: F401  registers its storages; it imports no other package until one is used
from lorry.core.errors import SiteError
from lorry.core.registry import Registry
from lorry.core.sites.storage import Storage, storage_of
from lorry.kernels.thin import thin_linear


class Kind(ABC):
    """Arithmetic of one sort of layer, and what it can do. Stateless; there is one instance of each.

    Nothing outside `lorry.core.sites` asks for a kind's name: it asks for one of the capabilities below.

    Attributes
    ----------
    name
        What users and files call it, as in ``kind:linear``.
    aliases
        Former names, still understood in targets and files.
    priority
        Kinds of higher priority are asked first, and the first that finds sites in a module has them. The common kinds
        lie below the default, so that a new kind may claim what is a linear layer by its class.
    presets
        The presets of targets that it belongs to.
    in_all
        Whether the preset ``all`` means it too; what decides where tokens go is adapted by name or by its own preset.
    additive
        Whether ``forward(x)`` can be followed by ``+ up(down(x))``. Otherwise the weight itself is exchanged for
        ``W + ΔW`` while its owner runs, which needs the update dense.
    whole
        Whether the site is a whole module without a weight of its own, whose forward a method takes over.
    positionwise
        Whether the layer computes each position of ``(batch, length)`` from that position alone, so that what is
        known of a token (its kind, its mask) applies to its output.
    row_channels
        Whether each row of the matrix makes one channel of the output, so that a factor for the row is one for the
        channel (DoRA).
    plain_product
        Whether ``down`` is ``x Aᵀ`` and ``up`` is ``h Bᵀ`` along the last dimension and nothing else, so that a fused
        low-rank product may take their place, and inputs may be observed as vectors of `in` numbers.
    indexed
        Whether the layer's input is whole numbers (tokens, positions) instead of floating-point values.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    priority: ClassVar[int] = 10
    presets: ClassVar[tuple[str, ...]] = ()
    in_all: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    positionwise: ClassVar[bool] = True
    row_channels: ClassVar[bool] = True
    plain_product: ClassVar[bool] = False
    indexed: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        """Let copies and pickles of a model refer to the one instance."""
        return registered_kind, (self.name,)

    @abstractmethod
    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the sites of this kind that `module` owns."""

    def factors_apply(self, site: Site) -> bool:
        """Whether the update can be applied through its factors (a grouped convolution needs it dense)."""
        return self.additive

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Return ``h`` of shape ``(..., rank)`` for the layer input `x` and `a` of shape ``(rank, in)``."""
        raise SiteError(f"{site}: a {self.name} site has no down-projection of its own.")

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Return the update of the layer's output for ``h`` ``(..., rank)`` and `b` ``(out, rank)``."""
        return thin_linear(h, b)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Return what the layer would give for input `x` with `matrix` as weight and no bias."""
        raise SiteError(f"{site}: a {self.name} site has no dense form of its own.")

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Return the natively laid out `weight` as ``(*lead, out, in)``."""
        return weight

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Return a matrix ``(*lead, out, in)`` in the layer's native layout."""
        return matrix

    def channels_last(self, site: Site, y: Tensor) -> Tensor:
        """Return a view of the layer's output with its channels in the last dimension."""
        return y

    def channels_back(self, site: Site, y: Tensor) -> Tensor:
        """Return a view of `y`, which has its channels in the last dimension, in the layout of the layer's output."""
        return y

    def kernel(self, site: Site) -> tuple[int, ...]:
        """Return the sizes over which a row of the matrix reaches besides input channels: those of a convolution's
        window, none for other kinds.
        """
        return ()

    def bias(self, site: Site) -> Tensor | None:
        """Return the bias that the layer adds to its output, if any."""
        return getattr(site.owner, "bias", None)


#: All kinds by name. The files of `lorry.core.sites.kinds` register theirs at the first look-up.
KINDS: Registry[Kind] = Registry("kind", error=SiteError)
K = TypeVar("K", bound=type[Kind])


def register_kind(cls: K) -> K:
    """Register a kind of site under its name."""
    KINDS.add(cls.name, cls())
    return cls


def registered_kind(name: str) -> Kind:
    """Return the kind of this name.

    Raises
    ------
    SiteError
        There is none, with near misses.
    """
    return KINDS.find(name)


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
    layer
        Index of the block of the model's main stack that the site lies in; None outside of it, and where a model has
        no single main stack (see `lorry.core.sites.stacks`).
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
    layer: int | None = None

    @property
    def name(self) -> str:
        """Last component of the path, e.g. ``q_proj``."""
        return self.path.rpartition(".")[2]

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
    def kept(self) -> bool:
        """Whether the weight is a parameter of its own, which can be written and exchanged; one that is worked out from
        others at each use (`torch.nn.utils.parametrizations`) is none.
        """
        return self.holder._parameters.get(self.parameter) is not None

    @property
    def storage(self) -> Storage:
        """How the weight is stored.

        Raises
        ------
        SiteError
            No storage knows the type of the weight.
        """
        return storage_of(self)

    @property
    def device(self) -> torch.device:
        """Device of the stored weight (of the first parameter for a block)."""
        if self.parameter:
            return self.stored.device
        first = next(self.owner.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    def matrix(self) -> Tensor:
        """Return the weight, dequantised if need be, as ``(*lead, out, in)``."""
        return self.kind.to_matrix(self, self.storage.read(self))

    def __repr__(self) -> str:
        """Return kind, path and shape."""
        return f"Site({self.path}, {self.kind.name}, {'x'.join(map(str, self.shape))})"
