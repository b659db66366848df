"""CMLoRA: adapters rule in turn, by the frequencies that they change, and the others use kept features again.

Zou, Shen, Bouganis, Zhao: Cached Multi-LoRA Composition for Multi-Concept Image Generation (ICLR 2025, arXiv
2502.04923). Every adapter predicts by itself at each step; the dominant one weighs more, and it alone is worked out in
full when it becomes so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.diffusion.families import family_of
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, adapters_of, register_sampler
from lorry.diffusion.samplers.parts.apart import Apart
from lorry.diffusion.samplers.parts.dominance import (
    coefficient_at,
    dominance_weights,
    dominant_adapter,
    refresh_steps,
)
from lorry.diffusion.samplers.parts.names import check_names
from lorry.diffusion.samplers.parts.passes import Passes
from lorry.diffusion.samplers.parts.spectrum import high_share
from lorry.diffusion.sampling import Step

#: Steps before the late phase begins, of those of a run, in the released code.
EARLY = 120 / 220


@register_sampler("cmlora", paper="arXiv 2502.04923")
@dataclass(frozen=True)
class CMLoRA(Sampler):
    """Dominance by frequency, with features kept for each adapter."""

    low: tuple[str, ...] = option(
        (), "Adapters that change low frequencies (backgrounds), which rule late; `frequency_order` finds them."
    )
    high: tuple[str, ...] = option(
        (), "Adapters that change high frequencies, in the order of their turns; those in neither set follow them."
    )
    phase: str = option(
        "offline",
        "What ends the early phase: a share of the steps (offline), the measure of the latents (online), or nothing, "
        "all adapters taking turns (async).",
        choices=("offline", "online", "async"),
    )
    early: float = option(EARLY, "Share of the steps that is early, for offline.", at_least=0, at_most=1)
    threshold: float = option(
        0.40, "g: early while H of the latents is at least this, for online; `calibrated_threshold` finds it."
    )
    cut: float = option(0.2, "h: where high frequencies begin, as a share of the largest.", at_least=0, at_most=1)
    radius: int | None = option(None, "A fixed radius in place of the share h, as in the released code.", at_least=0)
    measured: str = option(
        "each",
        "What H is measured on: each picture for itself, the mean of the batch, or its first picture alone.",
        choices=("each", "mean", "first"),
    )
    async_period: int = option(20, "Steps of a turn, for async.", at_least=1)
    pool: str = option("low", "Who rules late: the low set, or all but the first (tail).", choices=("low", "tail"))
    schedule: str = option(
        "non-uniform",
        "At which steps dominance moves on and features are worked out anew: often at both ends and seldom between "
        "(non-uniform), evenly (uniform), or at each step (every).",
        choices=("non-uniform", "uniform", "every"),
    )
    period: int = option(2, "Steps between refreshes, for uniform.", at_least=1)
    sparse_from: float = option(0.375, "Share of the run after which refreshes are rarer.", at_least=0, at_most=1)
    sparse_until: float = option(0.875, "Share of the run up to which they are.", at_least=0, at_most=1)
    c1: int = option(2, "Steps between refreshes at both ends, for non-uniform.", at_least=1)
    c2: int = option(3, "Steps between refreshes in the middle, for non-uniform.", at_least=1)
    coefficient: float | None = option(
        None, "c at first: how many times the dominant one weighs what another one does; n - 0.5 if left out.", above=0
    )
    decay: float = option(0.5, "Refresh number k takes this to the power of k off c; 0 for no decay.", at_least=0)
    least: float | None = option(1.0, "c never falls below this; None for no bound.")
    cache: bool = option(True, "Whether deep features are kept; if not, every adapter makes a full pass at each step.")
    refresh_late: bool = option(True, "Whether features are worked out anew in the late phase, too.")
    at_once: int = option(0, "How many adapters of pictures go through the network at once; 0 for all.", at_least=0)

    #: As the paper means it, and as the released code runs: its decay never reaches the weights, its radius lies beyond
    #: the spectrum of 64 x 64 latents (H is NaN, hence late at once), and its non-uniform schedule keeps nothing.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "specified": {},
        "released": {
            "phase": "online",
            "radius": 80,
            "measured": "first",
            "pool": "tail",
            "decay": 0.0,
            "least": None,
            "cache": False,
            "refresh_late": False,
        },
    }

    def check(self) -> None:
        """Check the two sets and the two shares against each other."""
        both = set(self.high) & set(self.low)
        if both:
            raise OptionError(f"'{min(both)}' is in the high set and in the low set; name it in one of them.")
        if self.sparse_from > self.sparse_until:
            raise OptionError(
                f"sparse_from must not be above sparse_until, found {self.sparse_from} and {self.sparse_until}."
            )
        if self.decay >= 1 and self.least is None:
            raise OptionError(f"A decay of {self.decay} runs away; take one below 1, or give least a bound.")

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        pictures = [adapters_of(order.composition) for order in orders]
        check_names("high", self.high, pictures)
        check_names("low", self.low, pictures)
        network = family_of(pipeline).network(pipeline)
        with Passes(network, keep=self.cache, at_once=self.at_once) as passes:
            yield _Dominance(self, passes)

    def sets(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the high and the low set of a picture's adapters."""
        low = tuple(name for name in self.low if name in names)
        high = tuple(name for name in self.high if name in names)
        return (*high, *(name for name in names if name not in {*high, *low})), low

    def refreshes(self, steps: int) -> tuple[int, ...]:
        """Return the steps of a run at which dominance moves on."""
        return refresh_steps(
            self.schedule,
            steps,
            period=self.period,
            early=self.sparse_from,
            late=self.sparse_until,
            c1=self.c1,
            c2=self.c2,
        )


