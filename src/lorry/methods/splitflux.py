"""SplitFlux's content adapter: two low-rank branches, mixed token by token after how much the token stands out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import AdapterError, OptionError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.saliency import gate_here

#: Rows of the two updates that are multiplied at a time.
_ROWS = 512


@register("splitflux", paper="arXiv 2511.15258", kinds=("linear",))
@dataclass(frozen=True)
class SplitFlux(Bottleneck):
    """``ΔW x_n = s (g_n B A x_n + (1 - g_n) D C x_n)``: a main branch for tokens that stand out, and a rest.

    The gate is the block's, from the norms of the image tokens that enter it (`lorry.methods.parts.saliency`);
    tokens that are not of an image have gate 1. A complementary loss keeps the branches apart: ``‖A Cᵀ‖² + ‖Bᵀ D‖²``
    and the mean of ``|B A ⊙ D C|``. With ``residual=0`` and no gate it is a plain LoRA, of which rank ``r/α`` with
    ``alpha=r`` is the paper's rank-constrained adaptation.

    Use it through `lorry.diffusion.splitflux`, on the single-stream blocks of a Flux model.
    """

    rank: int = option(8, "Rank of both branches together; 64 in the paper.", at_least=1)
    residual: int = option(
        2, "Of these, rank units of the rest, 16 in the paper; 0 for the main branch alone.", at_least=0
    )
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    gate: str = option(
        "block", "The gate of the block around the layer, or none: 1 for all tokens.", choices=("block", "none")
    )
    complement: float = option(0.1, "Weight of the loss that keeps the branches apart.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse a rest that leaves nothing for the main branch."""
        if self.residual >= self.rank:
            raise OptionError(
                f"SplitFlux: residual must be below rank, found residual={self.residual} and rank={self.rank}."
            )
        if self.residual and self.gate == "none":
            raise OptionError("SplitFlux: with gate='none' the rest has no share; set residual=0.")

    def check_site(self, site: Site) -> None:
        """Refuse ranks that the layer is too narrow for."""
        super().check_site(site)
        check_rank(site, self.rank)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A (main, then rest) ``(rank, in)`` and B ``(out, rank)``."""
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, self.rank)),
        }

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def constant(self) -> bool:
        """Whether all tokens have one gate."""
        return self.gate != "block"

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Weigh the branches of each token, and leave the complementary loss."""
        if call.training and self.complement and self.residual:
            call.add_loss("complement", self.complement * self.overlap(tensors["A"], tensors["B"]))
        if self.constant:
            return h
        main, rest = h.split([self.rank - self.residual, self.residual], -1)
        gate = self._gate(h, call)
        return torch.cat([main, 0 * rest] if gate is None else [gate * main, (1 - gate) * rest], -1)

    def _gate(self, h: Tensor, call: Call) -> Tensor | None:
        """Return the gates of this call's tokens ``(rows, tokens, 1)``; None for 1 everywhere."""
        gate = gate_here()
        if gate is not None and h.ndim == 3 and not call.tokens and gate.shape == (call.batch, h.shape[1]):
            return (gate if call.rows is None else gate[call.rows]).to(h.dtype).unsqueeze(-1)
        if gate is None and ".single_transformer_blocks." not in f".{call.site.path}":
            return None
        found = "there is none" if gate is None else f"it has gates for {tuple(gate.shape)}"
        raise AdapterError(
            f"'{call.adapter}' needs the gates of the block around '{call.site.path}' for {call.batch} rows of "
            f"{tuple(h.shape[1:-1])} tokens, but {found}. Run the model inside of lorry.diffusion.splitflux.gated("
            "model)."
        )

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``‖A Cᵀ‖² + ‖Bᵀ D‖² + mean|B A ⊙ D C|`` of the branches in `a` ``(rank, in)`` and `b` ``(out,
        rank)``.
        """
        sizes = [self.rank - self.residual, self.residual]
        (main_a, rest_a), (main_b, rest_b) = a.split(sizes, -2), b.split(sizes, -1)
        spaces = (main_a @ rest_a.mT).square().sum() + (main_b.mT @ rest_b).square().sum()
        shared = sum(
            ((p @ main_a) * (q @ rest_a)).abs().sum()
            for p, q in zip(main_b.split(_ROWS, -2), rest_b.split(_ROWS, -2), strict=True)
        )
        return spaces + shared / (a.shape[-1] * b.shape[-2])
