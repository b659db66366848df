"""Digits: a small network trained on scikit-learn's 8 x 8 digits, and shifted versions of them to adapt to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import calibrate, needs_calibration

from .fitting import Loss, train, train_adapter

WIDTH = 128
#: Rows of a training step.
ROWS = 64

#: What can happen to an image ``(rows, 8, 8)`` with values 0 to 1.
CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda x, g: x,
    "shift": lambda x, g: x.roll(2, -1),
    "rotate": lambda x, g: x.rot90(1, (-2, -1)),
    "flip": lambda x, g: x.flip(-1),
    "invert": lambda x, g: 1 - x,
    "noise": lambda x, g: x + 0.4 * torch.randn(x.shape, generator=g),
    "dim": lambda x, g: 0.3 * x,
}


@dataclass(frozen=True)
class Split:
    """Rows of one part of a task: images ``(rows, 64)`` and labels ``(rows,)``."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """A task with disjoint parts; ``validation`` chooses rates, ``test`` is only looked at."""

    name: str
    train: Split
    validation: Split
    test: Split


def new_network(seed: int = 0, width: int = WIDTH, hidden: int = 2) -> nn.Sequential:
    """A fresh perceptron, 64 - width - ... - width - 10.

    Parameters
    ----------
    seed
        Of the weights.
    width
        Of the hidden layers.
    hidden
        Number of hidden layers; methods that share between layers of one shape want four or more.
    """
    widths = [64, *[width] * hidden, 10]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inner, outer in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@cache
def _images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def task(change: str, seed: int = 0, relabel: int = 0) -> Task:
    """The digits under a change: 1,000 rows to train, 397 to validate, 400 to test, split the same for all tasks.

    Parameters
    ----------
    change
        A key of `CHANGES`.
    seed
        Of what is random in the change.
    relabel
        Added to every label, modulo 10, for tasks in conflict.
    """
    images, labels = _images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    changed = CHANGES[change](images[order], torch.Generator().manual_seed(seed)).flatten(1)
    labels = (labels[order] + relabel) % 10
    ends = (0, 1000, 1397, len(images))
    parts = [Split(changed[a:b], labels[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    return Task(change, *parts)


@cache
def _trained(seed: int, width: int, hidden: int) -> dict[str, Tensor]:
    network, data = new_network(seed, width, hidden), task("clean").train
    train(network.parameters(), loss_of(network, data, seed), steps=600, rate=3e-3)
    return network.state_dict()


def base(seed: int = 0, width: int = WIDTH, hidden: int = 2) -> nn.Sequential:
    """A network trained on the clean digits, a new copy at each call; arguments as for `new_network`."""
    network = new_network(seed, width, hidden)
    network.load_state_dict(_trained(seed, width, hidden))
    return network


def adapt(
    network: nn.Module,
    method: Any,
    data: Split,
    steps: int,
    rate: float,
    seed: int,
    targets: Any = "all-linear",
    name: str = "adapter",
    rows: int = ROWS,
) -> Adapter:
    """Attach an adapter and train it; calibration, auxiliary losses and after-step rules of its method are included."""
    adapter = lorry.attach(network, method, targets=targets, name=name, seed=seed)
    if needs_calibration(adapter):
        batches = [Split(data.x[i : i + rows], data.y[i : i + rows]) for i in range(0, 8 * rows, rows)]
        calibrate(adapter, batches, lambda model, batch: nn.functional.cross_entropy(model(batch.x), batch.y))
    train_adapter(network, adapter, loss_of(network, data, seed, rows), steps, rate)
    return adapter


def loss_of(network: nn.Module, data: Split, seed: int, rows: int = ROWS) -> Loss:
    """The cross-entropy on a fresh draw of rows at each step; the draws depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        picked = torch.randint(len(data.x), (rows,), generator=generator)
        return nn.functional.cross_entropy(network(data.x[picked]), data.y[picked])

    return loss


def accuracy(network: nn.Module, data: Split) -> float:
    """Share of right answers, with whatever adapters are active."""
    with torch.no_grad():
        return float((network(data.x).argmax(-1) == data.y).float().mean())


def scores(network: nn.Module, tried: Task) -> Mapping[str, float]:
    """Validation and test accuracy."""
    return {"validation": accuracy(network, tried.validation), "test": accuracy(network, tried.test)}
