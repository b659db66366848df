"""Jobs of the training engine on digits, for studies of what acts on training itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorry
from lorry.claims import digits
from lorry.claims.tensor_task import TensorClasses
from lorry.claims.verdicts import Rows, widened
from lorry.core.life.adapter import Adapter
from lorry.training.fleet import train
from lorry.training.jobs import Job
from lorry.training.report import read_metrics

#: What is looked at once a job is done: its network, with its adapter active, and its course -> metrics.
Look = Callable[[nn.Module, "Fitted"], Mapping[str, float]]


@dataclass(frozen=True)
class Fitted:
    """What a job came to.

    Attributes
    ----------
    adapter
        On the network; as far as it came if the job diverged.
    ended
        Whether it came to its end.
    course
        What the engine wrote of each step and each evaluation.
    """

    adapter: Adapter
    ended: bool
    course: list[dict[str, Any]]


def records(split: digits.Split) -> list[dict[str, Any]]:
    """Rows as a job takes them."""
    return [{"x": x, "label": int(y)} for x, y in zip(split.x, split.y, strict=True)]


def fit(network: nn.Module, jobs: Sequence[Mapping[str, Any]], looks: Sequence[Look]) -> list[Mapping[str, float]]:
    """Train adapters on the hidden layers of a perceptron side by side.

    Parameters
    ----------
    network
        A base of its own for each call; the adapters stay on it.
    jobs
        Options of each job, beside name and objective; gradients are not clipped unless these say so.
    looks
        What is looked at, for each job.

    Returns
    -------
    list
        What each look gave.
    """
    plain = {"targets": ["0", "2"], "batch_size": digits.ROWS, "max_grad_norm": None}
    made = [Job(name=f"job-{i}", objective=TensorClasses(), **{**plain, **one}) for i, one in enumerate(jobs)]
    with tempfile.TemporaryDirectory() as folder:
        result = train(network, None, made, folder, progress=False)
        courses = [read_metrics(Path(folder) / job.name / "metrics.jsonl") for job in made]
    network.eval()
    found = []
    for job, course, look in zip(made, courses, looks, strict=True):
        lorry.activate(network, job.name)
        ended = not result[job.name]["status"].startswith("failed")
        found.append(look(network, Fitted(result.adapters[job.name], ended, course)))
    return found


def grid(
    contenders: Mapping[str, Mapping[str, Any]],
    rates: Sequence[float],
    seeds: Sequence[int],
    look: Look,
    new_base: Callable[[int], nn.Module] = digits.base,
) -> dict[str, dict[float, Rows]]:
    """Try contenders at all rates, those of a seed side by side; grids are widened as `widened` does.

    Parameters
    ----------
    contenders
        Name -> options of its job, but for rate and seed.
    rates
        Ascending.
    seeds
        Of network, adapter and data order.
    look
        Returns ``validation`` and other metrics.
    new_base
        Gives the network of a seed.

    Returns
    -------
    dict
        Contender -> rate -> metrics of each seed.
    """
    cells = [(name, rate) for name in contenders for rate in rates]
    found: dict[tuple[str, float], list[Mapping[str, float]]] = {cell: [] for cell in cells}

    def add(new: Sequence[tuple[str, float]]) -> None:
        for seed in seeds:
            jobs = [{**contenders[name], "learning_rate": rate, "seed": seed} for name, rate in new]
            for cell, metrics in zip(new, fit(new_base(seed), jobs, [look] * len(new)), strict=True):
                found.setdefault(cell, []).append(metrics)

    def rows(name: str, rate: float) -> Rows:
        if (name, rate) not in found:
            add([(name, rate)])
        return found[name, rate]

    add(cells)
    return {name: widened(partial(rows, name), rates) for name in contenders}


def scores(tried: digits.Task) -> Look:
    """Look at validation and test accuracy; 0 for a job that diverged."""

    def look(network: nn.Module, fitted: Fitted) -> Mapping[str, float]:
        return digits.scores(network, tried) if fitted.ended else {"validation": 0.0, "test": 0.0}

    return look


def loss(network: nn.Module, data: digits.Split) -> float:
    """Mean cross-entropy, with whatever adapters are active."""
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(data.x), data.y))
