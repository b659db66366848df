"""Samples and micro-batches as a planner sees them, and the rules that every plan keeps.

The rules are those of LoRAFusion (arXiv 2510.00206): a micro-batch holds at most `capacity` tokens and never two global
batches of one job; and where the base lies in `stages` stages of a pipeline, micro-batches of successive global batches
of one job are at least as many places apart, since the update of the first must be done before the second enters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorry.core.errors import LorryError


@dataclass(frozen=True, order=True)
class Sample:
    """One sample of a global batch.

    Attributes
    ----------
    job
        Whose it is.
    step
        The optimizer step (the global batch) that it belongs to, counted from the first one planned.
    place
        Its place in the global batch.
    tokens
        Its length.
    """

    job: str
    step: int
    place: int
    tokens: int


#: Samples that go through the base in one pass; without any it is a no-op, which keeps a place in a pipeline free.
MicroBatch = tuple[Sample, ...]


def load(samples: Iterable[Sample], multiple: int = 1) -> int:
    """Return the tokens of samples, those of each job rounded up to a multiple (the height of a kernel's tile)."""
    tokens: Counter[str] = Counter()
    for sample in samples:
        tokens[sample.job] += sample.tokens
    return sum(-(-count // multiple) * multiple for count in tokens.values())


def mixes(samples: Iterable[Sample]) -> bool:
    """Return whether two global batches of one job are among the samples."""
    steps: dict[str, int] = {}
    return any(steps.setdefault(sample.job, sample.step) != sample.step for sample in samples)


def with_no_ops(batches: Sequence[MicroBatch], stages: int) -> list[MicroBatch] | None:
    """Return the micro-batches with as few no-ops as keep the rule of the pipeline; None if their order cannot.

    Parameters
    ----------
    batches
        In order.
    stages
        Of the pipeline; 1 asks only that a global batch is through before the next one of its job begins.
    """
    left = Counter((s.job, s.step) for batch in batches for s in batch)
    newest: dict[str, tuple[int, int]] = {}  # job -> step begun last, and the last place of the step before
    last: dict[str, int] = {}
    placed: list[MicroBatch] = []
    for batch in batches:
        if not batch:
            placed.append(batch)
            continue
        if mixes(batch):
            return None
        earliest = 0
        for sample in batch:
            step, free = newest.get(sample.job, (sample.step, 0))
            if sample.step != step:
                if sample.step < step or left[sample.job, step]:
                    return None
                free = last[sample.job] + stages
            newest[sample.job] = (sample.step, free)
            earliest = max(earliest, free)
        placed.extend([()] * (earliest - len(placed)))
        for sample in batch:
            left[sample.job, sample.step] -= 1
            last[sample.job] = len(placed)
        placed.append(batch)
    return placed


def verify(
    batches: Sequence[MicroBatch], samples: Sequence[Sample], *, capacity: int, multiple: int, stages: int
) -> None:
    """Check a plan against all its rules.

    Raises
    ------
    LorryError
        A sample that is missing or there twice, a micro-batch above the capacity, or a broken order.
    """
    there, wanted = Counter(s for batch in batches for s in batch), Counter(samples)
    if there != wanted:
        wrong = sorted((there - wanted) + (wanted - there))
        raise LorryError(f"A plan must hold every sample once; it does not hold {wrong[0]} once.")
    heaviest = max((load(batch, multiple) for batch in batches), default=0)
    if heaviest > capacity:
        raise LorryError(f"A micro-batch of the plan has {heaviest} tokens, above the capacity of {capacity}.")
    if with_no_ops(batches, stages) != list(batches):
        raise LorryError(f"The plan lets a global batch begin before the one before it left {stages} stages.")
