"""EVA's start: A at the principal directions of the inputs, ranks where the variance is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.eva import components, ranks_by_variance
from lorry.training.starts import LowRankStart, rank_of, register_start


@register_start("eva", paper="arXiv 2410.07170")
@dataclass(frozen=True)
class Eva(LowRankStart):
    """A starts at the top right-singular vectors of the layer's centred inputs, B at zero; the layers' ranks are handed
    out anew by the share of variance that their directions explain (section 3).

    It is what the method `eva` does to LoRA, for any low-rank method with the options `rank` and `alpha`.
    """

    product: ClassVar[bool] = False
    probes: ClassVar[tuple[str, ...]] = ("input",)

    rho: float = option(2.0, "A layer gets at most rho times the rank; 1 keeps all ranks equal.", at_least=1)
    whiten: bool = option(False, "Divide each direction by the root of its singular value.")
    adjust_alpha: bool = option(True, "Change alpha with a layer's rank, so that the scale stays the same.")

    def allocate(self, entries: Mapping[str, Entry], seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the layers whose rank changes, among those with the same options."""
        changes: dict[str, Method | None] = {}
        methods = {path: entry.method for path, entry in entries.items()}
        for method in dict.fromkeys(methods.values()):
            names = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
            if self.rho == 1 or not {"rank", "alpha"} <= names:
                continue
            rank, alpha = getattr(method, "rank"), getattr(method, "alpha")  # noqa: B009
            group = {path: observed for path, observed in seen.items() if methods[path] == method}
            for path, found in ranks_by_variance(group, rank, self.rho).items():
                scaled = alpha * found / rank if alpha is not None and self.adjust_alpha else alpha
                if found != rank:
                    changes[path] = method.with_options(rank=found, alpha=scaled) if found else None
        return changes

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the principal directions, each with its largest entry positive."""
        rank, site = rank_of(entry), entry.site
        _, values, directions = components(seen["input"], site.path)
        if len(directions) < rank:
            raise AdapterError(
                f"'{site.path}' showed {len(directions)} directions in calibration, but rank {rank} needs as many; "
                "give more tokens."
            )
        a = directions[:rank]
        a = a / values[:rank, None].sqrt() if self.whiten else a
        return a, torch.zeros(site.out_features, rank)
