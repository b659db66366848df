"""Predictions of each adapter alone, and their weighted mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.diffusion.samplers.base import compositions_of
from lorry.diffusion.samplers.parts.masks import weighted
from lorry.diffusion.samplers.parts.passes import Passes, Unit, guided
from lorry.diffusion.sampling import Step


class Apart:
    """Runs every adapter of every picture by itself.

    Parameters
    ----------
    passes
        What runs them.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self._rows = 0

    def pictures(self, step: Step) -> list[list[str | None]]:
        """Return the adapters of each picture; the bare base where there are none."""
        return [list(adapters) or [None] for adapters in compositions_of(step)]

    def drop(self, row: int, names: Iterable[str | None]) -> None:
        """Forget the deep features of a picture under adapters."""
        for name in names:
            self.passes.drop(Unit(row, name))

    def predict(self, step: Step, weights: Sequence[Sequence[float]]) -> Tensor:
        """Return ``1/n Σ_j w_j eps_j`` of each picture, guided.

        Parameters
        ----------
        step
            With a composition for each picture.
        weights
            For each picture the weight of each of its adapters, in their order.
        """
        adapters = compositions_of(step)
        pictures = self.pictures(step)
        self._rows = len(pictures)
        units = [Unit(row, name) for row, names in enumerate(pictures) for name in names]
        alone = [None if u.adapter is None else {u.adapter: adapters[u.row][u.adapter]} for u in units]
        found = self.passes.run(step, units, alone)
        means = []
        for row, names in enumerate(pictures):
            shares = [weight / len(names) for weight in weights[row]]
            means.append(weighted([found[Unit(row, name)] for name in names], shares))
        return guided(step, torch.stack(means, 1))

    def reports(self) -> list[dict[str, Any]]:
        """Return what was run for each picture."""
        return [dict(self.passes.counts(row)) for row in range(self._rows)]
