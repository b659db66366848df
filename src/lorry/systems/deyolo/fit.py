"""Training a detector, or an adapter on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, nn

from lorry.core.errors import OptionError

from .pairs import Pairs, augmented

#: Norm to which gradients are clipped, and the part of the steps in which the rate rises.
CLIP, WARM = 10.0, 0.1


@dataclass(frozen=True)
class Plan:
    """How a detector is trained.

    Attributes
    ----------
    steps, rate, batch, decay
        Updates, greatest rate, pairs in an update, weight decay.
    flip, light
        See `lorry.systems.deyolo.pairs.augmented`.
    """

    steps: int
    rate: float = 2e-2
    batch: int = 16
    decay: float = 5e-4
    flip: float = 0.5
    light: float = 0.2


def fit(
    model: nn.Module,
    pairs: Pairs,
    plan: Plan,
    seed: int,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train what asks for gradients, by AdamW with a rate that rises and falls along a cosine.

    Where something is frozen, as beside an adapter, normalisations keep their statistics.

    Parameters
    ----------
    model
        A detector.
    pairs
        To learn from.
    plan
        How long and how fast.
    seed
        Of the order of the pairs and of their changes.
    after
        Told each step, from 1, and its loss.

    Returns
    -------
    list
        The loss of each step.

    Raises
    ------
    OptionError
        There are no pairs, nothing to train, or the loss is not finite.
    """
    parameters, steps = _trained(model, len(pairs)), plan.steps
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=plan.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1.0, WARM * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    g = Generator().manual_seed(seed)
    losses: list[float] = []
    order: list[int] = []
    for step in range(steps):
        while len(order) < plan.batch:
            order += torch.randperm(len(pairs), generator=g).tolist()
        which, order = order[: plan.batch], order[plan.batch :]
        given = zip(pairs.inputs(which), pairs.targets(which), strict=True)
        inputs, targets = zip(*(augmented(x, target, g, plan.flip, plan.light) for x, target in given), strict=True)
        loss = torch.stack(list(model(list(inputs), list(targets)).values())).sum()
        if not loss.isfinite():
            raise OptionError(f"The loss of step {step + 1} is not finite. Lower the rate of {plan.rate:g}.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        after(step + 1, losses[-1])
    return losses


def _trained(model: nn.Module, pairs: int) -> list[nn.Parameter]:
    """Put a model into training mode and return what is trained."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not parameters or not pairs:
        raise OptionError(f"There are {len(parameters)} tensors to train on {pairs} pairs; expected some of both.")
    frozen = any(not each.requires_grad for each in model.parameters())
    model.train()
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    return parameters
