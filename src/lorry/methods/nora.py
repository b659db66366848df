"""NoRA: a small trained pair nested between frozen factors of the weight's own SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.decompose import split_evenly, truncated_svd


@register("nora", paper="arXiv 2408.10280")
@dataclass(frozen=True)
class NoRA(LoRA):
    """``ΔW = scale · B (B' A') A`` with ``B A`` the top singular triples of W, split evenly and frozen, A'
    ``(inner_rank, rank)`` random and B' ``(rank, inner_rank)`` zero at the start (section 3).

    Nothing is taken out of the weight, since the inner product is zero at the start. The frame is written to the
    checkpoint, because an SVD on another machine may differ in signs.

    Use it where very many adapters are kept: a site has ``2 · rank · inner_rank`` trained values, whatever its widths
    are.
    """

    rank: int = option(16, "Rank of the frozen frame.", at_least=1)
    inner_rank: int = option(2, "Rank of the trained pair.", at_least=1)

    def check(self) -> None:
        """Refuse an inner pair that is wider than its frame."""
        if self.inner_rank > self.rank:
            raise OptionError(
                f"NoRA: inner_rank must be at most rank, found inner_rank {self.inner_rank} and rank {self.rank}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the frozen frame and the inner pair."""
        frame = {n: TensorSpec(s.shape, trained=False) for n, s in super().tensors(site).items()}
        inner = {
            "inner_A": TensorSpec((*site.lead, self.inner_rank, self.rank), kaiming),
            "inner_B": TensorSpec((*site.lead, self.rank, self.inner_rank)),
        }
        return {**frame, **inner}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Take the top singular triples of the weight."""
        a, b = split_evenly(*truncated_svd(site.matrix().float(), self.rank, 0, generator), 1.0)
        tensors["A"].copy_(a)
        tensors["B"].copy_(b)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the inner pair, each factor multiplied by its side of the frame."""
        inner_a, inner_b = tensors["inner_A"], tensors["inner_B"]
        # a model that is cast takes what is trained along, and not the frame
        return inner_a @ tensors["A"].to(inner_a), torch.matmul(tensors["B"].to(inner_b), inner_b)
