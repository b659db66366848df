"""The losses that clients name, after the public description of the interface (tinker-docs, "Losses").

Each is a sum over the tokens of an example. ``p`` is the log-probability of a target under the model, ``q`` the one
that the sampler gave, ``A`` the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import near_misses
from lorry.serving.training.datum import Datum
from lorry.serving.training.errors import Refused

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes
    ----------
    compute
        ``(p, inputs, config) -> loss``, of one example.
    needs
        The inputs that an example must have, beside ``target_tokens``.
    may
        Those that it may have.
    config
        Numbers that may be given, with their defaults.
    wide
        Whether a position may have several targets.
    """

    compute: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    config: Mapping[str, float] = ()  # type: ignore[assignment]
    wide: bool = False


def _cross_entropy(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    # a target without weight counts nothing, even where its log-probability is minus infinity
    weights = given["weights"].to(p) if "weights" in given else torch.ones_like(p)
    return -(torch.where(weights != 0, p, 0) * weights).sum()


def _importance_sampling(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    return -(torch.exp(p - given["logprobs"].to(p)) * given["advantages"].to(p)).sum()


def _ppo(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    ratio, advantages = torch.exp(p - given["logprobs"].to(p)), given["advantages"].to(p)
    return -torch.minimum(ratio * advantages, _clipped(ratio, given, config) * advantages).sum()


def _cispo(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    ratio = torch.exp(p.detach() - given["logprobs"].to(p))
    return -(_clipped(ratio, given, config) * p * given["advantages"].to(p)).sum()


def _dro(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    apart = p - given["logprobs"].to(p)
    return -(p * given["advantages"].to(p) - 0.5 * config["beta"] * apart.square()).sum()


def _gspo(p: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    advantages = given["advantages"].to(p)
    counted = given["sequence_ratio_mask"] != 0 if "sequence_ratio_mask" in given else advantages != 0
    if not counted.any():
        return p.sum() * 0
    mean = (p.detach() - given["logprobs"].to(p))[counted].mean()
    ratio = torch.exp(mean + p - p.detach())
    return -torch.minimum(ratio * advantages, _clipped(ratio, given, config) * advantages).sum()


def _clipped(ratio: Tensor, given: Inputs, config: Mapping[str, float]) -> Tensor:
    """Return the ratio within the thresholds, which may be those of each token."""
    low, high = (given.get(name, config[name]) for name in _THRESHOLDS)
    low, high = (torch.as_tensor(each).to(ratio) for each in (low, high))
    return torch.minimum(torch.maximum(ratio, low), high)


_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
_CLIP = dict(zip(_THRESHOLDS, (0.8, 1.2), strict=True))
_POLICY = ("logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, (), ("weights",), {}, wide=True),
    "importance_sampling": Loss(_importance_sampling, _POLICY, (), {}),
    "ppo": Loss(_ppo, _POLICY, _THRESHOLDS, _CLIP),
    "cispo": Loss(_cispo, _POLICY, _THRESHOLDS, _CLIP),
    "dro": Loss(_dro, _POLICY, (), {"beta": 0.05}),
    "gspo": Loss(_gspo, _POLICY, ("sequence_ratio_mask", *_THRESHOLDS), _CLIP),
}


def loss_named(name: str, config: Mapping[str, float | str]) -> tuple[Loss, dict[str, float]]:
    """Return a loss, and its numbers with what a client gave; raise `Refused` for what is not known."""
    loss = LOSSES.get(name)
    if loss is None:
        hint = near_misses(name[:100], LOSSES)
        raise Refused(
            f"This server has no loss '{name[:100]}'.{hint} There are {', '.join(LOSSES)}; any other can be given as a "
            "function, with forward_backward_custom."
        )
    numbers = dict(loss.config)
    for key, value in config.items():
        if key not in numbers:
            known = ", ".join(numbers) or "none"
            raise Refused(f"The loss '{name}' has no option '{key[:100]}'. Its options: {known}.")
        if isinstance(value, str) or not math.isfinite(value):
            raise Refused(f"The option '{key}' of the loss '{name}' must be a finite number, found {value!r}.")
        numbers[key] = float(value)
    return loss, numbers


def check_datum(datum: Datum, loss: Loss, name: str, place: int, vocabulary: int, context: int) -> None:
    """Raise `Refused` unless an example is one that a loss can be computed of."""
    what, length = f"Example {place}", len(datum)
    if not 0 < length <= context:
        raise Refused(f"{what} has {length} tokens; expected 1 to {context}.")
    if "target_tokens" not in datum.inputs:
        raise Refused(f"{what} has no 'target_tokens'; give the token that each position predicts.")
    targets = datum.inputs["target_tokens"]
    for ids, label in ((datum.tokens, "the token"), (targets, "the target")):
        if ids.dtype.is_floating_point:
            raise Refused(f"{what}: target_tokens must be whole numbers, found {ids.dtype}.")
        wrong = ids[(ids < 0) | (ids >= vocabulary)]
        if wrong.numel():
            raise Refused(f"{what} has {label} {int(wrong[0])}, but the model knows tokens 0 to {vocabulary - 1}.")
    if targets.ndim > 1 and not loss.wide:
        raise Refused(f"{what} has several targets for a position, which the loss '{name}' cannot use.")
    known = ("target_tokens", *loss.needs, *loss.may)
    for key in loss.needs:
        if key not in datum.inputs:
            raise Refused(f"{what} has no '{key}', which the loss '{name}' needs. It takes {', '.join(known)}.")
    for key, value in datum.inputs.items():
        if key not in known:
            raise Refused(
                f"{what} has '{key[:100]}', which the loss '{name}' does not use. It takes {', '.join(known)}."
            )
        if len(value) != length or value.shape != targets.shape:
            raise Refused(
                f"{what}: '{key}' has the shape {tuple(value.shape)} and target_tokens {tuple(targets.shape)} for "
                f"{length} tokens; give one entry for each token."
            )
        if not bool(torch.isfinite(value).all()):
            raise Refused(f"{what}: '{key}' has values that are not finite.")
