"""The training loop of the studies that need less than the fleet engine: a loss by step, Adam, a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import finish_step

#: The loss of a step, numbered from 0; it draws its own rows.
Loss = Callable[[int], Tensor]


def train(
    parameters: Iterable[nn.Parameter | Tensor],
    loss: Loss,
    steps: int,
    rate: float,
    *,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    after: Callable[[int, Any], None] = lambda step, entered: None,
) -> list[float]:
    """Train parameters by Adam, with a cosine from the rate to nothing.

    Parameters
    ----------
    parameters
        What is trained.
    loss
        Of each step.
    steps
        How many.
    rate
        At the start.
    inside
        Context of each step's forward and backward pass.
    after
        Called between the optimizer's step and the next one, with the step and what `inside` gave.

    Returns
    -------
    list
        The loss at each step.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate)
    course = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        with inside() as entered:
            value = loss(step)
            value.backward()
            optimizer.step()
            after(step, entered)
        course.append(value.item())
    return course


def train_adapter(
    model: nn.Module, adapter: Adapter, loss: Loss, steps: int, rate: float, recording: bool = False
) -> list[float]:
    """Train an attached adapter: auxiliary losses and the updates outside the gradient of its method are included.

    Parameters
    ----------
    model
        Carries the adapter, which is active.
    adapter
        What is trained.
    loss
        The loss of the data at each step.
    steps
        How many.
    rate
        At the start; a cosine takes it to nothing.
    recording
        Let routed layers keep their statistics in the context.
    """

    def whole(step: int) -> Tensor:
        value, more = loss(step), lorry.auxiliary_loss(model, adapter.name)
        return value if more is None else value + more

    def after(step: int, context: Any) -> None:
        records: dict[str, dict[str, Tensor]] = {}
        for (owner, path, name), value in context.records.items():
            if owner == adapter.name:
                records.setdefault(path, {})[name] = value
        finish_step(adapter, step + 1, steps, records)

    model.train()
    try:
        return train(
            adapter.parameters(),
            whole,
            steps,
            rate,
            inside=lambda: lorry.context(model, recording=recording),
            after=after,
        )
    finally:
        model.eval()
