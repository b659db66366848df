"""MM-LoRA: vision tokens and text tokens of a decoder have a LoRA of their own in every layer (Arcana)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import SiteError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("mm-lora", paper="arXiv 2410.13733", kinds=lambda kind: kind.additive and kind.positionwise)
@dataclass(frozen=True)
class MMLoRA(Bottleneck):
    """``ΔW x_t = m_t · s_V B_V A_V x_t + (1 - m_t) · s_L B_L A_L x_t`` with m_t = 1 at tokens of the vision kind.

    ``lorry.context(model, token_kinds=...)`` tells the kinds of the tokens; tokens that come later (cached decoding)
    continue the last one's, and where nothing was told every token is text. The paper's ranks are 64 and 192 of 256.

    Use it in a vision-language model whose two kinds of tokens need different corrections; text alone is then served
    by the text half, which is a plain LoRA.
    """

    rank: int = option(16, "Rank units of both kinds of tokens together.", at_least=2)
    vision_share: float = option(0.25, "Share of the rank units that vision tokens have.", above=0, below=1)
    vision_scale: float = option(2.0, "Factor of the update of vision tokens.", above=0)
    text_scale: float = option(2.0, "Factor of the update of other tokens.", above=0)
    vision_kind: int = option(1, "Which kind of tokens is vision.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank of the LoRA of vision tokens and of that of all others, at least 1 each."""
        vision = min(max(round(self.vision_share * self.rank), 1), self.rank - 1)
        return vision, self.rank - vision

    def check_site(self, site: Site) -> None:
        """Refuse ranks that the layer cannot use, and gates where there can be none."""
        super().check_site(site)
        check_rank(site, max(self.ranks), "rank of a kind of tokens")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A ``(rank, in)`` and B ``(out, rank)`` for each of the two kinds."""
        found = {}
        for kind, rank in zip(("vision", "text"), self.ranks, strict=True):
            found[f"A_{kind}"] = TensorSpec((*site.lead, rank, site.in_features), kaiming)
            found[f"B_{kind}"] = TensorSpec((*site.lead, site.out_features, rank))
        return found

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the two As above each other, and the two Bs side by side with their scales."""
        b = [tensors["B_vision"] * self.vision_scale, tensors["B_text"] * self.text_scale]
        return torch.cat([tensors["A_vision"], tensors["A_text"]], -2), torch.cat(b, -1)

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Keep the rank units of each token's own kind."""
        told = call.context.token_kinds
        kinds = call.of_tokens(told)
        if told is not None and kinds is None:
            raise SiteError(
                f"'{call.site.path}' does not see the {told.shape[1]} tokens whose kinds were told. MM-LoRA belongs on "
                "layers of the decoder; leave the site out."
            )
        if kinds is None:
            seen = h.new_zeros(h.shape[:-1], dtype=torch.bool)
        else:
            seen = kinds.reshape(h.shape[:-1]) == self.vision_kind
        units = torch.arange(h.shape[-1], device=h.device) < self.ranks[0]
        return torch.where(units == seen.unsqueeze(-1), h, torch.zeros((), dtype=h.dtype, device=h.device))
