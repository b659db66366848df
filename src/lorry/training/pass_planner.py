"""How a fleet puts the examples of its jobs into passes: the protocol, and the registry of its members.

A planner is a frozen dataclass in a file of `lorry.training.planners`, which registers itself. It plans rounds: of each
unfinished job it gets either the next micro-batch as a whole, or the examples of the next steps to take apart. Its plan
is a function of them alone, so that a run that is resumed goes on with the same passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

from torch import nn

from lorry.core.errors import OptionError
from lorry.core.options import check_options, from_options
from lorry.core.registry import Registry

from . import planners
from .jobs import Job
from .joint import Share
from .run import Run
from .task import Setting


class PassPlanner(ABC):
    """Puts the shares of a round into passes."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)

    @property
    def steps_ahead(self) -> int:
        """Return how many optimizer steps of each job it wants to see whole; 0 for the next micro-batch alone."""
        return 0

    def check(self, runs: Sequence[Run], setting: Setting) -> None:
        """Raise `OptionError` where it cannot plan for one of these jobs, before anything is trained."""
        return

    def within(self, model: nn.Module, jobs: Sequence[Job], limit: int) -> Self:
        """Return this planner, bounded so that training takes at most `limit` bytes; the model has no adapters yet.

        Raises
        ------
        OptionError
            It cannot bound memory, or no pass is small enough.
        """
        raise OptionError(f"The planner '{self.name}' cannot bound memory; leave max_memory out.")

    def in_stages(self, stages: int) -> Self:
        """Return this planner for a base that lies in stages of a pipeline.

        Raises
        ------
        OptionError
            It cannot fill a pipeline.
        """
        raise OptionError(
            f"The planner '{self.name}' gives one micro-batch of each job at a time, which cannot fill a pipeline; set "
            "planner: lorafusion."
        )

    @abstractmethod
    def passes(self, shares: Sequence[Share]) -> Sequence[Sequence[Share]]:
        """Return the passes of a round in order, those of a job's step before those of its next one.

        Parameters
        ----------
        shares
            The next micro-batch of each job; with `steps_ahead`, a share for each step of each job, to be taken apart
            by `Share.part`.

        Returns
        -------
        Sequence
            Shares of one family each; a pass without any is a no-op. Every example lies in one of them.
        """


P = TypeVar("P", bound=type[PassPlanner])
PLANNERS: Registry[type[PassPlanner]] = Registry("planner")
PLANNERS.source(planners.__name__, planners.__path__)


def register_planner(name: str) -> Callable[[P], P]:
    """Return a decorator that registers a planner under a name."""
    return PLANNERS.named(name)


def planner_from(value: Any, max_pad_ratio: float | None = 2.0, max_tokens: int | None = None) -> PassPlanner:
    """Return a planner from itself, its name, or ``{planner: name, **options}``.

    Parameters
    ----------
    value
        None is ``joined``.
    max_pad_ratio, max_tokens
        Of ``joined``, where its options do not say otherwise.

    Raises
    ------
    OptionError
        An unknown name or option, with near misses, or a value out of its range.
    """
    if isinstance(value, PassPlanner):
        return value
    options = dict(value) if isinstance(value, Mapping) else {"planner": value}
    name = options.pop("planner", None) or "joined"
    cls = PLANNERS.find(str(name))
    bounds = {"max_pad_ratio": max_pad_ratio, "max_tokens": max_tokens}
    known = getattr(cls, "__dataclass_fields__", {})
    return from_options(cls, {**{k: v for k, v in bounds.items() if k in known}, **options})
