"""What the studies of merging share: adapters of four views of the digits, and their merges at every strength."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

import lorry
from lorry.core.life.adapter import Adapter
from lorry.merging import MergedAdapter, merge

from ..digits import Task, accuracy, adapt, base, task
from ..ledger import Panel
from ..verdicts import Trial, chosen

#: Views of the digits that a rank-4 adapter can learn: a mirrored, a turned and a moved image, and one with noise.
VIEWS = ("flip", "noise", "rotate", "shift")
STEPS, RATE = 600, 3e-3
#: Strengths that every contender is tried with: the sum of the weights, 1 for an average and 4 for a sum of four.
STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
#: For the text of a trial.
SETUP = (
    "A 64-128-128-10 perceptron trained on 8 x 8 digits and frozen; one rank-4 LoRA on all layers for each of four "
    "views of the digits (flip, noise, rotate, shift), all from one A, 600 Adam steps of 64 rows at rate 3e-3 with a "
    "cosine. "
)
FAIR = (
    "Every contender at its own best strength (sum of the weights) out of 12 from 0.1 to 6, chosen by the mean "
    "validation accuracy over the views; the test rows only report. "
)
#: Strength -> metrics.
Course = dict[float, dict[str, float]]
#: A merge method and its options.
Way = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pool:
    """Adapters on the frozen network that they were trained on, none of them active.

    Attributes
    ----------
    network
        Carries them.
    tasks
        By name.
    adapters
        By the name of their task.
    seed
        Of everything.
    """

    network: nn.Module
    tasks: Mapping[str, Task]
    adapters: Mapping[str, Adapter]
    seed: int

    def part(self, names: Sequence[str]) -> Pool:
        """The same network with some of the tasks."""
        return Pool(self.network, {n: self.tasks[n] for n in names}, {n: self.adapters[n] for n in names}, self.seed)


def trained(
    seed: int,
    steps: int,
    rates: Mapping[str, float] | float = RATE,
    views: Sequence[str] = VIEWS,
    rank: int = 4,
) -> Pool:
    """Train one adapter for each view, each on rows drawn in the same order.

    Parameters
    ----------
    seed
        Of base, noise, start and order of the rows.
    steps
        Of each adapter.
    rates
        One for all, or one for each view.
    views
        Keys of `digits.CHANGES`.
    rank
        Of the adapters.
    """
    network, tasks, adapters = base(seed), {view: task(view, seed) for view in views}, {}
    for view, one in tasks.items():
        rate = rates[view] if isinstance(rates, Mapping) else rates
        method = {"method": "lora", "rank": rank}
        adapters[view] = adapt(network, method, one.train, steps, rate, seed, name=view).train(False)
        lorry.activate(network, None)
    return Pool(network, tasks, adapters, seed)


def measured(pool: Pool) -> dict[str, float]:
    """Accuracy with whatever is active: means over the tasks, and the test accuracy of each."""
    tests = {name: accuracy(pool.network, one.test) for name, one in pool.tasks.items()}
    return {
        "validation": statistics.fmean(accuracy(pool.network, one.validation) for one in pool.tasks.values()),
        "test": statistics.fmean(tests.values()),
        **{f"test {name}": value for name, value in tests.items()},
    }


def bare(pool: Pool) -> dict[str, float]:
    """Accuracy of the base."""
    lorry.activate(pool.network, None)
    return measured(pool)


def own(pool: Pool) -> float:
    """Mean test accuracy of each adapter on its own task: what a merge without loss would reach."""
    found = []
    for name, adapter in pool.adapters.items():
        lorry.activate(pool.network, adapter.name)
        found.append(accuracy(pool.network, pool.tasks[name].test))
    lorry.activate(pool.network, None)
    return statistics.fmean(found)


@contextmanager
def carried(pool: Pool, merged: MergedAdapter) -> Iterator[Callable[[float], object]]:
    """Let the network carry a merge; gives a function that activates it at a strength."""
    adapter = merged.attach(pool.network, "merged", activate=False)
    try:
        yield lambda strength: lorry.activate(pool.network, {"merged": strength})
    finally:
        adapter.detach()
        lorry.activate(pool.network, None)


def course(pool: Pool, merged: MergedAdapter) -> Course:
    """Measure a merge of weights 1/n at every strength; all methods used here are linear in it."""
    with carried(pool, merged) as at:
        found = {}
        for strength in STRENGTHS:
            at(strength)
            found[strength] = measured(pool)
    return found


def merged_by(pool: Pool, way: Way) -> MergedAdapter:
    """Merge the adapters of a pool with weights 1/n."""
    method, options = way
    return merge(dict(pool.adapters), method=method, options=options)


def courses(pools: Sequence[Pool], ways: Mapping[str, Way]) -> dict[str, list[Course]]:
    """Measure every way at every strength on every pool."""
    return {name: [course(pool, merged_by(pool, way)) for pool in pools] for name, way in ways.items()}


def best(found: Mapping[str, Sequence[Course]]) -> Trial:
    """Keep each contender's best strength by mean validation accuracy."""
    by_strength = {
        name: {s: [one[s] for one in own_courses] for s in own_courses[0]} for name, own_courses in found.items()
    }
    return chosen(by_strength)


def at(found: Mapping[str, Sequence[Course]], strength: float, metric: str = "test") -> dict[str, list[float]]:
    """A metric of every contender at one strength, by seed."""
    return {name: [one[strength][metric] for one in own_courses] for name, own_courses in found.items()}


def along(title: str, found: Mapping[str, Sequence[Course]]) -> Panel:
    """Test accuracy of every contender along the strengths."""
    series = {name: [[one[s]["test"] for one in rows] for s in rows[0]] for name, rows in found.items()}
    return Panel(title, "mean test accuracy over the views", series, STRENGTHS, "strength (sum of weights)", log_x=True)


def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Differences seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def strengths_note(trial: Trial) -> list[str]:
    """What was chosen for each contender, and who chose an end of the grid."""
    picked = ", ".join(f"{name} {value:g}" for name, value in trial.rates.items())
    return [f"Strengths chosen: {picked}.", *(note.replace("rate", "strength") for note in trial.notes)]


def listed(trial: Trial, metric: str = "test") -> str:
    """All contenders with their mean, the best first."""
    means = sorted(((trial.mean(name, metric), name) for name in trial.metrics), reverse=True)
    return ", ".join(f"{name} {value:.3f}" for value, name in means)
