"""LoRA-GA-Pro's start: LoRA-GA's, with ranks where the gradient matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorry.core.forward.entry import Entry
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.training.starts import register_start
from lorry.training.starts._ranks import allocated
from lorry.training.starts.lora_ga import LoRAGA


@register_start("lora-ga-pro", paper="arXiv 2601.22708")
@dataclass(frozen=True)
class LoRAGAPro(LoRAGA):
    """A and B start as in LoRA-GA, at ranks that go to the layers in proportion to the mean of ``|W ⊙ G|``.

    No rank is above half of a layer's narrower side, since 2r directions of the gradient are needed; ranks that are cut
    there are not handed out again.
    """

    least_rank: int = option(1, "Smallest rank of a layer.", at_least=1)
    most_rank: int = option(64, "Largest rank of a layer.", at_least=1)
    keep_scale: bool = option(True, "Change alpha with a layer's rank, so that the scale stays the same.")

    def allocate(self, entries: Mapping[str, Entry], seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the layers whose rank changes."""
        return allocated(entries, seen, self.least_rank, self.most_rank, self.keep_scale, directions=2)
