"""MatryoshkaLoRA and DyLoRA: how good are the first r rank units of one adapter, for every r."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import nn

from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Rows, Trial, chosen, compare, together, widened
from lorry.core.life.adapter import Adapter
from lorry.methods.matryoshka import Matryoshka
from lorry.methods.parts.nested import at_rank, aurac

RANKS = (1, 2, 4, 8, 16)
TASKS = ("shift", "rotate")
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
STEPS = 300
TARGETS = ["0", "2"]

#: What is trained: name -> options.
TRAINED: dict[str, dict[str, Any]] = {
    "LoRA, cut": {"mode": "lora"},
    "DyLoRA": {"mode": "dylora"},
    "Matryoshka": {},
    "Matryoshka, 1/sqrt(r)": {"scaling": "sqrt"},
}

TRIAL = (
    "A perceptron 64 - 128 - 128 - 10 trained on digits, a network for each seed; adapters of rank 16 on the first "
    f"two layers, trained for the ranks 1, 2, 4, 8 and 16, on shifted and on rotated digits in {STEPS} steps of "
    f"{digits.ROWS} rows, at the best of the rates {', '.join(f'{rate:g}' for rate in RATES)} by the area on "
    "validation rows. The area under accuracy over log2 of the rank (AURAC) is that of the test rows, mean of "
    "both tasks."
)


def _method(name: str, seed: int) -> Matryoshka:
    return Matryoshka(rank=RANKS[-1], ranks=RANKS, draw_seed=seed, **TRAINED[name])


def _curve(network: nn.Module, adapter: Adapter, rule: str, data: digits.Split) -> list[float]:
    """Accuracy at each rank."""
    found = []
    for rank in RANKS:
        with at_rank(adapter, rank, rule):
            found.append(digits.accuracy(network, data))
    return found


def _row(network: nn.Module, adapter: Adapter, rule: str, tried: digits.Task) -> dict[str, float]:
    test = _curve(network, adapter, rule, tried.test)
    row = {
        "validation": aurac(RANKS, _curve(network, adapter, rule, tried.validation)),
        "test": aurac(RANKS, test),
        "linear": aurac(RANKS, test, "linear"),
    }
    return row | {f"rank {rank}": value for rank, value in zip(RANKS, test, strict=True)}


@cache
def _trials(setting: Setting) -> dict[str, Trial]:
    """Both claims look at the same runs: task -> contenders."""
    found = {}
    for task in TASKS:
        tried = digits.task(task)
        results: dict[str, dict[float, Rows]] = {}
        for name in TRAINED:
            results |= _by_rate(name, tried, setting)
        found[task] = chosen(results)
    return found


def _by_rate(name: str, tried: digits.Task, setting: Setting) -> dict[str, dict[float, Rows]]:
    """Train one contender at every rate and cut it by every rule; for each of them the grid is as wide as it needs."""

    @cache
    def rows(rate: float) -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in setting.seeds:
            network, method = digits.base(seed), _method(name, seed)
            adapter = digits.adapt(network, method, tried.train, setting.much(STEPS, 2), rate, seed, TARGETS)
            for who, rule in _rules(name).items():
                found.setdefault(who, []).append(_row(network, adapter, rule, tried))
        return found

    def cut(who: str, rate: float) -> list[dict[str, float]]:
        return rows(rate)[who]

    return {who: widened(partial(cut, who), RATES) for who in _rules(name)}


def _rules(name: str) -> dict[str, str]:
    """Contender -> how it is cut, for what was trained under a name; rules differ where P is not one scale."""
    if name in ("Matryoshka", "Matryoshka, 1/sqrt(r)"):
        return {name: "P", f"{name}, official cut": "rank"}
    return {name: "rank"}


def _gain(trials: Mapping[str, Trial], contender: str, over: str, metric: str = "test") -> list[float]:
    """Mean over the tasks, seed by seed."""
    by_task = [trial.gain(contender, over, metric) for trial in trials.values()]
    return [statistics.fmean(pair) for pair in zip(*by_task, strict=True)]


def _mean(trials: Mapping[str, Trial], contender: str, metric: str = "test") -> float:
    return statistics.fmean(trial.mean(contender, metric) for trial in trials.values())


def _areas(trials: Mapping[str, Trial], contender: str) -> list[float]:
    """Mean over the tasks, seed by seed."""
    by_task = [trial.metrics[contender]["test"] for trial in trials.values()]
    return [statistics.fmean(values) for values in zip(*by_task, strict=True)]


def _finding(trials: Mapping[str, Trial], shown: Sequence[str], verdict: str, summary: str) -> Finding:
    panels = [
        Panel(
            task,
            "test accuracy",
            {name: [trial.metrics[name][f"rank {rank}"] for rank in RANKS] for name in shown},
            x=RANKS,
            x_name="rank used",
            log_x=True,
        )
        for task, trial in trials.items()
    ]
    panels.append(
        Panel("AURAC over log2, mean of both tasks", "area", {name: [_areas(trials, name)] for name in shown})
    )
    linear = ", ".join(f"{name} {_mean(trials, name, 'linear'):.3f}" for name in shown)
    edges = [
        f"{task}: {note}"
        for task, trial in trials.items()
        for note in trial.notes
        if any(note.startswith(f"The best rate of {name}, {trial.rates[name]:g}, ") for name in shown)
    ]
    return Finding(
        verdict=verdict,
        summary=summary,
        panels=panels,
        rates={f"{name}, {task}": trial.rates[name] for task, trial in trials.items() for name in shown},
        notes=[f"With a linear axis of ranks the areas are: {linear}.", *edges],
    )


@claim(
    "matryoshka-lora",
    "hierarchy",
    says="Training all nested ranks at once gives better accuracy at every rank than rank-adaptive predecessors "
    "(DyLoRA) and than cutting a LoRA.",
    source="arXiv 2605.07850, abstract; no table of scores was at hand",
    trial=f"{TRIAL} Matryoshka is cut with the weights P it was trained with. Statements: its area is above that of "
    "the cut LoRA; above DyLoRA's; and at rank 16 it is above DyLoRA.",
)
def hierarchy(setting: Setting) -> Finding:
    """Compare the curves with those of a cut LoRA and of DyLoRA."""
    trials, shown = _trials(setting), ["LoRA, cut", "DyLoRA", "Matryoshka"]
    statements = [
        _gain(trials, "Matryoshka", "LoRA, cut"),
        _gain(trials, "Matryoshka", "DyLoRA"),
        _gain(trials, "Matryoshka", "DyLoRA", "rank 16"),
    ]
    areas = ", ".join(f"{name} {_mean(trials, name):.3f}" for name in shown)
    full = ", ".join(f"{name} {_mean(trials, name, 'rank 16'):.3f}" for name in shown)
    summary = f"AURAC: {areas}. Accuracy at rank 16: {full}."
    return _finding(trials, shown, together([compare(gains) for gains in statements]), summary)


@claim(
    "matryoshka-lora",
    "official-cut",
    says="An adapter cut by the official rule, which drops the weights P of training and scales by s_r alone, is "
    "accurate at every rank.",
    source="arXiv 2605.07850 and its released code, inference",
    trial=f"{TRIAL} The same adapters, cut by the official rule, for the scales s_r = 1 and 1/sqrt(r). Statement: the "
    "area is, for s_r = 1, above that of the cut LoRA and above DyLoRA's.",
)
def official_cut(setting: Setting) -> Finding:
    """Compare the two rules of cutting."""
    trials = _trials(setting)
    shown = [who for name in TRAINED for who in _rules(name)]
    rule = "Matryoshka, official cut"
    statements = [_gain(trials, rule, "LoRA, cut"), _gain(trials, rule, "DyLoRA")]
    areas = "; ".join(f"{name} {_mean(trials, name):.3f}" for name in shown)
    summary = f"AURAC: {areas}."
    return _finding(trials, shown, together([compare(gains) for gains in statements]), summary)
