"""Routing: choices among experts, their losses and their statistics, as pure functions.

Scores, gates and probabilities have the experts in the last dimension; the dimensions before it are tokens.
``real`` is True at tokens that count, in the shape of the tokens, or None if all do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.call import Call
from lorry.core.sites.site import Site

_QKV = re.compile(r"(q|k|v|query|key|value)(_proj|_lin|_layer)?$")
_CROSS = re.compile(r"cross|encoder_attn|encdec|attn2", re.IGNORECASE)


def check_top_k(method: object, top_k: int, experts: int) -> None:
    """Refuse more active experts than there are.

    Raises
    ------
    OptionError
        Names the method, the rule and the values.
    """
    if top_k > experts:
        name = type(method).__name__
        raise OptionError(f"{name}: top_k must be at most experts, found top_k={top_k} and experts={experts}.")


def precise(logits: Tensor) -> Tensor:
    """Return logits in float32 or better: choices made in half precision are often ties."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Return ``x Rᵀ`` in float32 or better, keeping x for the backward pass in its own precision."""
    logits: Tensor = _Logits.apply(x, router)  # type: ignore[no-untyped-call]
    return logits


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        x = precise(x)
        return x @ router.to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (x, router) = grads, ctx.saved_tensors
        to_x = grad @ router.to(grad.dtype)
        to_router = grad.flatten(0, -2).mT @ x.flatten(0, -2).to(grad.dtype)
        return to_x.to(x.dtype), to_router.to(router.dtype)


def input_router(site: Site) -> str:
    """Return the name of the router at `site` where sites of one input share theirs: the queries, keys and values of a
    self-attention.
    """
    parent = site.path.rpartition(".")[0]
    inputs = _QKV.match(site.name)
    if inputs is None or (_CROSS.search(parent) and inputs.group(1)[0] == "q"):
        return f"{site.path}.router"
    return f"{parent}.qkv.router"


def over_ranks(gates: Tensor, ranks: Sequence[int]) -> Tensor:
    """Repeat each expert's value for its rank units: ``(..., experts)`` becomes ``(..., Σ ranks)``."""
    if len(set(ranks)) == 1:
        return gates.repeat_interleave(ranks[0], -1)
    return gates.repeat_interleave(torch.tensor(ranks, device=gates.device), -1)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return True at the k highest scores of each token; of equal scores those of the first experts, on every
    device.
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    spare = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= spare))


