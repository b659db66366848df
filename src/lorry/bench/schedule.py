"""A simulated pipeline: sequential jobs, padded batches with locks, and LoRAFusion's plan, on lengths with a long tail.

Nothing is measured: the times are those of `lorry.training.planning.simulation`, with forward and backward passes in
proportion to tokens, so they are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch

from lorry.bench._measure import lines
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.training.planning.order import Rules
from lorry.training.planning.packing import Limits
from lorry.training.planning.simulation import compared, long_tailed


def run(
    seeds: int = 20,
    jobs: int = 4,
    stages: int = 4,
    steps: int = 4,
    batch: int = 8,
    capacity: int = 4096,
    multiple: int = 128,
    median: float = 600.0,
    sigma: float = 1.0,
    layers: int = 32,
) -> dict[str, Any]:
    """Simulate `jobs` jobs of `steps` global batches of `batch` samples on `stages` stages, for several draws of their
    lengths (log-normal, `median` tokens, `sigma`), with micro-batches of at most `capacity` tokens.
    """
    if min(seeds, jobs, stages, steps, batch) < 1:
        raise OptionError("The numbers of seeds, jobs, stages, steps and samples (batch) must be at least 1.")
    rules = Rules(capacity, multiple, stages, slack=capacity // 4, limits=Limits())
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        lengths = long_tailed(
            jobs, steps, batch, median=median, sigma=sigma, most=capacity // multiple * multiple, generator=generator
        )
        for name, course in compared(lengths, rules, layers).items():
            found.setdefault(name, []).append(dataclasses.asdict(course))
    ways = {
        name: {key: statistics.fmean(course[key] for course in courses) for key in courses[0]}
        for name, courses in found.items()
    }
    for name, courses in found.items():
        pairs = zip(courses, found["lorafusion"], strict=True)
        ratios = [course["milliseconds"] / plan["milliseconds"] for course, plan in pairs]
        ways[name] |= {"ratio": statistics.fmean(ratios), "least": min(ratios), "most": max(ratios)}
    return {"seeds": seeds, "jobs": jobs, "stages": stages, "capacity": capacity, "median": median, "ways": ways}


def table(result: dict[str, Any]) -> Any:
    """Return makespans, what went through, and ratios."""
    rows = [
        (
            name,
            f"{way['milliseconds'] / 1000:.2f}",
            f"{way['ratio']:.2f} ({way['least']:.2f} - {way['most']:.2f})",
            f"{way['micro_batches']:.1f}",
            f"{way['no_ops']:.1f}",
            f"{way['tokens'] / 1000:.1f}",
            f"{way['idle']:.0%}",
        )
        for name, way in result["ways"].items()
    ]
    title = (
        f"{result['jobs']} jobs, median of {result['median']:g} tokens, micro-batches of {result['capacity']}, "
        f"{result['stages']} stages, means of {result['seeds']} draws, simulated"
    )
    names = ("way", "seconds", "ratio to lorafusion", "micro-batches", "no-ops", "1,000 tokens", "idle")
    return lines(title, names, rows)


register("schedule", run, table, help=__doc__)
