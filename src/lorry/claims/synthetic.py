"""Synthetic teachers: a frozen linear layer, an update of it that depends on the input, and adapters that learn it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.core.life.adapter import Adapter

from .fitting import train_adapter

#: Rows of a training step, and of each of the two sets that errors are measured on.
ROWS, HELD = 128, 2000


@dataclass(frozen=True)
class Teacher:
    """What is to be learned: ``y = W x + update(x, group)``.

    Attributes
    ----------
    weight
        Of the frozen layer, ``(out, in)``.
    centres
        Mean input of each group of rows, ``(groups, in)``; rows are a centre plus noise.
    update
        Inputs ``(rows, in)`` and groups ``(rows,)`` to what the layer lacks, ``(rows, out)``.
    noise
        Standard deviation of the inputs around their centre.
    """

    weight: Tensor
    centres: Tensor
    update: Callable[[Tensor, Tensor], Tensor]
    noise: float = 1.0

    def draw(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw inputs ``(rows, in)``, their groups ``(rows,)``, each as likely as the others, and the outputs."""
        groups = torch.randint(len(self.centres), (rows,), generator=generator)
        noise = torch.randn(rows, self.centres.shape[1], generator=generator)
        x = self.centres[groups] + self.noise * noise
        return x, groups, x @ self.weight.T + self.update(x, groups)

    def model(self) -> nn.Sequential:
        """The frozen layer, ready for an adapter."""
        out, inner = self.weight.shape
        layer = nn.Linear(inner, out, bias=False)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
        return nn.Sequential(layer)


def rows_of(*shape: int, generator: Generator) -> Tensor:
    """Random orthonormal rows ``(..., rows, columns)``."""
    *lead, rows, columns = shape
    columns_first: Tensor = torch.linalg.qr(torch.randn(*lead, columns, rows, generator=generator)).Q
    return columns_first.mT.contiguous()


def error(model: nn.Module, teacher: Teacher, seed: int) -> float:
    """Squared error on fresh rows, as a share of the bare layer's."""
    x, _, y = teacher.draw(HELD, Generator().manual_seed(seed))
    with torch.no_grad():
        return float((model(x) - y).square().sum() / (x @ teacher.weight.T - y).square().sum())


def scores(model: nn.Module, teacher: Teacher, seed: int) -> Mapping[str, float]:
    """Errors: ``validation`` with its sign changed, so that more is better, and ``test``."""
    return {"validation": -error(model, teacher, 10_000 + seed), "test": error(model, teacher, 20_000 + seed)}


def fit(method: Any, teacher: Teacher, steps: int, rate: float, seed: int) -> tuple[nn.Module, Adapter]:
    """Train an adapter on fresh rows at each step; the rows depend on the seed alone."""
    model = teacher.model()
    adapter = lorry.attach(model, method, seed=seed)
    generator = Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        x, _, y = teacher.draw(ROWS, generator)
        return nn.functional.mse_loss(model(x), y)

    train_adapter(model, adapter, loss, steps, rate)
    return model, adapter
