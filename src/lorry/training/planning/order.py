"""Which jobs are packed together, in which order micro-batches follow, and which of them are joined (LoRAFusion)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .packing import Limits, check_lengths, packed
from .samples import MicroBatch, Sample, load, mixes, verify, with_no_ops


@dataclass(frozen=True)
class Rules:
    """What a plan keeps to.

    Attributes
    ----------
    capacity
        Most tokens of a micro-batch.
    multiple
        Each job's tokens in a micro-batch count as rounded up to this.
    stages
        Of the pipeline; 1 where there is none.
    slack
        Micro-batches with at least this many tokens free are joined with later ones.
    look_ahead
        How many later ones are looked at.
    spread
        Standard deviations by which a job's length is taken lower, to be sure that its company fills the pipeline.
    limits
        Of HiGHS; None packs greedily.
    """

    capacity: int
    multiple: int = 1
    stages: int = 1
    slack: int = 1024
    look_ahead: int = 8
    spread: float = 0.25
    limits: Limits | None = None


def planned(samples: Sequence[Sample], rules: Rules) -> list[MicroBatch]:
    """Return the micro-batches of all samples in order, with no-ops where the pipeline needs them.

    The result depends on the arguments alone.

    Raises
    ------
    OptionError
        A sample is longer than the capacity.
    """
    check_lengths(samples, rules.capacity, rules.multiple)
    flat: list[MicroBatch] = []
    groups = grouped_jobs(samples, rules)
    for step in sorted({s.step for s in samples}):
        for group in groups:
            own = [s for s in samples if s.step == step and s.job in group]
            flat.extend(packed(own, rules.capacity, rules.multiple, rules.limits))
    batches = with_no_ops(joined(flat, rules), rules.stages)
    assert batches is not None  # joined() keeps the order, and so does the loop above
    verify(batches, samples, capacity=rules.capacity, multiple=rules.multiple, stages=rules.stages)
    return batches


def grouped_jobs(samples: Sequence[Sample], rules: Rules) -> list[tuple[str, ...]]:
    """Return jobs that are packed together, alone or in twos: one of long samples with one of short ones.

    Two jobs go together only if the others have enough micro-batches to fill the pipeline meanwhile.
    """
    lengths: dict[str, list[int]] = {}
    for sample in samples:
        lengths.setdefault(sample.job, []).append(sample.tokens)
    mean = {job: statistics.fmean(found) for job, found in lengths.items()}
    usual, least = {}, {}
    for job, found in lengths.items():
        first = min(s.step for s in samples if s.job == job)
        size = sum(s.job == job and s.step == first for s in samples)
        low = mean[job] - rules.spread * (statistics.stdev(found) if len(found) > 1 else 0.0)
        usual[job] = math.ceil(size * mean[job] / rules.capacity)
        least[job] = max(0, math.ceil(size * low / rules.capacity))

    def filled(without: tuple[str, ...]) -> bool:
        return sum(count for job, count in least.items() if job not in without) >= rules.stages - 1

    waiting = sorted(lengths, key=lambda job: (-mean[job], job))
    groups: list[tuple[str, ...]] = []
    if waiting and not filled((max(waiting, key=lambda job: usual[job]),)):
        return [(job,) for job in waiting]
    while len(waiting) > 1:
        longest, shortest = waiting[0], waiting[-1]
        if filled((longest, shortest)):
            groups.append((longest, shortest))
            waiting = waiting[1:-1]
        else:
            alone = longest if usual[longest] >= usual[shortest] else shortest
            groups.append((alone,))
            waiting.remove(alone)
    return groups + [(job,) for job in waiting]


def joined(batches: Sequence[MicroBatch], rules: Rules) -> list[MicroBatch]:
    """Return the micro-batches after one sweep from the left, in which those with room take in later ones.

    A later one is taken in whole if that makes the plan shorter, no-ops included; otherwise its smallest samples are,
    as long as the plan becomes no longer.
    """
    done = list(batches)
    index = 0
    while index < len(done):
        shorter = _filled_up(done, index, rules)
        if shorter is None or len(shorter) == len(done):  # nothing to take in, or only a part
            index += 1
        done = done if shorter is None else shorter
    return done


def _filled_up(batches: list[MicroBatch], index: int, rules: Rules) -> list[MicroBatch] | None:
    """Return the plan with a later micro-batch, or a part of it, in the one at `index`; None if nothing fits."""
    here = batches[index]
    if load(here, rules.multiple) > rules.capacity - rules.slack:
        return None
    later = range(index + 1, min(index + 1 + rules.look_ahead, len(batches)))
    fitting = [i for i in later if _fits((*here, *batches[i]), rules)]
    if not fitting:
        return None
    before = _length(batches, rules)
    other = min(fitting, key=lambda i: (load(batches[i], rules.multiple), i))
    whole = [*batches[:index], tuple(sorted((*here, *batches[other]))), *batches[index + 1 : other]]
    whole += batches[other + 1 :]
    if _length(whole, rules) < before:
        return whole
    moved: list[MicroBatch] | None = None
    for sample in sorted(batches[other], key=lambda s: (s.tokens, s)):
        now = batches if moved is None else moved
        trial = list(now)
        trial[index] = tuple(sorted((*now[index], sample)))
        trial[other] = tuple(s for s in now[other] if s != sample)
        if trial[other] and _length(trial, rules) <= before:
            moved = trial
    return moved


def _fits(samples: Sequence[Sample], rules: Rules) -> bool:
    return load(samples, rules.multiple) <= rules.capacity and not mixes(samples)


def _length(batches: Sequence[MicroBatch], rules: Rules) -> float:
    """Return how many places a plan takes with its no-ops; infinitely many if its order is broken."""
    placed = with_no_ops(batches, rules.stages)
    return math.inf if placed is None else len(placed)
