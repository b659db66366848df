"""Weights of a composition: numbers, tensors with a gradient, or functions of the site and of the sampler's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.context import Context
from lorry.core.sites.site import Site
from lorry.core.sites.targets import matches


@runtime_checkable
class Weighting(Protocol):
    """A weight that depends on where and when it is asked for; a schedule is one."""

    def __call__(self, site: Site, step: float | None, timestep: Tensor | float | None) -> float | Tensor:
        """Return a number, or a tensor that is a scalar or has one entry for each row."""


#: A weight of an adapter in a composition.
Weight = float | Tensor | Weighting


@dataclass(frozen=True)
class BySite:
    """Another weight at each site: the first pattern that matches its path counts.

    Attributes
    ----------
    patterns
        Target pattern -> weight, e.g. ``{"up_blocks.0.*": 1.0}``; a weight may be a function again.
    default
        At sites that no pattern matches.
    """

    patterns: Mapping[str, Weight]
    default: Weight = 0.0

    def of(self, site: Site) -> Weight:
        """Return what is given for the site, which may be a function."""
        return next((w for pattern, w in self.patterns.items() if matches(site.path, pattern)), self.default)

    def __call__(self, site: Site, step: float | None, timestep: Tensor | float | None) -> float | Tensor:
        """Return the weight at the site."""
        return resolved(self.of(site), site, step, timestep)


@dataclass(frozen=True)
class ByStep:
    """A weight by the sampler's step, which `lorry.context` gives (``step=``)."""

    at: Callable[[float], float | Tensor]

    def __call__(self, site: Site, step: float | None, timestep: Tensor | float | None) -> float | Tensor:
        """Return the weight at the step.

        Raises
        ------
        AdapterError
            Nobody told the step.
        """
        if step is None:
            raise AdapterError(
                f"A weight at '{site.path}' depends on the step, but none was told; run the model inside "
                "lorry.context(model, step=...)."
            )
        return self.at(step)


@dataclass(frozen=True)
class ByTimestep:
    """A weight by diffusion time, which `lorry.context` gives (``timestep=``), for each row if it is given so."""

    at: Callable[[Tensor | float], float | Tensor]

    def __call__(self, site: Site, step: float | None, timestep: Tensor | float | None) -> float | Tensor:
        """Return the weight at the time.

        Raises
        ------
        AdapterError
            Nobody told the time.
        """
        if timestep is None:
            raise AdapterError(
                f"A weight at '{site.path}' depends on the timestep, but none was told; run the model inside "
                "lorry.context(model, timestep=...)."
            )
        return self.at(timestep)


def resolved(weight: Weight, site: Site, step: float | None, timestep: Tensor | float | None) -> float | Tensor:
    """Return a weight as a number or a tensor."""
    return weight(site, step, timestep) if callable(weight) else weight


def check_weight(name: str, weight: object) -> Weight:
    """Return a weight as it is used, a number as float.

    Raises
    ------
    AdapterError
        It is neither a finite number, nor a floating tensor of at most one dimension, nor a function.
    """
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim <= 1:
        return weight
    if isinstance(weight, int | float) and not isinstance(weight, bool) and abs(weight) < float("inf"):
        return float(weight)
    if callable(weight) and not isinstance(weight, Tensor):
        return weight
    shown = f"a tensor {tuple(weight.shape)} of {weight.dtype}" if isinstance(weight, Tensor) else repr(weight)
    raise AdapterError(
        f"The weight of adapter '{name}' must be a finite number, a floating tensor (a scalar, or one entry for each "
        f"row) or a function (site, step, timestep) -> weight; found {shown}."
    )


def varies(weight: Weight) -> bool:
    """Whether a weight may change from call to call, or carries a gradient."""
    return not isinstance(weight, float)


def at_call(weight: Weight, site: Site, context: Context) -> float | Tensor:
    """Return the weight in a call of a layer.

    Raises
    ------
    AdapterError
        The function gave something else than a finite number or a tensor.
    """
    found = resolved(weight, site, context.step, context.timestep)
    if isinstance(found, Tensor):
        return found.float() if not found.is_floating_point() else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < float("inf"):
        raise AdapterError(f"A weight function gave {found!r} at '{site.path}'; it must be a number or a tensor.")
    return float(found)
