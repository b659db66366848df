"""NLoRA's start: rows, columns and a core of the weight itself, by Nyström's approximation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.training.starts import LowRankStart, low_rank, rank_of, register_start, scale_of


@register_start("nlora", paper="arXiv 2502.14482")
@dataclass(frozen=True)
class NLoRA(LowRankStart):
    """A starts at the first r rows of W, B at its first r columns, and the mixer between them at the pseudo-inverse of
    the block ``W[:r, :r]`` that both contain, over the scale: the product is Nyström's approximation of W. It is a
    start of methods with a mixer (``method: mos-lora``).

    A public program takes the block itself in place of its inverse, and does not take the product out of the weight;
    here the frozen pair takes it back. Singular values of the block below `cutoff` of the largest are left out.
    """

    core: str = option(
        "inverse", "What the mixer starts at: the block's inverse, or the block.", choices=("inverse", "block")
    )
    cutoff: float = option(0.05, "Smallest singular value of the block, relative to the largest.", above=0, below=1)

    def check_entry(self, entry: Entry) -> None:
        """Refuse a method without a mixer."""
        super().check_entry(entry)
        if "mixer" not in entry.home.tensors():
            raise SiteError(
                f"'{entry.site.path}' has the method {entry.method.info.slug}, which cannot begin with the start "
                "'nlora': it has no mixer between A and B. Take the method mos-lora."
            )

    def set(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> None:
        """Set both factors and the mixer."""
        rank, weight = rank_of(entry), entry.site.matrix().float()
        block = weight[..., :rank, :rank]
        core = torch.linalg.pinv(block, rtol=self.cutoff) if self.core == "inverse" else block
        a, b = low_rank(entry, self)
        a.copy_(weight[..., :rank, :].to(a))
        b.copy_(weight[..., :, :rank].to(b))
        mixer = entry.home.tensors()["mixer"]
        mixer.copy_((core / scale_of(entry)).to(mixer))
