"""Switch: one adapter at a time, the next one every few steps (LoRA Switch, arXiv 2402.16843)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorry.core.forward.weights import Weight
from lorry.core.options import option
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, adapters_of, register_sampler
from lorry.diffusion.samplers.parts.names import check_names
from lorry.diffusion.samplers.parts.one_pass import one_pass


@register_sampler("switch", paper="arXiv 2402.16843")
@dataclass(frozen=True)
class Switch(Sampler):
    """Adapters take turns."""

    period: int = option(5, "Steps after which it is the next adapter's turn.", at_least=1)
    order: tuple[str, ...] = option(
        (), "Adapters whose turn comes first, in their order (Switch-A: those of high frequencies); then the others."
    )

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        check_names("order", self.order, [adapters_of(order.composition) for order in orders])
        with one_pass(pipeline, orders, self._turn) as course:
            yield course

    def _turn(self, number: int, adapters: Mapping[str, Weight]) -> Mapping[str, Weight]:
        names = [*(n for n in self.order if n in adapters), *(n for n in adapters if n not in self.order)]
        if not names:
            return {}
        name = names[number // self.period % len(names)]
        return {name: adapters[name]}
