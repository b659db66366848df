"""Courses with one pass of the network for each picture and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorry.core.forward.weights import Weight
from lorry.diffusion.families import family_of
from lorry.diffusion.samplers.base import compositions_of
from lorry.diffusion.samplers.parts.passes import Passes, Unit, guided
from lorry.diffusion.sampling import Step

#: Which of a picture's adapters apply at a step of this number.
Choice = Callable[[int, Mapping[str, Weight]], Mapping[str, Weight]]


class OnePass:
    """Every picture is made under one composition at a time."""

    def __init__(self, passes: Passes, choose: Choice, rows: int) -> None:
        self._passes = passes
        self._choose = choose
        self._chosen: list[list[str]] = [[] for _ in range(rows)]

    def predict(self, step: Step) -> Tensor:
        """Return the guided prediction under what is chosen."""
        chosen = [dict(self._choose(step.number, adapters)) for adapters in compositions_of(step)]
        for names, composition in zip(self._chosen, chosen, strict=True):
            names.append("+".join(composition))
        units = [Unit(row, None) for row in range(len(chosen))]
        found = self._passes.run(step, units, [composition or None for composition in chosen])
        return guided(step, torch.stack([found[unit] for unit in units], 1))

    def reports(self) -> list[dict[str, Any]]:
        """Return which adapters applied at each step, and what was run."""
        return [{"active": names, **self._passes.counts(row)} for row, names in enumerate(self._chosen)]


@contextmanager
def one_pass(pipeline: Any, orders: Sequence[object], choose: Choice) -> Iterator[OnePass]:
    """Begin with a batch of pictures, of which `choose` says what applies."""
    with Passes(family_of(pipeline).network(pipeline)) as passes:
        yield OnePass(passes, choose, len(orders))
