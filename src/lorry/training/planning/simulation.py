"""A pipeline in discrete events: how long sequential jobs, padded batches with locks, and a planned order take.

Forward and backward passes of a micro-batch take a time in proportion to its tokens, padding included, the same in
every stage; each stage works through them in the order "one forward, one backward" (1F1B), and sending takes no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .order import Rules, planned
from .packing import check_lengths
from .samples import MicroBatch, Sample, load, with_no_ops

#: Milliseconds of a forward pass, and of a backward pass, of 1,000 tokens through one layer: Llama-3.1-8B on an H100,
#: by LoRAFusion's table. The base has no gradients, so a backward pass costs no more than a forward one.
FORWARD, BACKWARD = 1.1, 1.1
#: mLoRA pads rows to a multiple of this.
PADDED_TO = 8


@dataclass(frozen=True)
class Course:
    """What a pipeline made of micro-batches.

    Attributes
    ----------
    milliseconds
        From the first forward pass to the end of the last backward pass.
    micro_batches, no_ops
        That went through.
    tokens
        In all of them, padding included.
    idle
        Share of the time in which a stage waits, over all stages.
    """

    milliseconds: float
    micro_batches: int
    no_ops: int
    tokens: int
    idle: float


def simulated(loads: Sequence[int], stages: int, layers: int = 32) -> Course:
    """Return what a pipeline makes of micro-batches of these tokens, in this order; 0 is a no-op.

    Parameters
    ----------
    loads
        Tokens of each micro-batch.
    stages
        Of the pipeline, of equal numbers of layers.
    layers
        Of the whole model.
    """
    share = layers / stages / 1000
    cost = [(tokens * share * FORWARD, tokens * share * BACKWARD) for tokens in loads]
    orders = [one_forward_one_backward(len(loads), stages - stage) for stage in range(stages)]
    ended: dict[tuple[int, bool, int], float] = {}  # (micro-batch, backward, stage) -> time
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                batch, backward = orders[stage][places[stage]]
                before = _before(batch, backward, stage, stages)
                if before is not None and before not in ended:
                    break
                begins = max(clocks[stage], 0.0 if before is None else ended[before])
                clocks[stage] = ended[batch, backward, stage] = begins + cost[batch][backward]
                places[stage] += 1
    whole = max(clocks, default=0.0)
    busy = sum(sum(pair) for pair in cost) * stages
    empty = sum(not tokens for tokens in loads)
    return Course(whole, len(loads) - empty, empty, sum(loads), 1 - busy / (whole * stages) if whole else 0.0)


def one_forward_one_backward(count: int, ahead: int) -> list[tuple[int, bool]]:
    """Return the order of a stage that lets `ahead` micro-batches in before the first comes back."""
    order = [(i, False) for i in range(min(ahead, count))]
    for i in range(count):
        order.append((i, True))
        if i + ahead < count:
            order.append((i + ahead, False))
    return order


def _before(batch: int, backward: bool, stage: int, stages: int) -> tuple[int, bool, int] | None:
    """Return what must have ended before a pass through a stage begins; None for the first."""
    if backward:
        return (batch, True, stage + 1) if stage + 1 < stages else (batch, False, stage)
    return (batch, False, stage - 1) if stage else None


def compared(lengths: Mapping[str, Sequence[Sequence[int]]], rules: Rules, layers: int = 32) -> dict[str, Course]:
    """Return what a pipeline makes of jobs in four ways.

    ``sequential`` trains one job after another, rows padded to the longest of their micro-batch; ``sequential, packed``
    the same without padding, packed greedily; ``pad-concat`` lets the jobs take turns (mLoRA): each global batch is
    padded to its longest row and cut into micro-batches, and its job waits until its step is done; ``lorafusion`` is
    `planned`.

    Parameters
    ----------
    lengths
        Job -> global batch -> tokens of each sample.
    rules
        Capacity, stages, and how to plan.
    layers
        Of the whole model.
    """
    samples = [
        Sample(job, step, place, tokens)
        for job, steps in lengths.items()
        for step, batch in enumerate(steps)
        for place, tokens in enumerate(batch)
    ]
    check_lengths(samples, rules.capacity, max(rules.multiple, PADDED_TO))

    def one_by_one(packing: bool) -> Course:
        parts = []
        for job in lengths:
            own = [s for s in samples if s.job == job]
            cut = planned(own, Rules(rules.capacity, rules.multiple, rules.stages)) if packing else _padded(own, rules)
            parts.append(simulated(_loads(cut, rules, padded=not packing), rules.stages, layers))
        return _one_after_another(parts)

    turns = _padded(sorted(samples, key=lambda s: s.step), rules, whole=True)
    plan = planned(samples, rules)
    return {
        "sequential": one_by_one(packing=False),
        "sequential, packed": one_by_one(packing=True),
        "pad-concat": simulated(_loads(turns, rules, padded=True, samples=samples), rules.stages, layers),
        "lorafusion": simulated(_loads(plan, rules), rules.stages, layers),
    }


def _padded(samples: Sequence[Sample], rules: Rules, whole: bool = False) -> list[MicroBatch]:
    """Return global batches cut, in their order, into micro-batches that are within the capacity when padded.

    With `whole`, rows are padded to the longest of their global batch, else to that of their micro-batch.
    """
    cut: list[list[Sample]] = []
    for sample in samples:
        last = cut[-1] if cut and (cut[-1][0].job, cut[-1][0].step) == (sample.job, sample.step) else None
        batch = (
            [s for s in samples if (s.job, s.step) == (sample.job, sample.step)] if whole else [*(last or ()), sample]
        )
        if last is not None and (len(last) + 1) * _row(batch) <= rules.capacity:
            last.append(sample)
        else:
            cut.append([sample])
    placed = with_no_ops([tuple(batch) for batch in cut], rules.stages)
    assert placed is not None  # the order is that of the steps
    return placed


def _row(samples: Sequence[Sample]) -> int:
    """Return the tokens of each row when samples are padded to the longest."""
    return -(-max(s.tokens for s in samples) // PADDED_TO) * PADDED_TO


def _loads(
    batches: Sequence[MicroBatch], rules: Rules, padded: bool = False, samples: Sequence[Sample] | None = None
) -> list[int]:
    """Return the tokens of micro-batches; padded ones to the longest row of theirs, or of their global batch."""
    if not padded:
        return [load(batch, rules.multiple) for batch in batches]
    longest: dict[tuple[str, int], int] = {}
    for s in samples or ():
        longest[s.job, s.step] = max(longest.get((s.job, s.step), 0), _row([s]))
    return [
        len(batch) * (longest[batch[0].job, batch[0].step] if longest else _row(batch)) if batch else 0
        for batch in batches
    ]


def _one_after_another(parts: Sequence[Course]) -> Course:
    whole = sum(part.milliseconds for part in parts)
    return Course(
        whole,
        sum(part.micro_batches for part in parts),
        sum(part.no_ops for part in parts),
        sum(part.tokens for part in parts),
        sum(part.idle * part.milliseconds for part in parts) / whole if whole else 0.0,
    )


def long_tailed(
    jobs: int, steps: int, batch: int, *, median: float, sigma: float, most: int, generator: torch.Generator
) -> dict[str, list[list[int]]]:
    """Return lengths with a long tail: log-normal, each job with a median of its own around `median`, cut at `most`.

    Parameters
    ----------
    jobs, steps, batch
        How many jobs, global batches of each, and samples of a global batch.
    median
        Tokens; the jobs' own medians lie between half and twice of it.
    sigma
        Standard deviation of the logarithm; 0 gives every sample of a job the same length.
    most
        Longest sample.
    generator
        Of the draws.
    """
    found: dict[str, list[list[int]]] = {}
    for number in range(jobs):
        own = median * 2.0 ** (2.0 * number / max(jobs - 1, 1) - 1.0)
        drawn = torch.exp(torch.randn(steps, batch, generator=generator) * sigma) * own
        found[f"job-{number}"] = drawn.clamp(1, most).round().long().tolist()
    return found
