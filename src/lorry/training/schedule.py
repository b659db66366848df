"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state of them.

A schedule is a frozen dataclass whose fields are its options; a new one is a class that registers itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from lorry.core.options import check_options, option
from lorry.core.registry import Registry


class Schedule(ABC):
    """The course of the learning rate after its warm-up."""

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)

    @abstractmethod
    def left(self, done: float) -> float:
        """Return what is left of the rate, from 0 to 1, when a share `done` of the steps after the warm-up is done."""


S = TypeVar("S", bound=type[Schedule])
SCHEDULES: Registry[type[Schedule]] = Registry("schedule")


def register_schedule(name: str):  # type: ignore[no-untyped-def]
    """Return a decorator that registers a schedule, a frozen dataclass, under a name."""

    def add(cls: S) -> S:
        SCHEDULES.add(name, cls)
        return cls

    return add


@register_schedule("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate to the end."""

    def left(self, done: float) -> float:
        """Return 1."""
        return 1.0


@register_schedule("linear")
@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line to nothing."""

    def left(self, done: float) -> float:
        """Return ``1 - done``."""
        return 1.0 - done


@register_schedule("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine to nothing (Loshchilov and Hutter 2017, without restarts)."""

    def left(self, done: float) -> float:
        """Return ``(1 + cos(π done)) / 2``."""
        return 0.5 * (1.0 + math.cos(math.pi * done))


@register_schedule("constant-then-linear")
@dataclass(frozen=True)
class ConstantThenLinear(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): the same rate, and a straight line to nothing at the end."""

    decay: float = option(0.2, "Share of the steps after the warm-up in which the rate falls.", above=0, at_most=1)

    def left(self, done: float) -> float:
        """Return 1, and what is left of the line at the end."""
        return min(1.0, (1.0 - done) / self.decay)


def warmup_steps(warmup: float, total: int) -> int:
    """Return the steps of the warm-up: `warmup` itself, or that fraction of `total` if it is below 1."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def rate_factor(schedule: str | Schedule, step: int, total: int, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Return the factor of the learning rate at a step.

    Parameters
    ----------
    schedule
        A schedule, or the name of one of `SCHEDULES` with its default options.
    step
        Optimizer steps done before this one, from 0.
    total
        Optimizer steps of the whole run.
    warmup
        Steps over which the rate rises linearly (the first step has 1/steps of it), or a fraction
        of the run if below 1.
    floor
        What is left of the rate at the end, as a fraction.

    Returns
    -------
    float
        From 0 to 1. Beyond `total` it stays at the floor (1 for ``constant``).
    """
    rising = warmup_steps(warmup, total)
    if step < rising:
        return (step + 1) / rising
    course = SCHEDULES.find(schedule)() if isinstance(schedule, str) else schedule
    left = course.left(min(1.0, (step - rising) / max(1, total - rising)))
    # exactly 1 where nothing is taken away
    return 1.0 if left == 1.0 else floor + (1.0 - floor) * left
