"""LoRA-GA: starting along the gradient, at equal rates and at the best ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Rows, Trial, chosen, compare, together
from lorry.methods.lora import LoRA
from lorry.training.starts.lora_ga import LoRAGA

from . import _digit_jobs as jobs

RANK, ALPHA, GAMMA = 4, 16.0, 16.0
STEPS, EARLY = 150, 30
#: Steps over which a training loss is averaged.
WINDOW = 5
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: Small and medium rates, at which it is to be ahead.
SMALL = RATES[:2]

STABLE = LoRA(rank=RANK, alpha=ALPHA, rank_stabilized=True)
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": LoRA(rank=RANK, alpha=ALPHA)},
    "rsLoRA": {"method": STABLE},
    "LoRA-GA": {"method": STABLE, "start": LoRAGA(stable_gamma=GAMMA, iterations=0)},
}
OTHERS = ("LoRA", "rsLoRA")
TRIAL = (
    "A perceptron 64 - 128 - 128 - 10 trained on digits, a network for each seed; adapters of rank 4 and alpha 16 on "
    "the first two layers learn turned digits whose labels are moved by one, by Adam at one rate, in "
    f"{STEPS} steps of {digits.ROWS} rows in the same order; rates {', '.join(f'{rate:g}' for rate in RATES)}. "
    f"LoRA-GA has rsLoRA's scale, a gamma of {GAMMA:g}, and the gradient of 8 batches. Losses are those of training, "
    f"mean of {WINDOW} steps. "
)


def _look(tried: digits.Task) -> jobs.Look:
    seen = jobs.scores(tried)

    def look(network: nn.Module, fitted: jobs.Fitted) -> dict[str, float]:
        losses = [row["loss"] for row in fitted.course if "loss" in row]
        return {**seen(network, fitted), **{f"step {i + 1}": value for i, value in enumerate(smooth(losses))}}

    return look


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the last `WINDOW` losses at each step, of fewer at the start."""
    return [statistics.fmean(losses[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(losses))]


@cache
def _grids(setting: Setting) -> dict[str, dict[float, Rows]]:
    """Both claims look at the same runs: contender -> rate -> metrics of each seed."""
    tried = digits.task("rotate", relabel=1)
    rest = {"data": jobs.records(tried.train), "steps": setting.much(STEPS, EARLY), "optimizer": "adam"}
    contenders = {name: {**rest, **own} for name, own in CONTENDERS.items()}
    return jobs.grid(contenders, RATES, setting.seeds, _look(tried))


def _losses(name: str, rate: float, step: int, setting: Setting) -> list[float]:
    return [row[f"step {step}"] for row in _grids(setting)[name][rate]]


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


@claim(
    "lora-ga",
    "early",
    says="The first steps follow those of full fine-tuning, so that the loss falls faster than LoRA's.",
    source="arXiv 2407.05000, abstract and figure of the training loss",
    trial=f"{TRIAL}Statements: at the rates {SMALL[0]:g} and {SMALL[1]:g} the loss after {EARLY} steps is below "
    "LoRA's, and below rsLoRA's. Higher rates, where LoRA catches up, are reported.",
)
def early(setting: Setting) -> Finding:
    """Compare losses at equal rates."""
    steps = setting.much(STEPS, EARLY)
    verdicts = [
        compare(_differences(_losses(other, rate, EARLY, setting), _losses("LoRA-GA", rate, EARLY, setting)))
        for rate in SMALL
        for other in OTHERS
    ]
    panels = [
        Panel(
            f"loss after {step} steps",
            "training loss",
            {name: [_losses(name, rate, step, setting) for rate in RATES] for name in CONTENDERS},
            RATES,
            "rate",
            log_x=True,
            log_y=True,
        )
        for step in dict.fromkeys((EARLY, steps))
    ]
    said = "; ".join(
        f"rate {rate:g}: "
        + ", ".join(f"{name} {statistics.fmean(_losses(name, rate, EARLY, setting)):.3g}" for name in CONTENDERS)
        for rate in RATES
    )
    return Finding(together(verdicts), f"Loss after {EARLY} steps, {said}.", panels)


def reached(trial: Trial, name: str, goals: Sequence[float], steps: int) -> list[float]:
    """The first step at which a contender's loss is at or below a goal, by seed; the number of steps if none is."""
    courses = [[trial.metrics[name][f"step {i + 1}"][seed] for i in range(steps)] for seed in range(len(goals))]
    return [
        float(next((i + 1 for i, value in enumerate(course) if value <= goal), steps))
        for course, goal in zip(courses, goals, strict=True)
    ]


@claim(
    "lora-ga",
    "tuned",
    says="It converges two to four times as fast as LoRA, and ends better (T5-base on a part of GLUE: by 5.69 points).",
    source="arXiv 2407.05000, abstract; later studies find the gap to shrink once rates are tuned",
    trial=f"{TRIAL}Each contender at its own best rate by validation accuracy, the grid widened where that is at an "
    "end. Statements: test accuracy above LoRA's, and above rsLoRA's; LoRA's last loss is reached in at most half of "
    "the steps.",
)
def tuned(setting: Setting) -> Finding:
    """Compare at the best rates."""
    trial, steps = chosen(_grids(setting)), setting.much(STEPS, EARLY)
    goals = trial.metrics["LoRA"][f"step {steps}"]
    needed = {name: reached(trial, name, goals, steps) for name in CONTENDERS}
    verdicts = [compare(trial.gain("LoRA-GA", other)) for other in OTHERS]
    verdicts.append(compare([steps / 2 + 0.5 - count for count in needed["LoRA-GA"]]))
    accuracies = ", ".join(f"{name} {trial.mean(name):.3f}" for name in CONTENDERS)
    counts = ", ".join(f"{name} {statistics.fmean(values):.0f}" for name, values in needed.items())
    every = [i + 1 for i in range(steps) if (i + 1) % 10 == 0]
    courses = {name: [trial.metrics[name][f"step {step}"] for step in every] for name in CONTENDERS}
    return Finding(
        verdict=together(verdicts),
        summary=f"Test accuracy: {accuracies}. Steps to LoRA's last loss, of {steps}: {counts}.",
        panels=[
            Panel("at the best rate", "test accuracy", trial.of()),
            Panel("training at the best rate", "training loss", courses, every, "step", log_y=True),
        ],
        rates=trial.rates,
        notes=trial.notes,
    )