def ranked(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest scores of each token, best first; of equal scores the first expert
    comes first.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_p_mask(probabilities: Tensor, p: float) -> Tensor:
    """Return True at each token's most probable experts, up to and with the one at which their sum exceeds
    `p`.
    """
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = values.cumsum(-1) - values <= p
    return torch.zeros_like(keep).scatter(-1, order, keep)


def choose(probabilities: Tensor, k: int, p: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the k most probable experts of each token, best first, and True at those that are chosen: all k, or with
    `p` only up to that total probability (the others of the order become -1).
    """
    held = probabilities.detach()
    order = ranked(held, k)
    if p is None:
        return order, torch.zeros_like(held, dtype=torch.bool).scatter(-1, order, True)
    mask = top_p_mask(held, p)
    return order.masked_fill(~mask.gather(-1, order), -1), mask


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean squared logsumexp of the logits, which keeps them small."""
    z = logits.logsumexp(-1).square()
    return (z if real is None else z[real]).mean()


def within_capacity(mask: Tensor, capacity: int) -> Tensor:
    """Return `mask` ``(rows, length, experts)`` without the tokens of a row beyond an expert's capacity, in
    running order.
    """
    return mask & (mask.cumsum(-2) <= capacity)


def counts(mask: Tensor, real: Tensor | None) -> Tensor:
    """Return how many real tokens chose each expert, ``(experts,)``."""
    return _flat(mask.float(), real).sum(0)


def balance_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """Move a bias of the scores in place towards equal loads: ``d += rate · sign(mean(load) - load)`` (loss-
    free balancing).
    """
    bias.add_(torch.sign(load.mean() - load).to(bias), alpha=rate)


def balance_sums(probabilities: Tensor, choices: Tensor, real: Tensor | None) -> Tensor:
    """Return what a balance loss needs of some tokens, to be added up over layers: ``(k + 2, experts)``.

    Parameters
    ----------
    probabilities
        ``(..., experts)``.
    choices
        Which expert each token chose first, second, ...: ``(..., k)``; -1 for no expert.
    real
        Tokens that count.

    Returns
    -------
    Tensor
        k lines with the counts of the first, second, ... choice, one with the summed probabilities (the only
        one with a gradient), one with the number of tokens.
    """
    p = _flat(probabilities, real)
    chosen = _flat(choices, real)
    experts = p.shape[-1]
    lines = [torch.bincount(chosen[:, j] + 1, minlength=experts + 1)[1:].to(p) for j in range(chosen.shape[-1])]
    return torch.stack([*lines, p.sum(0), torch.full_like(lines[0], len(p))])


def balance_loss(sums: Tensor) -> Tensor:
    """Return ``E Σ_j Σ_e f_je P_e`` of `balance_sums`: k if all experts are used alike, at most E."""
    total = sums[-1].clamp_min(1)
    return sums.shape[-1] * ((sums[:-2].detach() / total).sum(0) * (sums[-2] / total)).sum()


def entropy(probabilities: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the entropy of each token's distribution in nats, averaged over the tokens."""
    p = _flat(probabilities, real)
    # a probability that came out as 0 has an infinite slope here, which would be nan behind its softmax
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny)).sum(-1).mean() if len(p) else p.sum()


def effective_experts(gates: Tensor, real: Tensor | None = None) -> Tensor:
    """Return each token's effective number of experts ``(Σ w)² / Σ w²``, averaged over the tokens that use
    any.
    """
    w = _flat(gates, real).abs()
    squares = w.square().sum(-1)
    used = squares > 0
    return (w.sum(-1)[used].square() / squares[used]).mean() if used.any() else w.sum()


def draw_order(logits: Tensor, k: int, generator: Generator) -> Tensor:
    """Draw k experts for each token without replacement, in order: ``(..., k)``, by the Gumbel top-k trick.

    Noise is drawn position by position, so that the draws of a row do not depend on how far the batch is
    padded.
    """
    rows, *inner, experts = logits.shape
    noise = torch.rand((*inner, rows, experts), generator=generator).movedim(-2, 0).to(logits.device)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    return ranked(logits.detach() + gumbel, k)


def log_probability(logits: Tensor, order: Tensor) -> Tensor:
    """Return the log-probability of drawing the experts of `order` ``(..., k)`` one after another without
    replacement ``(...)``.

    Each draw is a softmax over the experts that are left, by masking, not by subtracting probabilities from
    1.
    """
    total = torch.zeros(logits.shape[:-1], dtype=logits.dtype, device=logits.device)
    left = logits
    for step in range(order.shape[-1]):
        chosen = order[..., step : step + 1]
        total = total + left.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        left = left.scatter(-1, chosen, float("-inf"))
    return total


def leave_one_out(losses: Tensor, log_probabilities: Tensor) -> Tensor:
    """Return a loss whose gradient trains both what is differentiable and the policy that drew the routes.

    ``mean_m L_m + 1/(M-1) Σ_m (L_m - L̄) log Q_m`` with the advantages held constant: REINFORCE with a
    leave-one-out baseline. Differences within rounding count as none: where all draws give the same loss (experts
    whose update is still zero), an optimizer that normalises gradients would make full steps of noise.

    Parameters
    ----------
    losses
        ``(M, ...)``: the loss of each draw, for each sequence (or token).
    log_probabilities
        The same shape.

    Raises
    ------
    OptionError
        Fewer than two draws: there is no baseline.
    """
    draws = len(losses)
    if draws < 2:
        raise OptionError(f"Leave-one-out needs at least 2 draws of each row, found {draws}.")
    held = losses.detach()
    advantage = held - held.mean(0)
    advantage = advantage * (advantage.abs() > 8 * torch.finfo(held.dtype).eps * held.abs().amax(0))
    return losses.mean() + (advantage * log_probabilities).sum(0).mean() / (draws - 1)


def report(call: Call, gates: Tensor, probabilities: Tensor | None = None) -> None:
    """Record how a layer routed, if somebody records: load and mass of each expert, entropy, effective number
    of experts.

    ``load`` is the share of tokens that use an expert, ``mass`` its mean gate; ``entropy`` (nats) is of the
    router's distribution.
    """
    if not call.context.recording:
        return
    real = call.of_tokens(call.context.padding_mask)
    if real is not None and real.shape != gates.shape[:-1]:
        real = None  # whole sequences are routed, or each row by its task
    call.record("load", lambda: _flat((gates != 0).float(), real).mean(0))
    call.record("mass", lambda: _flat(gates.float(), real).mean(0))
    call.record("effective", lambda: effective_experts(gates.float(), real))
    if probabilities is not None:
        call.record("entropy", lambda: entropy(probabilities.float(), real))


def _flat(values: Tensor, real: Tensor | None) -> Tensor:
    """Return ``(tokens, ...)`` of the real tokens."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if real is None else flat[real.reshape(-1)]
