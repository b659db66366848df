"""A workload replayed in real time against an engine, and what its users would have seen."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lorry.core.errors import LorryError, OptionError
from lorry.serving.engine import Engine
from lorry.serving.request import Request, Sampling
from lorry.serving.results import Stats
from lorry.serving.scheduling.workload import Arrival, Workload, arrivals
from lorry.serving.service import Service

#: Seconds between two looks at the engine.
_LOOK = 0.2


@dataclass
class Timing:
    """What became of one request; times are seconds from the start of the replay.

    Attributes
    ----------
    arrival
        When it was due, and what it asked for.
    first, end
        When its first token and its last came; None if that never happened.
    tokens
        Of its answer.
    ready
        Whether its adapter lay in the engine's pool when it came; None for the base.
    why
        Why it failed, if it did.
    """

    arrival: Arrival
    first: float | None = None
    end: float | None = None
    tokens: int = 0
    ready: bool | None = None
    why: str = ""


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes
    ----------
    workload
        What was asked.
    timings
        One for each request, in the order of arrival.
    course
        What the engine did meanwhile: seconds, requests that ran, requests that waited.
    seconds
        From the start to the last token.
    before, after
        Of the engine; None where it is asked over HTTP.
    """

    workload: Workload
    timings: list[Timing]
    course: list[tuple[float, int, int]]
    seconds: float
    before: Stats | None = None
    after: Stats | None = None

    @property
    def to_first(self) -> list[float]:
        """Seconds from arrival to the first token, ascending."""
        return sorted(each.first - each.arrival.time for each in self.timings if each.first is not None)

    @property
    def to_end(self) -> list[float]:
        """Seconds from arrival to the last token, ascending."""
        return sorted(each.end - each.arrival.time for each in self.timings if each.end is not None)

    @property
    def between(self) -> list[float]:
        """Seconds from token to token of each answer, on average, ascending."""
        whole = [t for t in self.timings if t.first is not None and t.end is not None and t.tokens > 1]
        return sorted((t.end - t.first) / (t.tokens - 1) for t in whole if t.end is not None and t.first is not None)

    def figures(self) -> dict[str, float]:
        """Return the figures of a table; shares are from 0 to 1, and absent where nothing was counted."""
        served = [each for each in self.timings if each.end is not None]
        found: dict[str, float] = {
            "requests": len(self.timings),
            "served": len(served),
            "requests per second": len(served) / self.seconds,
            "tokens of answers per second": sum(each.tokens for each in served) / self.seconds,
        }
        for name, seconds in (
            ("time to first token", self.to_first),
            ("time between tokens", self.between),
            ("latency", self.to_end),
        ):
            if seconds:
                found |= {f"{name}, p{share}, s": quantile(seconds, share / 100) for share in (50, 90, 99)}
        in_time = sum(seconds < self.workload.deadline for seconds in self.to_first)
        found[f"first token within {self.workload.deadline:g} s"] = in_time / max(len(self.timings), 1)
        named = [each.ready for each in self.timings if each.ready is not None]
        if named:
            found["adapter in the pool on arrival"] = sum(named) / len(named)
        if self.before is None or self.after is None:
            return found
        tried = self.after.prefix_hits + self.after.prefix_misses - self.before.prefix_hits - self.before.prefix_misses
        if tried:
            found["prefix found in the cache"] = (self.after.prefix_hits - self.before.prefix_hits) / tried
        found["preemptions"] = self.after.preemptions - self.before.preemptions
        return found


def quantile(ascending: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


class Bounded(Protocol):
    """What says how long a text may be."""

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""


def fitted(workload: Workload, engine: Bounded) -> Workload:
    """Return a workload whose prompts and answers fit what an engine sees; lengths that are too great are halved.

    Raises
    ------
    OptionError
        The engine sees fewer than two tokens.
    """
    most = engine.context
    if most < 2:
        raise OptionError(f"The engine sees {most} tokens; a prompt and an answer need two. Give it more memory.")
    long = min(workload.longest_input, most // 2)
    answer = min(workload.longest_output, most - long)
    return replace(
        workload,
        longest_input=long,
        shortest_input=min(workload.shortest_input, long),
        longest_output=answer,
        shortest_output=min(workload.shortest_output, answer),
    )


async def replay(service: Service[Engine], workload: Workload, names: Sequence[str] = ()) -> Replayed:
    """Send a workload's requests when they are due, with random prompts, and wait for the last answer.

    Parameters
    ----------
    service
        What answers; nobody else should ask it meanwhile.
    workload
        What is asked. Every answer runs to its length.
    names
        The adapters, the most wanted one first, as many as the workload has; without names the base is asked.

    Raises
    ------
    OptionError
        Names and the workload's number of adapters differ.
    """
    engine = service.engine
    timings, prompts = drawn(workload, names, range(engine.vocabulary))
    before, start = engine.stats(), time.monotonic()
    course: list[tuple[float, int, int]] = []

    def ask(place: int, timing: Timing) -> Coroutine[Any, Any, None]:
        name = names[timing.arrival.adapter] if names else None
        if name is not None:
            timing.ready = any(each.name == name and each.place == "pool" for each in engine.adapters())
        sampling = Sampling(max_tokens=timing.arrival.output, ignore_end=True)
        due, tokens = start + timing.arrival.time, tuple(prompts[place])
        request = Request(f"replay-{place}", tokens, {name: 1.0} if name else {}, sampling, arrival=due)
        return _ask(service, request, timing, start)

    watching = asyncio.create_task(_watch(engine, start, course))
    try:
        await when_due(timings, start, ask)
    finally:
        watching.cancel()
    return Replayed(workload, timings, course, time.monotonic() - start, before, engine.stats())


def drawn(workload: Workload, names: Sequence[str], tokens: Sequence[int]) -> tuple[list[Timing], list[list[int]]]:
    """Return a workload's requests with prompts of random tokens.

    Raises
    ------
    OptionError
        Names and the workload's number of adapters differ.
    """
    if names and len(names) != workload.adapters:
        raise OptionError(
            f"The workload draws from {workload.adapters} adapters, but {len(names)} are named. Make them agree."
        )
    draw = random.Random(workload.seed + 1)
    timings = [Timing(arrival) for arrival in arrivals(workload)]
    return timings, [draw.choices(tokens, k=each.arrival.input) for each in timings]


async def when_due(
    timings: Sequence[Timing], start: float, ask: Callable[[int, Timing], Coroutine[Any, Any, None]]
) -> None:
    """Ask each request when it is due, counted from `start`, and wait for the last answer."""
    asking: list[asyncio.Task[None]] = []
    try:
        for place, timing in enumerate(timings):
            await asyncio.sleep(max(start + timing.arrival.time - time.monotonic(), 0))
            asking.append(asyncio.create_task(ask(place, timing)))
        await asyncio.gather(*asking)
    finally:
        for task in asking:
            task.cancel()


async def _ask(service: Service[Engine], request: Request, timing: Timing, start: float) -> None:
    """Send one request and note when its answer comes."""
    try:
        async for output in service.stream(request):
            now = time.monotonic() - start
            if output.tokens and timing.first is None:
                timing.first = now
            timing.tokens += len(output.tokens)
            if output.finish in ("stop", "length"):
                timing.end = now
            elif output.finish is not None:
                timing.why = output.error or output.finish
    except LorryError as error:
        timing.why = str(error)


async def _watch(engine: Engine, start: float, course: list[tuple[float, int, int]]) -> None:
    """Note what the engine does, again and again."""
    while True:
        stats = engine.stats()
        course.append((time.monotonic() - start, stats.running, stats.waiting))
        await asyncio.sleep(_LOOK)
