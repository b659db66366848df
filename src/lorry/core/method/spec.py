"""What a method says of its tensors, and what it is given: specs, starts, layouts, what calibration saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError
from lorry.core.sites.site import Site

Init = Callable[[Tensor, Generator], object]
Tensors = Mapping[str, Tensor]
#: Sites with the tensors there, for what a method does to all of its sites together.
Places = Sequence[tuple[Site, Tensors]]


def zeros(tensor: Tensor, generator: Generator) -> None:
    """Fill with zeros."""
    tensor.zero_()


def ones(tensor: Tensor, generator: Generator) -> None:
    """Fill with ones."""
    tensor.fill_(1)


def kaiming(tensor: Tensor, generator: Generator) -> None:
    """Fill uniformly in ±1/√fan_in (Kaiming with a=√5), fan_in being the last dimension."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound, generator=generator)


def normal(std: float = 1.0) -> Init:
    """Return an initialiser that draws from N(0, std²)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def forgotten(tensor: Tensor, generator: Generator) -> None:
    """Refuse to start a tensor anew: a copy of an adapter takes along what its tensors are, not how they started.

    Raises
    ------
    AdapterError
        Always.
    """
    raise AdapterError("A copied adapter does not know how its tensors start; attach a fresh one with lorry.attach.")


def constant(value: float) -> Init:
    """Return an initialiser that fills with `value`."""
    return lambda tensor, generator: tensor.fill_(value)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a method owns: its shape, how it starts, whether it is trained.

    `dtype` None means the adapter's own; indices and masks name theirs and keep it through every cast. Tensors with
    ``saved=False`` are rebuilt from the seed and not written to the checkpoint. `within` are the whole numbers that an
    index may hold, which `rising` says rise strictly: what is read from a file is checked against them, since a wrong
    one would crash later or change another weight.
    """

    shape: tuple[int, ...]
    init: Init = zeros
    trained: bool = True
    dtype: torch.dtype | None = None
    saved: bool = True
    within: range | None = None
    rising: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        """Return what a pickled or copied model takes along; a start is often a closure, which cannot be pickled."""
        return TensorSpec, (self.shape, forgotten, self.trained, self.dtype, self.saved, self.within, self.rising)

    def misplaced(self, value: Tensor) -> str | None:
        """Return what is wrong with the whole numbers that a file gives for this tensor, or None."""
        if self.within is None or not value.numel():
            return None
        low, high = int(value.min()), int(value.max())
        if low < self.within.start or high >= self.within.stop:
            return f"whole numbers from {self.within.start} to {self.within.stop - 1}, found {low} to {high}"
        flat = value.flatten()
        if self.rising and not bool((flat[1:] > flat[:-1]).all()):
            return "whole numbers that rise, found some twice or out of order"
        return None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Observed:
    """What calibration saw at one site, on the CPU in float32; only what the method asked for is there.

    Attributes
    ----------
    gradient
        Mean over batches (and data-parallel processes) of the gradient of the weight, ``(*lead, out, in)``.
    change
        What a few steps of full fine-tuning add to the weight, ``(*lead, out, in)``.
    inputs
        Rows ``(k, in)`` with ``inputsᵀ inputs = Σ (x - mean)(x - mean)ᵀ``: exact if k is not less than the rank of the
        inputs, else the principal part.
    mean
        Of the inputs, ``(in,)``.
    count, variance
        Number of inputs, and ``Σ ‖x - mean‖²``, of which `inputs` explains a part.
    """

    gradient: Tensor | None = None
    change: Tensor | None = None
    inputs: Tensor | None = None
    mean: Tensor | None = None
    count: int = 0
    variance: float = 0.0


@dataclass(frozen=True)
class Layout:
    """All tensors of an adapter: those of each site by path, and those that sites share.

    Where an adapter has sites of several methods, `sharing` are the paths of those whose method shares.
    """

    sites: dict[str, dict[str, TensorSpec]]
    shared: dict[str, TensorSpec] = field(default_factory=dict)
    sharing: set[str] = field(default_factory=set)

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every spec once."""
        yield from self.shared.values()
        for specs in self.sites.values():
            yield from specs.values()

    def count(self, trained: bool = True) -> int:
        """Return the number of elements, of trained tensors only unless told otherwise."""
        return sum(s.numel for s in self.specs() if s.trained or not trained)
