"""Merges side by side: equally many tries for every method, judged on all tasks and on mixtures not tuned on."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lorry
from lorry.core.life.adapter import Adapter
from lorry.merging import merge, merge_methods
from lorry.merging.icm import Task

from .fitting import train
from .ledger import Finding, Panel
from .verdicts import compare, together

#: Scores of a set of tasks with whatever is active on the model: names in, task -> share of right answers out.
Scores = Callable[[Sequence[str], bool], Mapping[str, float]]
#: Strengths, as multiples of 1/n.
STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FEW = (1.0, 2.0, 4.0)
#: Scores that differ by less are equal: it is less than one answer of all.
TIE = 1e-3


@dataclass(frozen=True)
class Try:
    """One setting of a merge method: all weights are ``strength / n``."""

    method: str
    strength: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        listed = ", ".join(f"{k} {v}" for k, v in self.options.items())
        return f"strength {self.strength:g}/n" + (f", {listed}" if listed else "")


#: What is tried beside strengths, for methods with an option that matters: two values, with three strengths each.
BESIDE: dict[str, list[dict[str, Any]]] = {
    "do-merging": [{"steps": 0}, {"steps": 50}],
    "icm-fusion": [{"epochs": 60, "hidden": 64, "few_shot_steps": n, "alternatives": False} for n in (0, 10)],
    "linear": [{"form": "average"}, {"form": "square"}],
    "linear-strength": [{"threshold": 1.0}, {"threshold": 0.2}],
    "lora-lego": [{"restarts": 2}, {"restarts": 2, "rank": 12}],
    "norm-consistent": [{"across": "site"}, {"across": "adapter"}],
    "orthogonality-checked": [{"threshold": 0.1}, {"threshold": 0.4}],
}
#: LoraHub searches the strengths itself, by forty losses on support examples.
LORAHUB = [
    Try("lorahub", 1.0, {"form": f, "penalty": p, "evaluations": 40})
    for f in ("square", "delta")
    for p in (0, 0.01, 0.05)
]


def tries() -> dict[str, list[Try]]:
    """Six settings for every merge method."""
    found = {"lorahub": LORAHUB}
    for slug, method in merge_methods().items():
        options = BESIDE.get(slug, [{}])
        if "density" in method.to_dict()["options"]:
            # ties and breadcrumbs are made for keeping little
            gentle = any(word in slug for word in ("dare", "della", "magnitude"))
            options = [{"density": d} for d in ((0.5, 0.9) if gentle else (0.2, 0.6))]
        strengths = STRENGTHS if len(options) == 1 else FEW
        found.setdefault(slug, [Try(slug, s, o) for o, s in itertools.product(options, strengths)])
    return found


@contextmanager
def merged(model: nn.Module, adapters: Mapping[str, Adapter], one: Try, /, **needs: Any) -> Iterator[None]:
    """Merge the adapters, attach the result, and take it off again."""
    weights = {name: one.strength / len(adapters) for name in adapters}
    lorry.activate(model, None)
    result = merge(
        dict(adapters), method=one.method, options=dict(one.options), weights=weights, check_base=False, **needs
    )
    carried = result.attach(model, "merged-trial")
    try:
        yield
    finally:
        carried.detach()
        lorry.activate(model, None)


@dataclass(frozen=True)
class Scene:
    """Trained adapters of several tasks on one model, and how well anything does on them.

    Attributes
    ----------
    model
        Carries the adapters, none of them active.
    adapters
        Task -> its adapter.
    scores
        Tasks, and whether validation is asked for -> share of right answers by task.
    losses
        Task -> loss of the model on a few support examples.
    checkpoints
        Task -> folders of its adapter from the end of its training, the last one being the adapter.
    known, kept
        What ICM-Fusion knows of the tasks, and its trained networks: tries that differ in what follows share them.
    """

    model: nn.Module
    adapters: Mapping[str, Adapter]
    scores: Scores
    losses: Mapping[str, Callable[[nn.Module], Tensor]]
    checkpoints: Mapping[str, Sequence[Path]]
    known: dict[str, Task] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)

    def needs(self, method: str, tasks: Sequence[str]) -> dict[str, Any]:
        """What a method wants to see besides the adapters."""
        if method == "lorahub":
            return {
                "model": self.model,
                "objective": lambda m: float(sum(self.losses[t](m) for t in tasks) / len(tasks)),
            }
        if method == "icm-fusion":
            for task in tasks:
                self.known.setdefault(task, Task(self.checkpoints[task], self.losses[task]))
            return {"model": self.model, "extras": {"tasks": {t: self.known[t] for t in tasks}, "kept": self.kept}}
        return {}

    def judge(self, one: Try, tasks: Sequence[str], validation: bool) -> float:
        """Mean score over the tasks of the merge of their adapters."""
        with merged(self.model, {t: self.adapters[t] for t in tasks}, one, **self.needs(one.method, tasks)):
            return statistics.fmean(self.scores(tasks, validation).values())


def train_together(
    model: nn.Module,
    tasks: Sequence[str],
    method: Any,
    targets: Any,
    loss: Callable[[int, Sequence[str]], Tensor],
    steps: int,
    rate: float,
    seed: int,
    folder: Path,
    kept: int = 5,
) -> tuple[dict[str, Adapter], dict[str, list[Path]]]:
    """Train one adapter for each task, all from one start, in joint passes; every row has its task's adapter.

    Parameters
    ----------
    model
        The frozen base.
    tasks
        Their names.
    method
        Of all adapters.
    targets
        Of all adapters.
    loss
        Step and the adapters' names, one for each task -> sum over the tasks of their losses.
    steps
        Of all adapters.
    rate
        Of all adapters.
    seed
        Of the start, the same for all tasks: merges of factors need it.
    folder
        For checkpoints.
    kept
        Checkpoints of each adapter, from the last tenth of the training.

    Returns
    -------
    tuple
        The adapters, frozen and not active, and the folders of their checkpoints.
    """
    adapters = {t: lorry.attach(model, method, targets=targets, name=t, seed=seed, activate=False) for t in tasks}
    marks = {round(steps * (0.9 + 0.1 * (i + 1) / kept)): i for i in range(kept)}

    def after(step: int, _: Any) -> None:
        if step + 1 in marks:
            for task, adapter in adapters.items():
                adapter.save(folder / task / str(marks[step + 1]))

    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    model.train()
    train(parameters, lambda step: loss(step, list(adapters)), steps, rate, after=after)
    model.eval()
    for adapter in adapters.values():
        adapter.train(False)
    lorry.activate(model, None)
    return adapters, {t: sorted((folder / t).iterdir(), key=lambda path: int(path.name)) for t in tasks}


def contest(
    scenes: Callable[[int], AbstractContextManager[Scene]],
    mixtures: Sequence[Sequence[str]],
    seeds: Sequence[int],
    listed: Mapping[str, Sequence[Try]],
) -> dict[str, Any]:
    """Tune every method on the validation data of the first seed, and try it with all seeds.

    Parameters
    ----------
    scenes
        Seed -> the trained adapters.
    mixtures
        Sets of tasks that no method was tuned on.
    seeds
        At least one.
    listed
        Method -> settings to choose from; the same number for all.

    Returns
    -------
    dict
        ``chosen`` (method -> `Try`), ``all`` and ``unseen`` (contender -> mean test score of each seed).
    """
    best: dict[str, Try] = {}
    everything: dict[str, list[float]] = {}
    unseen: dict[str, list[float]] = {}

    def note(name: str, on_all: float, on_mixtures: float) -> None:
        everything.setdefault(name, []).append(on_all)
        unseen.setdefault(name, []).append(on_mixtures)

    for seed in seeds:
        with scenes(seed) as scene:
            tasks = list(scene.adapters)
            if not best:
                for slug, settings in listed.items():
                    best[slug] = max(settings, key=lambda one: scene.judge(one, tasks, True))
            base = scene.scores(tasks, False)
            own = {}
            for task in tasks:
                lorry.activate(scene.model, task)
                own[task] = scene.scores([task], False)[task]
                lorry.activate(scene.model, None)
            for name, scores in (("base", base), ("own adapter", own)):
                of_mixtures = statistics.fmean(statistics.fmean(scores[t] for t in m) for m in mixtures)
                note(name, statistics.fmean(scores.values()), of_mixtures)
            for slug, one in best.items():
                on_mixtures = statistics.fmean(scene.judge(one, mixture, False) for mixture in mixtures)
                note(slug, scene.judge(one, tasks, False), on_mixtures)
    return {"chosen": best, "all": everything, "unseen": unseen}


def finding(result: Mapping[str, Any], unit: str, notes: Sequence[str]) -> Finding:
    """Say which methods beat tuned task arithmetic, on every seed or on average, and which do not."""
    everything, plain = result["all"], "task-arithmetic"
    verdicts, mixed = _verdicts(everything), _verdicts(result["unseen"])
    groups = {
        v: sorted(n for n in verdicts if verdicts[n] == v) for v in ("reproduced", "on average", "not reproduced")
    }
    on_mixtures = sorted(
        (n for n in mixed if mixed[n] == "reproduced"), key=lambda name: -statistics.fmean(result["unseen"][name])
    )
    means = {name: statistics.fmean(values) for name, values in everything.items()}
    ranked = sorted(means, key=lambda name: -means[name])
    summary = (
        f"Mean over tasks: base {means['base']:.3f}, own adapters {means['own adapter']:.3f}, tuned task arithmetic "
        f"{means[plain]:.3f}. Better on every seed: {_listed(groups['reproduced'])}. Better on average only: "
        f"{_listed(groups['on average'])}. The other {len(groups['not reproduced'])} of {len(verdicts)} are not "
        f"better. On the mixtures, where a strength tuned for all tasks is kept, task arithmetic has "
        f"{statistics.fmean(result['unseen'][plain]):.3f}, and better on every seed are {_scored(on_mixtures, result)}."
    )
    settings = "Chosen settings: " + "; ".join(f"{slug}: {one}" for slug, one in result["chosen"].items()) + "."
    panels = [
        Panel(title, unit, {name: [result[key][name]] for name in ranked})
        for title, key in (("all tasks merged", "all"), ("mixtures that nothing was tuned on", "unseen"))
    ]
    searched = (
        "LoraHub searches its weights anew for each mixture, on support examples of its tasks; no other method does."
    )
    return Finding(together(list(verdicts.values())), summary, panels, {}, [*notes, searched, settings])


def _verdicts(scores: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Judge every method against task arithmetic, seed by seed; `cat` is task arithmetic in other words."""
    plain = scores["task-arithmetic"]
    return {
        name: compare([a - b for a, b in zip(values, plain, strict=True)], margin=TIE)
        for name, values in scores.items()
        if name not in ("task-arithmetic", "base", "own adapter", "cat")
    }


def _scored(names: Sequence[str], result: Mapping[str, Any], most: int = 6) -> str:
    """Name the best few with their scores on the mixtures."""
    listed = ", ".join(f"{name} ({statistics.fmean(result['unseen'][name]):.3f})" for name in names[:most])
    return (listed or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
