"""LoRA-SB's start: frozen factors and a trained core from the singular triples of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import truncated_svd
from lorry.training.starts import LowRankStart, low_rank, rank_of, register_start, scale_of
from lorry.training.starts._gradients import gradient_at


@register_start("lora-sb", paper="arXiv 2411.19557")
@dataclass(frozen=True)
class LoRASB(LowRankStart):
    """``B = U_r`` and ``A = V_rᵀ`` of -G stay frozen, and the core between them, which is trained, starts at
    ``diag(S_r) / scale`` (section 3). It is a start of methods with a core (``method: lora-xs``).

    The paper keeps the core's start as a first step of full fine-tuning; here the frozen pair takes it back, unless
    `first_step` is set.
    """

    probes: ClassVar[tuple[str, ...]] = ("gradient",)

    first_step: bool = option(False, "Begin with the core's start as a first step, which changes the function.")
    iterations: int = option(4, "Subspace iterations of a randomised SVD; 0 computes the exact one.", at_least=0)

    @property
    def keeps_function(self) -> bool:
        """Whether the core's start is taken back."""
        return not self.first_step

    def check_entry(self, entry: Entry) -> None:
        """Refuse a method without a core."""
        super().check_entry(entry)
        if "core" not in entry.home.tensors():
            raise SiteError(
                f"'{entry.site.path}' has the method {entry.method.info.slug}, which cannot begin with the start "
                "'lora-sb': it has no core between A and B that is trained alone. Take the method lora-xs."
            )

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Set the frozen factors and the core."""
        rank = rank_of(entry)
        gradient = gradient_at(entry, seen, self.name)
        u, s, vt = truncated_svd(-gradient, rank, self.iterations, generator, oversampled=4 * rank)
        core = entry.home.tensors()["core"]
        for own, value in zip(low_rank(entry, self), (vt, u), strict=True):
            own.copy_(value.to(own))
        core.copy_(torch.diag_embed(s / scale_of(entry)).to(core))
