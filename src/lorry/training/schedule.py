"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state of them."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def warmup_steps(warmup: float, total: int) -> int:
    """The steps of the warm-up: `warmup` itself, or that fraction of `total` if it is below 1."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def rate_factor(schedule: str, step: int, total: int, warmup: float = 0.0, floor: float = 0.0) -> float:
    """The factor of the learning rate at a step.

    Args:
        schedule: one of `SCHEDULES`.
        step: optimizer steps done before this one, from 0.
        total: optimizer steps of the whole run.
        warmup: steps over which the rate rises linearly (the first step has 1/steps of it), or a fraction
            of the run if below 1.
        floor: what is left of the rate at the end, as a fraction.

    Returns:
        A factor from 0 to 1. Beyond `total` it stays at the floor (1 for ``constant``).
    """
    rising = warmup_steps(warmup, total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rising) / max(1, total - rising))
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * left
