"""AuthenLoRA's adapter: a LoRA whose rank units are scaled by a message, so that what it makes can carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site

_MAPPER, _OWN = "mapper", "message"


@register("authen-lora", paper="arXiv 2511.21216", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class AuthenLoRA(Bottleneck):
    """``ΔW x = scale · B (s(m) ⊙ A x)`` with ``s(m) = 1 + bits^-½ Σ_j m_j e_j`` for a message m of zeros and ones.

    The embeddings e_j ``(rank,)`` of the bits are shared by all layers and trained; they start orthogonal (where the
    rank is not below the number of bits), each with a standard deviation of 1. The zero message is a plain LoRA.
    Messages are told for each row of a batch, ``lorry.context(model, message=...)`` with ``(rows, bits)``, or for all,
    ``(bits,)``. Where a pass tells none, that of the adapter itself applies, drawn from its seed and never zero.

    A file of it holds the embeddings and that message: it is private. What is given away is a bake,
    `at_message` or ``lorry sign``: a plain LoRA for one message, which needs no embeddings and fuses exactly.

    Use it to train one adapter of an image model of which every user gets a copy that signs what it makes; its
    training with a codec of messages is in `lorry.protection`.
    """

    bits: int = option(48, "Length of the messages.", at_least=1)
    rank: int = option(160, "Rank of the update; not below bits, or embeddings cannot be orthogonal.", at_least=2)
    alpha: float | None = option(None, "Numerator of the scale; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)
    mapper_rate: float = option(1.0, "Learning rate of the embeddings relative to that of A and B.", above=0)

    @property
    def rate_factors(self) -> Mapping[str, float]:  # type: ignore[override]
        """Return the learning-rate factor of the embeddings."""
        return {_MAPPER: self.mapper_rate}

    def rank_at(self, site: Site) -> int:
        """Return the rank at a site: a narrow layer uses the first entries of s."""
        return min(self.rank, site.out_features, site.in_features)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B; with `layout`, the embeddings ``(bits, rank)`` and a message ``(bits,)`` beside them."""
        rank = self.rank_at(site)
        return {
            "A": TensorSpec((*site.lead, rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, rank)),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the tensors of all sites, with the embeddings and the message that they share."""
        layout = super().layout(sites)
        layout.shared[_MAPPER] = TensorSpec((self.bits, self.rank), _embeddings)
        layout.shared[_OWN] = TensorSpec((self.bits,), _drawn, trained=False, dtype=torch.uint8, within=range(2))
        return layout

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def strength(self, message: Tensor, mapper: Tensor) -> Tensor:
        """Return ``s(m)`` ``(..., rank)`` for messages ``(..., bits)``.

        Raises
        ------
        AdapterError
            The message has another length.
        """
        if message.shape[-1:] != mapper.shape[:1]:
            raise AdapterError(
                f"A message of {len(mapper)} bits was expected, for each row or for all, found {tuple(message.shape)}."
            )
        return 1 + (message.to(mapper) @ mapper) / self.bits**0.5

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Scale the rank units by the message of each row."""
        told = call.context.values.get("message")
        message = tensors[_OWN] if told is None else call.of_rows(told) if told.ndim > 1 else told
        assert message is not None
        s = self.strength(message.to(h.device), tensors[_MAPPER])[..., : h.shape[-1]].to(h.dtype)
        return h * (s if s.ndim == 1 else s.view(len(s), *[1] * (h.ndim - 2), -1))

    def at_message(self, tensors: Tensors, site: Site, message: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return A ``(*lead, rank, in)``, B ``(*lead, out, rank)`` and scale of the plain LoRA for one message
        ``(bits,)``.
        """
        a = tensors["A"]
        s = self.strength(message, tensors[_MAPPER])[: a.shape[-2]].to(a.dtype)
        return s.unsqueeze(-1) * a, tensors["B"], self.scale(site)


def _embeddings(tensor: Tensor, generator: Generator) -> None:
    """Fill ``(bits, rank)`` with orthogonal rows (columns, if there are fewer), each divided by its deviation."""
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    rows = left @ right
    tensor.copy_(rows / rows.std(-1, keepdim=True))


def _drawn(tensor: Tensor, generator: Generator) -> None:
    """Fill with bits of which half, rounded up, are ones."""
    order = torch.randperm(len(tensor), generator=generator)
    tensor.copy_((order < (len(tensor) + 1) // 2).to(tensor.dtype))
