"""PROLoRA: within a layer most of the rank is made of one chunk, repeated along the width and rolled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.sharing import uniform


# chunks of a vocabulary mean nothing, and its size seldom divides: no embeddings
@register("prolora", paper="arXiv 2402.16902", kinds=lambda kind: not (kind.whole or kind.indexed))
@dataclass(frozen=True)
class PROLoRA(LoRA):
    """``ΔW = scale · B A`` where `unshared` rows of A are free, and the others are a chunk ``(rank - unshared, in/m)``
    repeated m times, each time rolled further along the ranks; B likewise with a chunk ``(out/n, rank - unshared)``
    (section 3).

    The i-th chunk is rolled by i times the shared rank over the number of chunks, at least by i. Chunks start as parts
    of a whole A do. A public program rolls along the widths instead. With one repeat it is LoRA.

    Use it for a higher rank at LoRA's count of values, or for fewer values, without sharing between layers.
    """

    unshared: int = option(1, "Rank that is not made of chunks.", at_least=0)
    repeats: int = option(2, "Chunks m of A; they divide the input's width of every layer.", at_least=1)
    output_repeats: int | None = option(
        None, "Chunks n of B, which divide the output's width; as many as of A if not given.", at_least=1
    )

    def check(self) -> None:
        """Refuse more unshared ranks than there are."""
        if self.unshared >= self.rank:
            raise OptionError(
                f"PROLoRA: unshared must be below rank, found unshared {self.unshared} and rank {self.rank}."
            )

    def check_site(self, site: Site) -> None:
        """Refuse widths that do not divide into chunks."""
        super().check_site(site)
        m, n = self.chunks
        if site.in_features % m or site.out_features % n:
            raise SiteError(
                f"'{site.path}' is {site.out_features} x {site.in_features}: PROLoRA's repeats must divide the input's "
                f"width and output_repeats the output's, found {m} and {n}."
            )

    @property
    def chunks(self) -> tuple[int, int]:
        """The numbers of chunks of A and of B."""
        return self.repeats, self.repeats if self.output_repeats is None else self.output_repeats

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the free parts A, B and the chunks."""
        free, rest, (m, n) = self.unshared, self.rank - self.unshared, self.chunks
        a, b = super().tensors(site).values()
        chunks = {
            "chunk_A": TensorSpec((*site.lead, rest, site.in_features // m), uniform(site.in_features)),
            "chunk_B": TensorSpec((*site.lead, site.out_features // n, rest)),
        }
        if not free:
            return chunks
        inner, outer = (*site.lead, free, site.in_features), (*site.lead, site.out_features, free)
        return {"A": replace(a, shape=inner), "B": replace(b, shape=outer), **chunks}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the free parts beside the rolled chunks."""
        rest, (m, n) = self.rank - self.unshared, self.chunks
        a = torch.cat([tensors["chunk_A"].roll(i * max(1, rest // m), -2) for i in range(m)], -1)
        b = torch.cat([tensors["chunk_B"].roll(i * max(1, rest // n), -1) for i in range(n)], -2)
        if not self.unshared:
            return a, b
        return torch.cat([tensors["A"], a], -2), torch.cat([tensors["B"], b], -1)
