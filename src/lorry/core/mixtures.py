"""Mixtures in place of a feed-forward block: each token goes through some experts, which share the frozen block and
differ by low-rank updates of its projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lorry.core.families import norms_of_sum
from lorry.core.feedforward import FeedForward
from lorry.core.method import Tensors, TensorSpec, kaiming, ones
from lorry.core.sites import Site
from lorry.kernels.dropout import keep_mask
from lorry.kernels.thin import thin_linear


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
    """

    tensors: Tensors
    scale: float
    p: float = 0.0
    seed: int | None = None

    def drop(self, inputs: Tensor, shape: torch.Size, mark: int, token: Tensor | None) -> Tensor:
        """Drop elements of a projection's input ``(tokens, in)``, or of what `token` chose of it ``(pairs, in)``.

        `shape` is that of the batch of tokens, `mark` tells projections apart.
        """
        if self.seed is None or not self.p:
            return inputs
        keep = keep_mask((*shape, inputs.shape[-1]), self.p, self.seed + mark, inputs.device).flatten(0, -2)
        return inputs * (keep if token is None else keep[token]) / (1 - self.p)

    def add(self, site: Site, pairs: Pairs, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs of a projection ``(pairs, out)`` with the updates, given the frozen layer's; experts
        beyond those that have updates keep them.
        """
        a, b = self.tensors[f"{site.name}.A"], self.tensors[f"{site.name}.B"]
        parts = []
        for e, (rows, old) in enumerate(zip(inputs.split(pairs.sizes), outputs.split(pairs.sizes), strict=True)):
            if e < len(a):
                h = thin_linear(rows, a[e].to(rows.dtype)) * self.scale
                old = old + thin_linear(h, b[e].to(rows.dtype))
            parts.append(old)
        result = torch.cat(parts)
        magnitude = self.tensors.get(f"{site.name}.magnitude")
        if magnitude is None:
            return result
        with torch.no_grad():
            norms = norms_of_sum(site, a, b, self.scale)
        gain = F.pad(magnitude / norms.to(magnitude.dtype), (0, 0, 0, 1), value=1.0)[pairs.expert].to(result.dtype)
        bias = site.kind.bias(site)
        return result * gain if bias is None else (result - bias) * gain + bias


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
    gates, mask = torch.cat([gates, none.to(gates)], -1), torch.cat([mask, none], -1)
    pairs, flat = Pairs.of(mask), x.flatten(0, -2)

    def project(name: str, inputs: Tensor, outputs: Tensor, paired: bool) -> Tensor:
        if f"{name}.A" not in updates.tensors:
            return outputs
        inputs = updates.drop(inputs, x.shape[:-1], parts.names.index(name), pairs.token if paired else None)
        return updates.add(parts.sites[name], pairs, outputs, inputs if paired else inputs[pairs.token])

    def run(name: str, inputs: Tensor) -> Tensor:
        result = parts.sites[name].owner(inputs)
        assert isinstance(result, Tensor)
        return result

    opened = [project(n, flat, run(n, x).flatten(0, -2)[pairs.token], False) for n in parts.inputs]
    hidden = parts.between(opened, activation)
    closed = project(parts.output, hidden, run(parts.output, hidden), True)
    weighted = closed * gates.flatten(0, -2)[pairs.token, pairs.expert].to(closed.dtype).unsqueeze(-1)
    total = flat.new_zeros(len(flat), closed.shape[-1]).index_add(0, pairs.token, weighted)
    return total.view(*x.shape[:-1], -1)


def jittered(x: Tensor, amount: float, seed: int) -> Tensor:
    """Return x times noise between ``1 - amount`` and ``1 + amount``, drawn position by position, so that a row's noise
    does not depend on how far the batch is padded.
    """
    noise = torch.empty(x.movedim(0, -2).shape).uniform_(-1, 1, generator=Generator().manual_seed(seed))
    return x * (1 + amount * noise.movedim(-2, 0)).to(x)
