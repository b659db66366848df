"""EVA: LoRA that starts at the principal directions of each layer's inputs, with ranks where the variance is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.base import Method
from lorry.core.method.registry import register
from lorry.core.method.spec import Observed, Tensors
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register("eva", paper="arXiv 2410.07170", kinds=lambda kind: kind.plain_product)
@dataclass(frozen=True)
class EVA(LoRA):
    """``ΔW = scale · B A``: A starts at the top right-singular vectors of the layer's centred inputs, B at zero
    (section 3).

    Calibration also hands the rank budget out anew: the components of all layers are ranked by the share of
    variance that they explain, and each layer gets as many as it has among the first ``rank · layers``.
    Before calibration it is LoRA.

    Use it where some batches of the training data can be shown first: training then begins in the directions that
    the data use.
    """

    rho: float = option(2.0, "A layer gets at most rho times the rank; 1 keeps all ranks equal.", at_least=1)
    whiten: bool = option(False, "Divide each direction by the root of its singular value.")
    adjust_alpha: bool = option(True, "Change alpha with a layer's rank, so that the scale stays the same.")

    @property
    def calibration(self) -> Literal["none", "gradients", "inputs"]:
        """The inputs of each layer."""
        return "inputs"

    def allocate(self, seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the layers whose rank changes."""
        ranks = ranks_by_variance(seen, self.rank, self.rho)
        return {path: self._of_rank(rank) for path, rank in ranks.items() if rank != self.rank}

    def _of_rank(self, rank: int) -> Method | None:
        if rank == 0:
            return None
        keep = self.alpha is None or not self.adjust_alpha
        return self.with_options(rank=rank, alpha=self.alpha if keep else (self.alpha or 0) * rank / self.rank)

    def prepare(self, tensors: Tensors, site: Site, seen: Observed, generator: Generator) -> None:
        """Set A to the principal directions."""
        _, values, directions = components(seen, site.path)
        if len(directions) < self.rank:
            raise AdapterError(
                f"'{site.path}' showed {len(directions)} directions in calibration, but rank {self.rank} needs as "
                "many; give more tokens."
            )
        start = directions[: self.rank]
        tensors["A"].copy_(start / values[: self.rank, None].sqrt() if self.whiten else start)
        tensors["B"].zero_()


def ranks_by_variance(seen: Mapping[str, Observed], rank: int, rho: float) -> dict[str, int]:
    """Return a rank for each site: of all components, ``rank · sites`` that explain the largest shares of variance.

    Parameters
    ----------
    seen
        Site path -> what was seen of its inputs.
    rank
        The mean of the ranks.
    rho
        No site gets more than `rho` times it.

    Raises
    ------
    AdapterError
        The inputs have fewer directions.
    """
    shares = []
    for path, observed in seen.items():
        _, values, _ = components(observed, path)
        ratio = values.square() / max(observed.variance, 1e-30)
        most = min(round(rank * rho), len(ratio))
        shares += [(-float(value), number, path) for number, value in enumerate(ratio[:most])]
    budget = rank * len(seen)
    if len(shares) < budget:
        raise AdapterError(
            f"Calibration showed {len(shares)} directions in {len(seen)} layers, but rank {rank} needs {budget} of "
            "them; give more tokens."
        )
    ranks = dict.fromkeys(seen, 0)
    for _, _, path in sorted(shares, key=lambda share: share[0])[:budget]:
        ranks[path] += 1
    return ranks


def components(seen: Observed, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular decomposition of the observed inputs, each direction with its largest entry
    positive.
    """
    if seen.inputs is None:
        raise AdapterError(f"'{path}' has no observed inputs; calibrate the adapter.")
    u, s, vt = torch.linalg.svd(seen.inputs, full_matrices=False)
    known = int((s > s[0] * 1e-6).sum())
    largest = vt.gather(-1, vt.abs().argmax(-1, keepdim=True)).sign()
    return u[:, :known], s[:known], (vt * largest)[:known]
