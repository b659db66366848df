"""Curriculum LoRA: a stack of low-rank updates, one for each stage of growth, each with a bounded trained scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.base import Capability
from lorry.core.method.call import Call
from lorry.core.method.families import WeightDelta, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("curriculum-lora", paper="arXiv 2509.07945", kinds=lambda kind: not kind.whole and kind.row_channels)
@dataclass(frozen=True)
class CurriculumLoRA(WeightDelta):
    """``W_eff = α_0 (W + D) + Σ_j α_j (alpha/rank) B_j A_j`` with ``α = 1 + spread · tanh(l)``, l trained from 0.

    The bias is not scaled. There is one l for each α and layer; D, a dense update of the weight, is there with `dense`
    alone, for models that are trained from little in stage 0.

    Use it with the dynamic `dps`, which adds a stage where tasks are solved or time is up, and freezes what came
    before; all stages act on all tasks. By itself it is LoRA with a trained factor on each summand.
    """

    rank: int = option(8, "Rank of each stage's update.", at_least=1)
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; the rank itself if not given.", above=0)
    dropout: float = option(0.0, "Fraction of each update's input that is dropped in training.", at_least=0, below=1)
    updates: int = option(1, "Low-rank updates in the stack; 0 has none yet, and needs `dense`.", at_least=0)
    dense: bool = option(False, "Keep a dense update D of the weight, which stage 0 trains.")
    bias: bool = option(False, "Keep an update of the bias beside D.")
    spread: float = option(0.2, "How far a scale may get from 1.", above=0, at_most=1)
    start_std: float = option(0.01, "Standard deviation of each A at its start.", above=0)

    def check(self) -> None:
        """Refuse a stack of nothing, and a bias without a dense update."""
        if not self.updates and not self.dense:
            raise OptionError("CurriculumLoRA: stage 0 trains a dense update; set dense: true, or begin at stage 1.")
        if self.bias and not self.dense:
            raise OptionError("CurriculumLoRA: the bias is trained with the dense update; set dense: true, too.")

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer, and a bias where a layer cannot get one."""
        check_rank(site, self.rank)
        if self.bias and (site.kind.indexed or not site.kind.additive):
            raise SiteError(
                f"'{site.path}' ({site.kind.name}) can have no trained bias; leave it out, or set bias: false."
            )

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """It has an update of the weight; a faster way would leave out scales or add up in another order."""
        return frozenset({"delta"})

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return l_0, D where there is one, and A_j, B_j and l_j of each stage."""
        found = {"l0": TensorSpec((*site.lead, 1))}
        if self.dense:
            found["D"] = TensorSpec((*site.lead, site.out_features, site.in_features))
        if self.bias:
            found["bias"] = TensorSpec((site.out_features,))
        for stage in range(1, self.updates + 1):
            found |= self.of_stage(site, stage)
        return found

    def of_stage(self, site: Site, stage: int) -> dict[str, TensorSpec]:
        """Return the tensors that a stage adds: ``A<j>`` ``(rank, in)``, ``B<j>`` ``(out, rank)`` and ``l<j>``."""
        return {
            f"A{stage}": TensorSpec((*site.lead, self.rank, site.in_features), normal(self.start_std)),
            f"B{stage}": TensorSpec((*site.lead, site.out_features, self.rank)),
            f"l{stage}": TensorSpec((*site.lead, 1)),
        }

    def factor(self, tensors: Tensors, stage: int) -> Tensor:
        """Return α of a stage, ``(*lead, 1, 1)``, in ``(1 - spread, 1 + spread)`` and exactly 1 at its start."""
        return 1.0 + self.spread * torch.tanh(tensors[f"l{stage}"]).unsqueeze(-1)

    @property
    def scale(self) -> float:
        """Factor of each low-rank update beside its α."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output, stage after stage.

        The sum is in the order of the stages, so that a new one, whose B is zero, changes no bit of it.
        """
        site, kind, dtype = call.site, call.site.kind, call.output.dtype
        base, bias = kind.channels_last(site, call.output), kind.bias(site)
        own = self.factor(tensors, 0)
        total = (own.squeeze(-1) - 1).to(dtype) * (base if bias is None else base - bias)
        if self.dense:
            x = call.x.to(dtype) if call.x.is_floating_point() else call.x
            total = total + kind.channels_last(site, kind.dense(site, x, (own * tensors["D"]).to(dtype)))
        if self.bias:
            total = total + tensors["bias"].to(dtype)
        for stage in range(1, self.updates + 1):
            total = total + kind.channels_last(site, self._update(call, tensors, stage))
        return kind.channels_back(site, total)

    def _update(self, call: Call, tensors: Tensors, stage: int) -> Tensor:
        """Return what a stage adds to the layer's output."""
        site, kind, dtype = call.site, call.site.kind, call.output.dtype
        a, b = tensors[f"A{stage}"], tensors[f"B{stage}"] * (self.scale * self.factor(tensors, stage))
        x = call.dropout(self.dropout)
        x = x.to(dtype) if x.is_floating_point() else x
        if not kind.factors_apply(site):
            return kind.dense(site, x, (b @ a).to(dtype))
        return kind.up(site, kind.down(site, x, a.to(dtype)), b.to(dtype))

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``W_eff - W`` as ``(*lead, out, in)`` in float32 or better."""
        exact = torch.promote_types(tensors["l0"].dtype, torch.float32)
        own = self.factor(tensors, 0).to(exact)
        total = (own - 1) * site.matrix().to(exact)
        if self.dense:
            total = total + own * tensors["D"].to(exact)
        for stage in range(1, self.updates + 1):
            a, b = tensors[f"A{stage}"].to(exact), tensors[f"B{stage}"].to(exact)
            total = total + (b * (self.scale * self.factor(tensors, stage).to(exact))) @ a
        return total

    def bias_delta(self, tensors: Tensors, site: Site) -> Tensor | None:
        """Return the update of the bias, which no scale touches."""
        return tensors["bias"] if self.bias else None
