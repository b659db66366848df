"""Mixtures in place of a feed-forward block: each token goes through some experts, which share the frozen block and
differ by low-rank updates of its projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lorry.core.method.families import norms_of_sum
from lorry.core.method.spec import Tensors, TensorSpec, kaiming, ones
from lorry.core.sites.site import Site
from lorry.kernels.dropout import keep_mask
from lorry.kernels.lowrank import low_rank_linear
from lorry.kernels.segments import LowRankPair, Segment
from lorry.methods.parts.feedforward import FeedForward


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and an expert that it goes through, sorted by expert.

    Attributes
    ----------
    expert, token
        ``(pairs,)``; tokens are counted over the flattened batch.
    sizes
        Pairs of each expert.
    """

    expert: Tensor
    token: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Pairs:
        """Return the pairs at which `mask` ``(..., experts)`` is True."""
        expert, token = mask.flatten(0, -2).t().nonzero(as_tuple=True)
        return cls(expert, token, tuple(torch.bincount(expert, minlength=mask.shape[-1]).tolist()))


@dataclass(frozen=True)
class ExpertUpdates:
    """Low-rank updates of each expert at the projections of a block.

    Attributes
    ----------
    tensors
        ``NAME.A`` ``(experts, rank, in)`` and ``NAME.B`` ``(experts, out, rank)`` at the projections that have updates,
        and ``NAME.magnitude`` ``(experts, out)`` where the norm of each output channel is trained.
    scale
        Factor of the updates.
    p, seed
        Dropout of their input; no seed, no dropout.
    plans
        What the projections share of how the pairs lie; see `lorry.kernels.lowrank.low_rank_linear`.
    """

    tensors: Tensors
    scale: float
    p: float = 0.0
    seed: int | None = None
    plans: dict[Any, Any] = field(default_factory=dict)

    def drop(self, inputs: Tensor, shape: torch.Size, mark: int, token: Tensor | None) -> Tensor:
        """Drop elements of a projection's input ``(tokens, in)``, or of what `token` chose of it ``(pairs, in)``.

        `shape` is that of the batch of tokens, `mark` tells projections apart.
        """
        if self.seed is None or not self.p:
            return inputs
        keep = keep_mask((*shape, inputs.shape[-1]), self.p, self.seed + mark, inputs.device).flatten(0, -2)
        return inputs * (keep if token is None else keep[token]) / (1 - self.p)

    def add(self, name: str, pairs: Pairs, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs of a projection ``(pairs, out)`` with the updates; experts beyond those that have any keep
        them.
        """
        a, b = self.tensors[f"{name}.A"], self.tensors[f"{name}.B"]
        ends = list(accumulate(pairs.sizes))
        rows = [slice(end - size, end) for end, size in zip(ends, pairs.sizes, strict=True)]
        segments = [Segment(part, self.scale) for part in rows[: len(a)]]
        factors = [LowRankPair(*both) for both in zip(a.unbind(), b.unbind(), strict=True)]
        return low_rank_linear(inputs, None, None, outputs, segments, factors, self.plans)

    def gained(self, name: str, site: Site, pairs: Pairs, outputs: Tensor) -> Tensor:
        """Return outputs with updates times a gain where magnitudes are trained."""
        magnitude = self.tensors.get(f"{name}.magnitude")
        if magnitude is None:
            return outputs
        with torch.no_grad():
            norms = norms_of_sum(site, self.tensors[f"{name}.A"], self.tensors[f"{name}.B"], self.scale)
        gain = F.pad(magnitude / norms.to(magnitude.dtype), (0, 0, 0, 1), value=1.0)[pairs.expert].to(outputs.dtype)
        bias = site.kind.bias(site)
        return outputs * gain if bias is None else (outputs - bias) * gain + bias


def expert_specs(
    parts: FeedForward, names: Sequence[str], experts: int, rank: int, gain: bool
) -> dict[str, TensorSpec]:
    """Return the tensors of `ExpertUpdates` at the projections of these names, with magnitudes for a `gain`."""
    specs = {}
    for name in names:
        out, inner = parts.sites[name].shape
        specs[f"{name}.A"] = TensorSpec((experts, rank, inner), kaiming)
        specs[f"{name}.B"] = TensorSpec((experts, out, rank))
        if gain:
            specs[f"{name}.magnitude"] = TensorSpec((experts, out), ones)
    return specs


def start_magnitudes(parts: FeedForward, tensors: Tensors) -> None:
    """Set the magnitudes of `ExpertUpdates` to the norms of the base weights."""
    for name, site in parts.sites.items():
        if f"{name}.magnitude" in tensors:
            tensors[f"{name}.magnitude"].copy_(norms_of_sum(site, None, None, 0.0))


def mixed_feed_forward(
    parts: FeedForward,
    x: Tensor,
    gates: Tensor,
    mask: Tensor,
    activation: Callable[[Tensor], Tensor],
    updates: ExpertUpdates,
) -> Tensor:
    """Return ``Σ_e gate_e FFN_e(x)``; what a module gives for a token is computed once for all of its experts.

    Parameters
    ----------
    parts
        Of the block.
    x
        Its input ``(..., width)``.
    gates, mask
        Weights of the experts, and which of them a token goes through, ``(..., experts)``. Tokens that go through none
        get the frozen block's output.
    activation
        Between the projections.
    updates
        Of the experts.
    """
    none = ~mask.any(-1, keepdim=True)
    gates = gates * mask  # what a token is not sent through weighs nothing, although its router may have chosen it
    gates, mask = torch.cat([gates, none.to(gates)], -1), torch.cat([mask, none], -1)
    pairs, flat = Pairs.of(mask), x.flatten(0, -2)

    share = gates.flatten(0, -2)[pairs.token, pairs.expert].unsqueeze(-1)

    def updated(name: str, inputs: Tensor, outputs: Tensor, paired: bool) -> Tensor:
        """Return what a projection gives each pair: the frozen layer's outputs with update and gain."""
        if f"{name}.A" not in updates.tensors:
            return outputs
        inputs = updates.drop(inputs, x.shape[:-1], parts.names.index(name), pairs.token if paired else None)
        outputs = updates.add(name, pairs, outputs, inputs if paired else inputs[pairs.token])
        return updates.gained(name, parts.sites[name], pairs, outputs)

    def summed(values: Tensor) -> Tensor:
        """Return the sum of a token's pairs, each with its weight."""
        total: Tensor = _WeightedSum.apply(values, share.to(values.dtype), pairs.token, len(flat))  # type: ignore[no-untyped-call]
        return total

    opened = [updated(n, flat, parts.run(n, x).flatten(0, -2)[pairs.token], False) for n in parts.inputs]
    hidden, last = parts.between(opened, activation), parts.output
    if f"{last}.magnitude" in updates.tensors:
        return summed(updated(last, hidden, parts.run(last, hidden), True)).view(*x.shape[:-1], -1)
    # the frozen projection is linear: it is run once for each token, and not for each of its experts
    total, site = parts.run(last, summed(hidden)), parts.sites[last]
    bias = site.kind.bias(site)
    if bias is not None:
        total = total + (gates.flatten(0, -2).sum(-1, keepdim=True) - 1).to(total.dtype) * bias
    if f"{last}.A" in updates.tensors:
        total = total + summed(updated(last, hidden, hidden.new_zeros(len(hidden), site.out_features), True))
    return total.view(*x.shape[:-1], -1)


class _WeightedSum(torch.autograd.Function):
    """Sum of the values of each token's pairs, each with its weight; the weighted values are not kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, share: Tensor, token: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(values, share, token)
        return values.new_zeros(tokens, values.shape[-1]).index_add_(0, token, values * share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, share, token = ctx.saved_tensors
        each = grads[0].index_select(0, token)
        return each * share, (each * values).sum(-1, keepdim=True), None, None


def jittered(x: Tensor, amount: float, seed: int | None) -> Tensor:
    """Return x times noise between ``1 - amount`` and ``1 + amount``, drawn position by position, so that a row's noise
    does not depend on how far the batch is padded; x itself without an amount or a seed.
    """
    if seed is None or not amount:
        return x
    noise = torch.empty(x.movedim(0, -2).shape).uniform_(-1, 1, generator=Generator().manual_seed(seed))
    return x * (1 + amount * noise.movedim(-2, 0)).to(x)
