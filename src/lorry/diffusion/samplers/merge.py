"""Merge: all adapters apply at once, and their updates add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorry.diffusion.samplers.base import Course, Sampler, Wanted, register_sampler
from lorry.diffusion.samplers.parts.one_pass import one_pass


@register_sampler("merge")
@dataclass(frozen=True)
class Merge(Sampler):
    """The sum of the updates, as without any sampler; beside the others for comparison."""

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        with one_pass(pipeline, orders, lambda number, adapters: adapters) as course:
            yield course
