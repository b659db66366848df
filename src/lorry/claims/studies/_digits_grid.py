"""What several studies do alike: tune methods on shifted digits, each task with rates of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lorry.claims import digits
from lorry.claims.ledger import Panel, Setting
from lorry.claims.verdicts import Run, Trial, tune


def tuned(
    contenders: Mapping[str, Any],
    tasks: Sequence[str],
    rates: Sequence[float],
    setting: Setting,
    steps: int,
    new_base: Callable[[int], nn.Sequential],
    targets: Sequence[str],
) -> dict[str, Trial]:
    """Tune every contender on every task.

    Parameters
    ----------
    contenders
        Name -> method.
    tasks
        Keys of `digits.CHANGES`.
    rates
        The grid of all, ascending.
    setting
        Seeds and effort.
    steps
        Of a run, at full effort.
    new_base
        Gives the trained network of a seed.
    targets
        The sites of the adapters.

    Returns
    -------
    dict
        Task -> what the contenders reached: ``validation``, ``test`` and ``parameters``.
    """

    def running(method: Any, tried: digits.Task) -> Run:
        def run(rate: float, seed: int) -> Mapping[str, float]:
            network = new_base(seed)
            adapter = digits.adapt(network, method, tried.train, setting.much(steps, 2), rate, seed, list(targets))
            return {**digits.scores(network, tried), "parameters": adapter.count()}

        return run

    found = {}
    for name in tasks:
        tried = digits.task(name)
        found[name] = tune({who: running(method, tried) for who, method in contenders.items()}, rates, setting.seeds)
    return found


def average(trials: Mapping[str, Trial], contender: str) -> float:
    """The test accuracy of a contender, mean over tasks and seeds."""
    return statistics.fmean(trial.mean(contender) for trial in trials.values())


def gain(trials: Mapping[str, Trial], contender: str, over: str) -> list[float]:
    """The gain in test accuracy, mean over the tasks, seed by seed."""
    by_task = [trial.gain(contender, over) for trial in trials.values()]
    return [statistics.fmean(pair) for pair in zip(*by_task, strict=True)]


def panels(trials: Mapping[str, Trial], contenders: Sequence[str]) -> list[Panel]:
    """One panel for each task."""
    return [
        Panel(task, "test accuracy", {name: trial.of()[name] for name in contenders}) for task, trial in trials.items()
    ]


def rates_of(trials: Mapping[str, Trial], contenders: Sequence[str]) -> dict[str, float]:
    """The rates that were chosen."""
    return {f"{name}, {task}": trial.rates[name] for task, trial in trials.items() for name in contenders}


def notes_of(trials: Mapping[str, Trial], contenders: Sequence[str]) -> list[str]:
    """Numbers of parameters, and rates at the edge of the grid."""
    first = next(iter(trials.values()))
    counts = ", ".join(f"{name} {first.mean(name, 'parameters'):,.0f}" for name in contenders)
    edges = [
        f"{task}: {note}"
        for task, trial in trials.items()
        for note in trial.notes
        if any(note.startswith(f"The best rate of {name}, {trial.rates[name]:g}, ") for name in contenders)
    ]
    return [f"Parameters: {counts}.", *edges]
