"""A deployment simulated without a model: who is admitted when, and what users see of it.

What it assumes: every answer runs to its length, which the scheduler knows as the request's limit; a step takes what
`Deployment` says; prompts are read in one step together; requests are admitted, and end for the router's eyes, between
rounds of ``admit_every`` steps; there is no prefix cache and no network. Adapters that nobody uses stay in the pool
until their pages are needed, and the one that was used longest ago leaves first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

from lorry.serving.request import Request, Sampling

from .admission import Admission, Held
from .deployment import Deployment, Report
from .policy import View, policy_from
from .routing import ROUTERS, Router
from .workload import Arrival, Workload, arrivals


def simulate(deployment: Deployment, workload: Workload, requests: Sequence[Arrival] | None = None) -> Report:
    """Return what a deployment makes of a workload.

    Parameters
    ----------
    deployment
        What serves.
    workload
        What is asked for; with `requests`, only its adapters and its deadline count.
    requests
        A recorded trace in the order of its times, in place of the workload's own.
    """
    router = ROUTERS.find(deployment.routing)(deployment.replicas, deployment.slack, deployment.seed)
    trace = arrivals(workload) if requests is None else requests
    report = Report(deployment.replicas, requests=len(trace))
    known = _Pages(deployment, workload)
    replicas = [_Replica(number, deployment, workload, known, router, report) for number in range(deployment.replicas)]
    rounds: list[tuple[float, int]] = []  # when a replica has its next round; each that has work stands there once
    for place, arrival in enumerate(trace):
        while rounds and rounds[0][0] <= arrival.time:
            _next_round(rounds, replicas)
        replica = replicas[router.choose(arrival.adapter)]
        if replica.take(str(place), arrival):
            heapq.heappush(rounds, (arrival.time, replica.number))
    while rounds:
        _next_round(rounds, replicas)
    report.first_token.sort()
    report.admitted.sort()
    return report


def _next_round(rounds: list[tuple[float, int]], replicas: Sequence[_Replica]) -> None:
    now, number = heapq.heappop(rounds)
    after = replicas[number].round(now)
    if after is not None:
        heapq.heappush(rounds, (after, number))


class _Running:
    """A request in the batch: its tokens at step 0 of its replica, as it were, and the step of its last token."""

    __slots__ = ("adapter", "base", "end", "request")

    def __init__(self, request: Request, adapter: int, base: int, end: int) -> None:
        self.request, self.adapter, self.base, self.end = request, adapter, base, end


class _Replica:
    """One engine: a queue, a batch and a pool."""

    def __init__(
        self,
        number: int,
        deployment: Deployment,
        workload: Workload,
        known: _Pages,
        router: Router,
        report: Report,
    ) -> None:
        self.number, self.deployment, self.workload, self.known = number, deployment, workload, known
        self.router, self.report = router, report
        self.policy = policy_from(deployment.policy)
        self.pages, self.apart = deployment.parts
        self.step = 0
        self.running: list[_Running] = []
        self.resident: OrderedDict[str, int] = OrderedDict()  # pages by adapter, the longest unused first
        self.resident_pages = 0
        self.idle, self.changed = True, True

    def take(self, id: str, arrival: Arrival) -> bool:
        """Put a request into the queue, and say whether the replica was idle."""
        d, w = self.deployment, self.workload
        name = str(arrival.adapter)
        request = Request(
            id, _prompt(arrival.input), {name: 1.0}, _limit(arrival.output), name, arrival.time, w.deadline
        )
        alone = Admission([], self.pages, page=d.page, adapter_pages=self.known, adapters_apart=self.apart)
        if not alone.admit(Held.of(request)):
            self.report.refused += 1
            return False
        self.router.began(self.number, arrival.adapter)
        self.policy.arrive(request, arrival.time)
        self.changed = True
        was, self.idle = self.idle, False
        return was

    def round(self, now: float) -> float | None:
        """Admit, read prompts, decode until the next round; return when that is, None if there is nothing to do."""
        for _ in self.policy.drop(now):
            self.report.dropped += 1
            self.router.ended(self.number)
            self.changed = True
        after = now
        # the peak does not change as the batch goes on, so a refusal stands until somebody comes or goes
        if self.changed and len(self.policy):
            self.changed = False
            after = self._admitted(now)
        held = self._token_pages(), self.resident_pages, len(self.resident)
        after = self._decoded(after)
        if after > now:
            self.report.worked(after - now, *held)
            self.report.seconds = max(self.report.seconds, after)
            return after
        self.idle = not len(self.policy)
        return None if self.idle else now + self.deployment.step_seconds

    def _admitted(self, now: float) -> float:
        """Admit whom the policy proposes, and return when their first tokens are there."""
        d = self.deployment
        held = [Held(r.base + self.step, r.end - self.step, 0, tuple(r.request.composition)) for r in self.running]
        admission = Admission(held, self.pages, page=d.page, adapter_pages=self.known, adapters_apart=self.apart)
        new: list[_Running] = []
        prompts = loaded = 0
        for request in self.policy.next(View(now, [r.request for r in self.running])):
            size = len(request.prompt)
            if len(self.running) + len(new) >= d.max_running:
                break
            if new and prompts + size > d.prompt_tokens:
                self.changed = True  # there may be room in the next round
                break
            candidate = Held.of(request)
            if not admission.admit(candidate):
                continue
            self.policy.leave(request.id)
            self.policy.charge(request, size, request.sampling.max_tokens)
            adapter = int(candidate.adapters[0])
            new.append(_Running(request, adapter, candidate.tokens - self.step, self.step + candidate.left))
            prompts += size
            loaded += self._load(candidate.adapters[0])
        if not new:
            return now
        self.running += new
        self._evict()
        after = now + d.step_seconds + prompts * d.prompt_seconds + loaded * d.load_seconds
        for each in new:
            self._note_first_token(each.request, now, after)
        return after

    def _load(self, name: str) -> int:
        """Bring an adapter into the pool, and return how many pages had to be loaded."""
        if name in self.resident:
            self.resident.move_to_end(name)
            self.report.hits += 1
            return 0
        self.resident[name] = self.known[name]
        self.resident_pages += self.known[name]
        return self.known[name]

    def _evict(self) -> None:
        """Let adapters that nobody uses go, as far as the pages are needed before the next round."""
        d = self.deployment
        used = {name for r in self.running for name in r.request.composition}
        room = self.apart
        if room is None:
            room = self.pages - self._token_pages(d.admit_every)
        for name in [n for n in self.resident if n not in used] if self.resident_pages > room else ():
            self.resident_pages -= self.resident.pop(name)
            self.router.forgot(self.number, int(name))
            if self.resident_pages <= room:
                break

    def _token_pages(self, more: int = 0) -> int:
        """Return the pages of keys and values of the batch, so many steps from now at most."""
        step, page = self.step + more, self.deployment.page
        return sum(-(-(r.base + min(step, r.end)) // page) for r in self.running)

    def _note_first_token(self, request: Request, now: float, after: float) -> None:
        report, waited = self.report, after - request.arrival
        report.admitted.append(now)
        report.first_token.append(waited)
        report.input_tokens += len(request.prompt)
        report.output_tokens += request.sampling.max_tokens
        if request.deadline is not None and waited < request.deadline:
            report.in_time += 1
            report.satisfaction += 1 - (waited / request.deadline) ** 2

    def _decoded(self, now: float) -> float:
        """Take the batch to the next round, all at once between two ends of requests; return when that is."""
        d, last = self.deployment, self.step + self.deployment.admit_every
        while self.running and self.step < last:
            nearest = min(r.end for r in self.running)
            until = min(last, nearest)
            now += (until - self.step) * (d.step_seconds + d.decode_seconds * len(self.running))
            self.step = until
            if until == nearest:
                self._finish()
        return now

    def _finish(self) -> None:
        going = [r for r in self.running if r.end > self.step]
        for _ in range(len(self.running) - len(going)):
            self.router.ended(self.number)
            self.changed = True
        self.running = going


class _Pages(dict[str, int]):
    """Pages of adapters, worked out when they are asked for."""

    def __init__(self, deployment: Deployment, workload: Workload) -> None:
        super().__init__()
        self.deployment, self.workload = deployment, workload

    def __missing__(self, name: str) -> int:
        self[name] = self.deployment.adapter_pages(self.workload.rank(int(name)))
        return self[name]


@lru_cache(maxsize=1 << 14)
def _prompt(length: int) -> tuple[int, ...]:
    return (0,) * length


@lru_cache(maxsize=1 << 14)
def _limit(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens)
