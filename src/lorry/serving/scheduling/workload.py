"""Requests as they come to a service: gamma arrivals, a power law over adapters, ranges of lengths (as S-LoRA's)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from lorry.core.errors import OptionError
from lorry.core.options import check_options, option


class Arrival(NamedTuple):
    """One request: when it comes (seconds from the start), which adapter it names, and how long it is in tokens."""

    time: float
    adapter: int
    input: int
    output: int


@dataclass(frozen=True)
class Workload:
    """What is asked of a service. The same options and seed give the same requests."""

    adapters: int = option(200, "How many adapters there are.", at_least=1)
    rate: float = option(2.0, "Requests in a second, on average.", above=0)
    seconds: float = option(60.0, "How long requests come.", above=0)
    cv: float = option(
        1.0, "Coefficient of variation between arrivals: 0 even, 1 Poisson, more for bursts.", at_least=0
    )
    alpha: float = option(1.0, "Power law over adapters: 1 is uniform, less makes the first ones hot.", above=0)
    shortest_input: int = option(8, "Least tokens of a prompt.", at_least=1)
    longest_input: int = option(512, "Most tokens of a prompt.", at_least=1)
    shortest_output: int = option(8, "Least tokens of an answer.", at_least=1)
    longest_output: int = option(512, "Most tokens of an answer.", at_least=1)
    ranks: tuple[int, ...] = (8,)
    deadline: float = option(6.0, "Seconds within which a first token is of use.", above=0)
    seed: int = option(0, "Seed of the draws.")

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)
        for what in ("input", "output"):
            short, long = getattr(self, f"shortest_{what}"), getattr(self, f"longest_{what}")
            if short > long:
                raise OptionError(
                    f"Workload: 'shortest_{what}' must be at most 'longest_{what}', found {short} and {long}."
                )
        if not self.ranks or min(self.ranks) < 1:
            raise OptionError(f"Workload: 'ranks' must name ranks of at least 1, found {list(self.ranks)}.")

    def rank(self, adapter: int) -> int:
        """Return the rank of an adapter; the ranks go round."""
        return self.ranks[adapter % len(self.ranks)]


def arrivals(workload: Workload) -> list[Arrival]:
    """Return the requests of a workload in the order of their times.

    Times between arrivals have a gamma distribution with mean ``1 / rate`` and the given coefficient of variation; the
    adapter is ``floor(adapters * u ** (1 / alpha))`` with u uniform; lengths are uniform in their ranges.
    """
    draw = random.Random(workload.seed)
    w, now = workload, 0.0
    found: list[Arrival] = []
    shape = 1 / w.cv**2 if w.cv else 0.0
    while True:
        now += draw.gammavariate(shape, 1 / (shape * w.rate)) if w.cv else 1 / w.rate
        adapter = min(int(w.adapters * draw.random() ** (1 / w.alpha)), w.adapters - 1)
        arrival = Arrival(
            now,
            adapter,
            draw.randint(w.shortest_input, w.longest_input),
            draw.randint(w.shortest_output, w.longest_output),
        )
        if now >= w.seconds:
            return found
        found.append(arrival)