@dataclass
class _Course:
    """What happened to a picture."""

    dominant: list[str] = field(default_factory=list)
    early: list[bool] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    measures: list[float] = field(default_factory=list)


class _Dominance:
    """A batch under way."""

    def __init__(self, options: CMLoRA, passes: Passes) -> None:
        self._options = options
        self._apart = Apart(passes)
        self._refresh = -1
        self._told: list[_Course] = []

    def predict(self, step: Step) -> Tensor:
        """Return the guided weighted mean."""
        pictures = self._apart.pictures(step)
        if not self._told:
            self._told = [_Course() for _ in pictures]
        measures = self._measures(step)
        refresh = step.number in self._options.refreshes(step.count)
        self._refresh += refresh
        weights = [self._weights(step, row, names, measures[row], refresh) for row, names in enumerate(pictures)]
        return self._apart.predict(step, weights)

    def reports(self) -> list[dict[str, Any]]:
        """Return who was dominant at each step, c and H of it, and what was run."""
        return [{**vars(told), **counted} for told, counted in zip(self._told, self._apart.reports(), strict=True)]

    def _measures(self, step: Step) -> list[float]:
        """Return H of what the step before this one left, 1 before the first."""
        options, count = self._options, len(step.latents)
        if step.number == 0 or options.phase != "online":
            return [1.0] * count
        found = high_share(step.latents, options.cut, options.radius)
        if options.measured != "each":
            found = (found.mean() if options.measured == "mean" else found[0]).expand(count)
        return [float(value) for value in found]

    def _weights(self, step: Step, row: int, names: Sequence[str | None], measure: float, refresh: bool) -> list[float]:
        options, told = self._options, self._told[row]
        adapters = [name for name in names if name is not None]
        if not adapters:
            return [1.0]
        early = step.number <= math.floor(options.early * step.count + 1e-9)
        if options.phase == "online":
            early = measure >= options.threshold
        if refresh:
            told.dominant.append(self._dominant(step, adapters, early))
            if early or options.refresh_late:
                self._apart.drop(row, [told.dominant[-1]])
        else:
            told.dominant.append(told.dominant[-1])
        c = coefficient_at(self._refresh, len(adapters), options.coefficient, options.decay, options.least)
        told.early.append(early)
        told.coefficients.append(c)
        told.measures.append(measure)
        return list(dominance_weights(len(adapters), adapters.index(told.dominant[-1]), c))

    def _dominant(self, step: Step, adapters: Sequence[str], early: bool) -> str:
        options = self._options
        high, low = options.sets(adapters)
        if options.phase == "async":
            return (*high, *low)[step.number // options.async_period % len(adapters)]
        return dominant_adapter(high, low, self._refresh, early=early, pool=options.pool)
