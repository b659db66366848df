"""Composite: the mean of the predictions under each adapter alone (LoRA Composite, arXiv 2402.16843)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorry.core.options import option
from lorry.diffusion.families import family_of
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, register_sampler
from lorry.diffusion.samplers.parts.apart import Apart
from lorry.diffusion.samplers.parts.passes import Passes
from lorry.diffusion.sampling import Step


@register_sampler("composite", paper="arXiv 2402.16843")
@dataclass(frozen=True)
class Composite(Sampler):
    """Every adapter predicts by itself at each step, and all count alike."""

    cache_every: int = option(
        1, "Steps after which the deep features of all adapters are worked out anew; 1 keeps none.", at_least=1
    )
    at_once: int = option(0, "How many adapters of pictures go through the network at once; 0 for all.", at_least=0)

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        network = family_of(pipeline).network(pipeline)
        with Passes(network, keep=self.cache_every > 1, at_once=self.at_once) as passes:
            yield _Mean(self, passes)


class _Mean:
    def __init__(self, options: Composite, passes: Passes) -> None:
        self._options = options
        self._apart = Apart(passes)

    def predict(self, step: Step) -> Tensor:
        """Return the guided mean."""
        apart = self._apart
        pictures = apart.pictures(step)
        if step.number % self._options.cache_every == 0:
            for row, names in enumerate(pictures):
                apart.drop(row, names)
        return apart.predict(step, [[1.0] * len(names) for names in pictures])

    def reports(self) -> list[dict[str, Any]]:
        """Return what was run."""
        return self._apart.reports()
