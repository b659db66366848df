"""What studies of adapters used together share: three tasks, an adapter for each, alone and all at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.claims import digits
from lorry.claims.verdicts import Run
from lorry.core.life.adapter import Adapter

#: Where the images of each task are moved by a pixel: amount and dimension. Mild, so that the base
#: is of use (45 to 48 %) and adapters can be added at all.
MOVES = {"left": (-1, -1), "right": (1, -1), "down": (1, -2)}
#: Both can carry a LoRA of any rank that the studies use.
LAYERS = ["0", "2"]
#: For the text of a trial.
SETUP = (
    "Three tasks, digits moved by a pixel to the left, to the right and down; for each an adapter on the first two "
    "layers of a perceptron 64 - 128 - 128 - 10 trained on unmoved digits, a network for each seed. Each adapter has "
    "a start of its own. One rate for all three, the best on their validation rows with the adapter of the task alone."
)
#: Measures of the trained adapters themselves.
Measure = Callable[[Sequence[Adapter]], Mapping[str, float]]


@cache
def tasks() -> dict[str, digits.Task]:
    """The tasks by name."""
    clean, found = digits.task("clean"), {}
    for name, (amount, dimension) in MOVES.items():
        parts = [
            digits.Split(part.x.unflatten(1, (8, 8)).roll(amount, dimension).flatten(1), part.y)
            for part in (clean.train, clean.validation, clean.test)
        ]
        found[name] = digits.Task(name, *parts)
    return found


def fit(
    method: Callable[[int], Any], steps: int, rate: float, seed: int, same_start: bool = False
) -> tuple[nn.Module, list[Adapter]]:
    """Train an adapter for each task on one network; none is active afterwards.

    Parameters
    ----------
    method
        Of the task of a number.
    steps
        Of each adapter.
    rate
        Of all.
    seed
        Of the network; rows and starts have seeds made from it.
    same_start
        Let all adapters start from, and draw, the same.
    """
    network, found = digits.base(seed), []
    for number, (name, one) in enumerate(tasks().items()):
        own = seed if same_start else 10 * seed + number
        found.append(digits.adapt(network, method(number), one.train, steps, rate, own, LAYERS, name))
        found[-1].train(False)
        lorry.activate(network, None)
    return network, found


def scores(network: nn.Module, adapters: Sequence[Adapter]) -> dict[str, float]:
    """Mean accuracy over the tasks: each adapter alone, all of them added, and averaged."""
    single = []
    for one, adapter in zip(tasks().values(), adapters, strict=True):
        lorry.activate(network, adapter.name)
        single.append(digits.scores(network, one))
    found = {
        "validation": statistics.fmean(pair["validation"] for pair in single),
        "single": statistics.fmean(pair["test"] for pair in single),
        "parameters": adapters[0].count(),
    }
    for name, weight in (("added", 1.0), ("averaged", 1 / len(adapters))):
        lorry.activate(network, {adapter.name: weight for adapter in adapters})
        found[name] = statistics.fmean(digits.accuracy(network, one.test) for one in tasks().values())
        found[f"drop {name}"] = found["single"] - found[name]
    lorry.activate(network, None)
    return found


def running(method: Callable[[int], Any], steps: int, measure: Measure, same_start: bool = False) -> Run:
    """A contender: trains, scores and measures."""

    def run(rate: float, seed: int) -> Mapping[str, float]:
        network, adapters = fit(method, steps, rate, seed, same_start)
        return {**scores(network, adapters), **measure(adapters)}

    return run


def always(method: Any) -> Callable[[int], Any]:
    """The same method for each task."""
    return lambda number: method


def pairs(updates: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The updates of every two adapters at every layer."""
    return [(a[path], b[path]) for a, b in combinations(updates, 2) for path in a]


def cosine(a: Tensor, b: Tensor) -> float:
    """Absolute cosine of the angle between two updates."""
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs())
