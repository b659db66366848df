"""Gated: all adapters of a picture apply at once, each behind a trained gate (AutoLoRA, arXiv 2508.02107)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import some
from lorry.core.forward.weights import Weight
from lorry.core.life import api
from lorry.core.options import option
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import family_of
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, adapters_of, compositions_of, register_sampler
from lorry.diffusion.samplers.parts.passes import guided, halves
from lorry.diffusion.sampling import Step


@register_sampler("gated", paper="arXiv 2508.02107")
@dataclass(frozen=True)
class Gated(Sampler):
    """The updates of a picture's adapters go through an adapter that combines others, such as one of gated-fusion."""

    gate: str = option("gate", "The adapter that combines.")

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        network = family_of(pipeline).network(pipeline)
        self._check(network, [adapters_of(order.composition) for order in orders])
        yield _Course(network, self.gate)

    def _check(self, network: nn.Module, pictures: Sequence[Mapping[str, Weight]]) -> None:
        there = api.adapters(network)
        combining = [name for name, one in there.items() if "combined" in one.method.capabilities]
        if self.gate not in combining:
            raise DiffusionError(
                f"The sampler 'gated' needs an adapter that combines others as its gate, and '{self.gate}' is none. "
                f"There are: {some(combining) or 'none'}. Load a gate (method gated-fusion), and name it (gate)."
            )
        for composition in pictures:
            for name, weight in composition.items():
                if name == self.gate or not isinstance(weight, int | float):
                    raise DiffusionError(
                        f"The sampler 'gated' takes adapters with weights that are numbers, and not the gate itself; "
                        f"found '{name}' with {weight!r}."
                    )


class _Course:
    def __init__(self, network: nn.Module, gate: str) -> None:
        self._network, self._gate = network, gate
        self._members: list[list[str]] = []

    def predict(self, step: Step) -> Tensor:
        """Return the guided prediction behind the gate."""
        chosen = compositions_of(step)
        self._members = [list(composition) for composition in chosen]
        names = list(dict.fromkeys(name for composition in chosen for name in composition))
        weights = {
            name: torch.tensor([_number(composition.get(name, 0.0)) for composition in chosen]) for name in names
        }
        applied = [self._gate if composition else None for composition in chosen]
        with api.context(self._network, combined={self._gate: weights}):
            return guided(step, halves(step, applied))

    def reports(self) -> list[dict[str, Any]]:
        """Return the members of each picture."""
        return [{"gate": self._gate, "members": names} for names in self._members]


def _number(weight: Weight) -> float:
    assert isinstance(weight, int | float)
    return float(weight)
