"""The learning rate's course, which all trainings of this folder share."""

from __future__ import annotations

import math

WARMUP = 100


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def held_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, the peak until two thirds of the steps, then a straight line to a fiftieth of it."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * min(1.0, 0.02 + 0.98 * 3 * (1 - step / max(1, steps)))
