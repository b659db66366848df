"""The published fusion beside what it is compared with: the same data, steps and head for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from .fit import Plan, fit
from .measure import found, precision
from .model import Options, detector
from .pairs import Pairs, without

DEA, UNCROSSED, SUM, EARLY, RGB, INFRARED = "DEA", "DEA, not crossed", "sum", "early fusion", "RGB alone", "IR alone"
CONTENDERS: Mapping[str, Mapping[str, Any]] = {
    DEA: {"fusion": "dea"},
    UNCROSSED: {"fusion": "dea", "crossed": False},
    SUM: {"fusion": "sum"},
    EARLY: {"fusion": "early"},
    RGB: {"fusion": "rgb"},
    INFRARED: {"fusion": "ir"},
}
#: Digits must not be mirrored.
FLIP = 0.0


def trained(
    name: str,
    pairs: Pairs,
    plan: Plan,
    seed: int,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:
    """Return one contender, trained on small pairs from scratch."""
    model = detector(Options(pairs.classes, **CONTENDERS[name]), seed)
    fit(model, pairs, plan, seed, after)
    return model


def measured(model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Return precision with both modalities, and with either one missing (``no rgb``, ``no ir``: its `map50`)."""
    found_there = precision(pairs, found(model, pairs))
    lost = {
        f"no {modality}": precision(pairs, found(model, pairs, partial(without, modality=modality)))["map50"]
        for modality in ("rgb", "ir")
    }
    return {**found_there, **lost}
