"""LoRA-DA's start: the singular triples of what a few steps of full fine-tuning change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import split_evenly, truncated_svd
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of


@register_start("lora-da", paper="arXiv 2510.24561")
@dataclass(frozen=True)
class LoRADA(LowRankStart):
    """A and B start at the top singular triples of the change of W in a few steps of full fine-tuning, one for each
    calibration batch, by AdaLomo's rule on copies of the weights; the base is as before.

    This is the form of the unified study's code (arXiv 2601.22708); the paper weights the change by Fisher information
    besides.
    """

    probes: ClassVar[tuple[str, ...]] = ("weight change",)

    learning_rate: float = option(5e-4, "Of the steps of full fine-tuning.", above=0)
    iterations: int = option(4, "Subspace iterations of a randomised SVD; 0 computes the exact one.", at_least=0)

    def probe_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the rate."""
        return {"weight change": {"learning_rate": self.learning_rate}}

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose the change."""
        change, rank = seen["weight change"].change, rank_of(entry)
        assert change is not None
        if not bool(change.any()) or not bool(change.isfinite().all()):
            raise SiteError(
                f"Full fine-tuning did not move the weight of '{entry.site.path}' to finite values, so the start "
                "'lora-da' has no directions there. Leave the site out (exclude), or change learning_rate."
            )
        triples = truncated_svd(change, rank, self.iterations, generator, oversampled=4 * rank)
        return split_evenly(*triples, scale_of(entry))
