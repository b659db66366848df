"""Scalings: which factor the update has, where that is chosen apart from the method, the start and the dynamics.

A scaling is a frozen dataclass in a file of its own, which registers itself. It turns a method's ``alpha`` and rank
into the factor of ``B A``, and writes that into the method's own options: nothing else has to know of it, and the
checkpoint holds what any other tool reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, TypeVar

from lorry.core.errors import OptionError
from lorry.core.method.base import Method
from lorry.core.options import check_options
from lorry.core.registry import Registry

STABILIZED = "rank_stabilized"


class Scaling:
    """How the factor of an update follows from alpha and rank. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    #: Reference of what published it, e.g. ``arXiv 2312.03732``.
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)

    def factor(self, alpha: float, rank: int) -> float:
        """Return the factor of ``B A`` for an alpha and a rank."""
        raise NotImplementedError

    def of(self, method: Method) -> Method:
        """Return the method with options under which its update has this factor.

        Raises
        ------
        OptionError
            The method's update is not scaled by an alpha over its rank, or its alpha is needed and not given.
        """
        rank = self._rank(method)
        alpha: float | None = getattr(method, "alpha")  # noqa: B009  every method with an `alpha_rank` has one
        if alpha is None:
            raise OptionError(
                f"The scaling '{self.name}' of {type(method).__name__} needs alpha, which is not given; set alpha."
            )
        return method.with_options(alpha=self.factor(alpha, rank) * rank)

    def _rank(self, method: Method) -> int:
        """Return the rank that divides alpha, after a check that this scaling may decide."""
        rank = method.alpha_rank
        if rank is None:
            raise OptionError(
                f"{type(method).__name__} has no scale of alpha over its rank, so the scaling '{self.name}' has "
                "nothing to set. Leave the scaling out, or take a method with alpha and rank (lora, dora, hira, loha)."
            )
        if getattr(method, STABILIZED, False) and not self.stabilizes:
            raise OptionError(
                f"The method has {STABILIZED}, which is the scaling 'rslora', and the scaling '{self.name}' is asked "
                "for. Leave one of them out."
            )
        return rank

    #: Whether it is what methods with the option ``rank_stabilized`` do by themselves.
    stabilizes: ClassVar[bool] = False


def takes_stabilized(method: Method) -> bool:
    """Return whether a method has rsLoRA's scale as an option of its own."""
    return STABILIZED in {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]


S = TypeVar("S", bound=type[Scaling])
SCALINGS: Registry[type[Scaling]] = Registry("scaling", "`lorry methods --kind scaling` lists them.")
SCALINGS.source(__name__, __path__)


def register_scaling(name: str, *, paper: str = "") -> Callable[[S], S]:
    """Return a decorator that registers a scaling under a name, with the reference of what published it."""
    return SCALINGS.named(name, paper=paper)
