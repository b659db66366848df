"""MatryoshkaLoRA and DyLoRA: one adapter whose first r rank units are an adapter for every r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.families import check_rank
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import Layout, Places, Tensors, TensorSpec, constant, kaiming
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.nested import Nested


@register("matryoshka-lora", paper="arXiv 2605.07850")
@dataclass(frozen=True)
class Matryoshka(Nested):
    """``ΔW = B diag(P) A`` with ``P_i`` the sum of the scales s_r of the trained ranks r > i: all
    sub-adapters' outputs at once.

    ``mode="dylora"`` (arXiv 2210.07558) draws one r for the whole model at each step instead, ``P_i = s_r [i < r]``;
    ``mode="lora"`` trains the full rank only. After training `lorry.methods.parts.nested.cut` fixes a rank; what is
    used, fused and exported then is ``B_r A_r`` with the official scale s_r (``cut_scale="rank"``), which
    differs from the function trained even at the full rank, or with the first r of P (for DyLoRA, whose P is another
    one for each drawn rank, the two are the same).

    Use it where the rank is decided after training, such as one for the server and a smaller one for the phone.
    """

    rank: int = option(16, "Rank R that is stored.", at_least=1)
    ranks: tuple[int, ...] | None = option(
        None, "Ranks to train for; powers of two up to the rank, and the rank itself, if not given."
    )
    mode: str = option("matryoshka", "Which P training has.", choices=("matryoshka", "dylora", "lora"))
    scaling: str = option("none", "Scale s_r of a sub-adapter: 1, 1/r or 1/sqrt(r).", choices=("none", "rank", "sqrt"))
    cut_scale: str = option(
        "P",
        "Scale after cutting: the weights P it was trained with, or the official s_r.",
        choices=("P", "rank"),
    )
    at: int | None = option(None, "Rank that is used; None is the function that is trained.", at_least=1)
    draw_seed: int = option(0, "Seed of DyLoRA's draws.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse ranks beyond the stored one."""
        wrong = [r for r in self.ranks or () if not (isinstance(r, int) and 1 <= r <= self.rank)]
        if wrong or self.ranks == ():
            raise OptionError(f"Matryoshka: ranks must lie between 1 and rank {self.rank}, found {wrong or 'none'}.")
        if self.at is not None and self.at > self.rank:
            raise OptionError(f"Matryoshka: at must be at most rank {self.rank}, found {self.at}.")

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.rank)

    @property
    def trained_ranks(self) -> tuple[int, ...]:
        """The ranks that training serves, ascending."""
        if self.mode == "lora":
            return (self.rank,)
        powers = [2**k for k in range(self.rank.bit_length())]
        return tuple(sorted(set(self.ranks or [*powers, self.rank])))

    def scale_of(self, rank: int) -> float:
        """Return s_r."""
        return {"none": 1.0, "rank": 1 / rank, "sqrt": 1 / math.sqrt(rank)}[self.scaling]

    def weights(self) -> list[float]:
        """Return P of the function that serves all trained ranks; for DyLoRA that of the full rank."""
        served = (self.rank,) if self.mode == "dylora" else self.trained_ranks
        return [sum(self.scale_of(r) for r in served if r > i) for i in range(self.rank)]

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A and B."""
        return {
            "A": TensorSpec((*site.lead, self.rank, site.in_features), kaiming),
            "B": TensorSpec((*site.lead, site.out_features, self.rank)),
        }

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return A and B of each site, and for DyLoRA the rank drawn for all of them."""
        drawn = TensorSpec((1,), constant(self._draw(0)), False, torch.int64, within=range(1, self.rank + 1))
        return Layout({s.path: self.tensors(s) for s in sites}, {"drawn": drawn} if self.mode == "dylora" else {})

    def _draw(self, step: int) -> int:
        generator = torch.Generator().manual_seed(self.draw_seed * 1_000_003 + step)
        ranks = self.trained_ranks
        return ranks[int(torch.randint(len(ranks), (), generator=generator))]

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Draw DyLoRA's rank of the next step."""
        if self.mode == "dylora" and places:
            places[0][1]["drawn"].fill_(self._draw(step))

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A and ``B diag(P)``, or their first units with the scale of the cut."""
        a, b = tensors["A"], tensors["B"]
        if self.at is not None:
            # DyLoRA trained the first r units with the scale of r, and not with that of all
            trained = self.cut_scale == "P" and self.mode != "dylora"
            kept = self.weights()[: self.at] if trained else [self.scale_of(self.at)] * self.at
            return a[..., : self.at, :], b[..., : self.at] * b.new_tensor(kept)
        # drawn ranks are for training; fusing (no graph) and evaluation use all units
        if self.mode == "dylora" and site.owner.training and torch.is_grad_enabled():
            scales = b.new_tensor([self.scale_of(r) for r in range(1, self.rank + 1)])
            drawn = tensors["drawn"]
            units = torch.arange(self.rank, device=b.device)
            return a, b * torch.where(units < drawn, scales.index_select(0, drawn - 1), 0.0)
        return a, b * b.new_tensor(self.weights())


preset("dylora", of="matryoshka-lora", paper="arXiv 2210.07558", mode="dylora")
