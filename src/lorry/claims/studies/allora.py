"""ALLoRA: gains that fall as rows grow, in short training by gradient descent; and what dropout does there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Rows, Trial, chosen, compare, together
from lorry.methods.dora import DoRA
from lorry.methods.lora import LoRA
from lorry.training.dynamics.allora import ALLoRA

from . import _digit_jobs as jobs

RANK = 8
STEPS = 100
RATES = (1e-2, 3e-2, 1e-1, 2e-1, 3e-1, 5e-1)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: Of the wide grid, what counts as usable: this share of the contender's best mean accuracy.
USABLE = 0.9

PLAIN: dict[str, Any] = {"method": LoRA(rank=RANK), "optimizer": "sgd"}
#: Name -> options of a job.
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": PLAIN,
    "LoRA, dropout 0.05": {**PLAIN, "method": LoRA(rank=RANK, dropout=0.05)},
    "DoRA": {**PLAIN, "method": DoRA(rank=RANK)},
    **{f"ALLoRA, eta2 {eta2}": {**PLAIN, "dynamics": ALLoRA(eta2=eta2)} for eta2 in (1, 4, 16)},
    "gain by matrix": {**PLAIN, "dynamics": ALLoRA(eta2=4, gain="matrix")},
    "gain by output": {**PLAIN, "dynamics": ALLoRA(eta2=4, gain="output")},
}
WITH_ADAM: dict[str, dict[str, Any]] = {
    "LoRA, Adam": {**PLAIN, "optimizer": "adam"},
    "ALLoRA, Adam": {**PLAIN, "optimizer": "adam", "dynamics": ALLoRA(eta2=4, where="update")},
}
ADAPTIVE = "ALLoRA, eta2 4"
SETUP = (
    "A perceptron 64 - 128 - 128 - 10 trained on digits, a network for each seed; adapters of rank 8 and scale 1 on "
    "the first two layers learn turned digits whose labels are moved by one. Plain gradient descent at one rate, "
    "no clipping, rows of 64; "
)
TRIAL = (
    f"{SETUP}{STEPS} steps (about six passes); rates {', '.join(f'{rate:g}' for rate in RATES)}; with Adam "
    f"{', '.join(f'{rate:g}' for rate in ADAM_RATES)}. "
)


def _task() -> digits.Task:
    return digits.task("rotate", relabel=1)


@cache
def _grids(setting: Setting) -> dict[str, dict[float, Rows]]:
    """All claims but that of dropout look at the same runs: contender -> rate -> metrics of each seed."""
    steps, tried = setting.much(STEPS, 2), _task()
    found: dict[str, dict[float, Rows]] = {}
    for contenders, rates in ((CONTENDERS, RATES), (WITH_ADAM, ADAM_RATES)):
        rest = {"data": jobs.records(tried.train), "steps": steps}
        found |= jobs.grid(
            {name: {**own, **rest} for name, own in contenders.items()}, rates, setting.seeds, jobs.scores(tried)
        )
    return found


def _trial(setting: Setting) -> Trial:
    return chosen(_grids(setting))


def _figures(trial: Trial, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {trial.mean(name):.3f}" for name in names)


def _shown(trial: Trial, names: Sequence[str], verdict: str) -> Finding:
    return Finding(
        verdict=verdict,
        summary=f"Test accuracy: {_figures(trial, names)}.",
        panels=[Panel("at the best rate", "test accuracy", {name: trial.of()[name] for name in names})],
        rates={name: trial.rates[name] for name in names},
        notes=_notes(trial, names),
    )


def _notes(trial: Trial, names: Sequence[str]) -> list[str]:
    starts = tuple(f"The best rate of {name}, {trial.rates[name]:g}, " for name in names)
    return [note for note in trial.notes if note.startswith(starts)]


@claim(
    "allora",
    "better",
    says="Better accuracy than LoRA and DoRA in short fine-tuning.",
    source="arXiv 2410.09692, abstract",
    trial=f"{TRIAL}Statements: ALLoRA with eta2 of 4 is above LoRA, above LoRA with the dropout of 0.05 that the paper "
    "compares with, and above DoRA; and with Adam, where the gain is put on the update, above LoRA. Other eta2 are "
    "reported.",
)
def better(setting: Setting) -> Finding:
    """Compare at the best rates."""
    trial = _trial(setting)
    pairs = [(ADAPTIVE, over) for over in ("LoRA", "LoRA, dropout 0.05", "DoRA")] + [("ALLoRA, Adam", "LoRA, Adam")]
    names = [name for name in (*CONTENDERS, *WITH_ADAM) if not name.startswith("gain")]
    return _shown(trial, names, together([compare(trial.gain(*pair)) for pair in pairs]))


@claim(
    "allora",
    "family",
    says="Within a family of gains that depend on weights or outputs, the one by the norms of rows is the best.",
    source="arXiv 2410.09692, abstract; the members of the family from public reviews",
    trial=f"{TRIAL}All with eta2 of 4. Statements: the gain by rows is above that by the norm of the whole update, "
    "above that by each token's output, and above none (LoRA; a constant gain is LoRA at another rate).",
)
def family(setting: Setting) -> Finding:
    """Compare the gains."""
    trial, others = _trial(setting), ["gain by matrix", "gain by output", "LoRA"]
    verdict = together([compare(trial.gain(ADAPTIVE, other)) for other in others])
    return _shown(trial, [ADAPTIVE, *others], verdict)


def usable(by_rate: Mapping[float, Rows], seed: int) -> tuple[float, float]:
    """Return the accuracy at the lowest rate, and the highest rate that keeps `USABLE` of the best accuracy."""
    reached = {rate: rows[seed]["test"] for rate, rows in by_rate.items() if rate in RATES}
    least = USABLE * max(reached.values())
    return reached[RATES[0]], max(rate for rate, value in reached.items() if value >= least)


@claim(
    "allora",
    "rates",
    says="The gain escapes the slow start from zero, and then falls, so that steps stay stable.",
    source="arXiv 2410.09692, abstract: slow start, and the ripple effect of one scale",
    trial=f"{TRIAL}Statements: at the lowest rate ALLoRA with eta2 of 4, whose first step is twice LoRA's, is above "
    "LoRA; with eta2 of 1, whose first step is LoRA's, the highest rate that keeps nine tenths of the best accuracy is "
    "above LoRA's; and ALLoRA with eta2 of 4 is above a LoRA of the same first step, at twice the rate (0.1 and 0.2).",
)
def rates(setting: Setting) -> Finding:
    """Compare the curves over rates."""
    grids = _grids(setting)
    names = ["LoRA", "ALLoRA, eta2 1", ADAPTIVE, "ALLoRA, eta2 16"]
    seeds = range(len(setting.seeds))
    found = {name: [usable(grids[name], seed) for seed in seeds] for name in names}
    faster = [a[0] - b[0] for a, b in zip(found[ADAPTIVE], found["LoRA"], strict=True)]
    wider = [a[1] - b[1] for a, b in zip(found["ALLoRA, eta2 1"], found["LoRA"], strict=True)]
    same = [grids[ADAPTIVE][0.1][seed]["test"] - grids["LoRA"][0.2][seed]["test"] for seed in seeds]
    slow = ", ".join(f"{name} {statistics.fmean(v[0] for v in found[name]):.3f}" for name in names)
    wide = ", ".join(f"{name} {statistics.fmean(v[1] for v in found[name]):.2g}" for name in names)
    curves = {name: [[row["test"] for row in grids[name][rate]] for rate in RATES] for name in names}
    return Finding(
        verdict=together([compare(gains) for gains in (faster, wider, same)]),
        summary=f"Test accuracy at rate {RATES[0]:g}: {slow}. Highest usable rate, mean of the seeds: {wide}. At an "
        f"equal first step ALLoRA with eta2 of 4 gains {statistics.fmean(same):+.3f} over LoRA.",
        panels=[Panel("accuracy over the rate", "test accuracy", curves, RATES, "rate", log_x=True)],
        notes=["Accuracy is counted as 0 where the loss became infinite."],
    )


#: Rows that are trained on, and passes over them.
FEW, PASSES = 256, (2, 50)
DROPOUTS = (0.0, 0.05, 0.3)


@claim(
    "allora",
    "dropout",
    says="Dropout regularises only in the long run; in short fine-tuning it does not, and costs accuracy.",
    source="arXiv 2410.09692, abstract",
    trial=f"{SETUP}{FEW} rows, {PASSES[0]} or {PASSES[1]} passes over them; LoRA with dropout of 0, 0.05 and 0.3, each "
    "with its own rate for each number of passes, 0.1, 0.3 and 1. Statements, for both dropouts: accuracy after 2 "
    "passes is below that without dropout; after 50 passes what dropout gains, or loses, is more favourable than after "
    "2.",
)
def dropout(setting: Setting) -> Finding:
    """Compare dropouts in short and in long training."""
    tried = _task()
    few = jobs.records(digits.Split(tried.train.x[:FEW], tried.train.y[:FEW]))
    trials = {}
    for passes in PASSES:
        steps = setting.much(passes * FEW // digits.ROWS, 2)
        runs = {
            f"dropout {p:g}": {**PLAIN, "method": LoRA(rank=RANK, dropout=p), "data": few, "steps": steps}
            for p in DROPOUTS
        }
        trials[passes] = chosen(jobs.grid(runs, (1e-1, 3e-1, 1.0), setting.seeds, jobs.scores(tried)))
    short, long = (trials[passes] for passes in PASSES)
    verdicts = []
    for name in ("dropout 0.05", "dropout 0.3"):
        lost, later = short.gain("dropout 0", name), long.gain(name, "dropout 0")
        verdicts += [compare(lost), compare([a + b for a, b in zip(later, lost, strict=True)])]
    said = "; ".join(
        f"{passes} passes: " + ", ".join(f"{name} {trial.mean(name):.3f}" for name in trial.metrics)
        for passes, trial in trials.items()
    )
    return Finding(
        verdict=together(verdicts),
        summary=f"Test accuracy, {said}.",
        panels=[Panel(f"{passes} passes", "test accuracy", trial.of()) for passes, trial in trials.items()],
        rates={f"{n}, {passes} passes": rate for passes, trial in trials.items() for n, rate in trial.rates.items()},
        notes=[f"{passes} passes: {note}" for passes, trial in trials.items() for note in trial.notes],
    )
