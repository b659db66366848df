"""LoRA-GGPO: noise on the weight while training on few rows with wrong labels, over ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorry
from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Trial, chosen, compare, together
from lorry.core.life.adapter import Adapter
from lorry.methods.lora import LoRA
from lorry.training.dynamics.lora_ggpo import LoRAGGPO

from . import _digit_jobs as jobs

RANKS = (2, 8, 32, 64)
#: Ranks at which the minimum is to be flatter, and the test loss lower.
HIGH = RANKS[1:]
RATES = (1e-3, 3e-3, 1e-2)
ROWS, WRONG, BATCH = 120, 0.2, 32
STEPS, LOOKS = 240, 12
SIGMA, BETA = 0.3, 1.0
#: Of the noise in which sharpness is measured: its norm by that of each row, and draws.
SHAKEN, DRAWS = 0.2, 20

CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "Flat-LoRA": {"dynamics": LoRAGGPO(sigma=SIGMA, beta=0.0)},
    "GGPO": {"dynamics": LoRAGGPO(sigma=SIGMA, beta=BETA)},
}
SOURCE = "arXiv 2502.14538 v1, abstract"
TRIAL = (
    "A perceptron 64 - 128 - 128 - 10 trained on digits, a network for each seed; adapters of scale 1 on the first two "
    f"layers learn turned digits from {ROWS} rows, a fifth of them with wrong labels, in {STEPS} steps of {BATCH} rows "
    f"by Adam at one rate. Ranks {', '.join(map(str, RANKS))}; at each rank each contender has its own rate, by the "
    f"loss on 397 validation rows with right labels, from {', '.join(f'{rate:g}' for rate in RATES)}. GGPO with sigma "
    f"{SIGMA:g} and beta {BETA:g}; with beta 0 it is Flat-LoRA, which is reported. "
)


def noisy_rows(seed: int, rows: int = ROWS) -> digits.Split:
    """The rows that are trained on, of which a share `WRONG` have another label than theirs."""
    generator = torch.Generator().manual_seed(seed)
    train = digits.task("rotate").train
    picked = torch.randperm(len(train.y), generator=generator)[:rows]
    labels = train.y[picked].clone()
    wrong = torch.randperm(rows, generator=generator)[: round(WRONG * rows)]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return digits.Split(train.x[picked], labels)


def sharpness(network: nn.Module, adapter: Adapter, data: digits.Split) -> float:
    """Mean rise of the loss under noise on the adapted weights, each row's relative to its norm.

    Parameters
    ----------
    network
        With the adapter attached, not active.
    adapter
        Whose update is part of the weights.
    data
        Whose loss.
    """
    weights = {f"{site.path}.weight": site.matrix().detach() + delta for site, delta in adapter.deltas()}
    generator = torch.Generator().manual_seed(0)

    def shaken(weight: Tensor) -> Tensor:
        drawn = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        return weight + SHAKEN * weight.norm(dim=1, keepdim=True) * drawn

    def at(moved: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(functional_call(network, moved, (data.x,)), data.y))

    rises = [at({name: shaken(weight) for name, weight in weights.items()}) for _ in range(DRAWS)]
    return statistics.fmean(rises) - at(weights)


def bump(losses: Sequence[float]) -> float:
    """How far a course rises above the least that it had come to, at most."""
    least, most = losses[0], 0.0
    for value in losses:
        least = min(least, value)
        most = max(most, value - least)
    return most


def _look(network: nn.Module, fitted: jobs.Fitted, rows: digits.Split) -> dict[str, float]:
    """Losses, accuracy, sharpness, and the course of the test loss."""
    tried = digits.task("rotate")
    course = [row["eval_loss"] for row in fitted.course if "eval_loss" in row] if fitted.ended else [math.inf]
    found = {
        "validation": -jobs.loss(network, tried.validation) if fitted.ended else -math.inf,
        "test": course[-1],
        "accuracy": digits.accuracy(network, tried.test),
        "train": jobs.loss(network, rows),
        "bump": bump(course),
        **{f"course {i}": value for i, value in enumerate(course)},
    }
    lorry.activate(network, None)
    return {**found, "sharpness": sharpness(network, fitted.adapter, rows)}


@cache
def _trials(setting: Setting) -> dict[int, Trial]:
    """All claims look at the same runs: rank -> contenders."""
    rows, held = noisy_rows(0), jobs.records(digits.task("rotate").test)
    steps = setting.much(STEPS, LOOKS)
    rest = {"data": jobs.records(rows), "batch_size": BATCH, "steps": steps, "optimizer": "adam"}
    rest |= {"eval_data": held, "eval_every": steps // LOOKS, "eval_batch_size": len(held)}
    found = {}
    for rank in RANKS:
        contenders = {name: {**rest, **own, "method": LoRA(rank=rank)} for name, own in CONTENDERS.items()}
        found[rank] = chosen(jobs.grid(contenders, RATES, setting.seeds, partial(_look, rows=rows)))
    return found


def _curves(trials: Mapping[int, Trial], metric: str) -> dict[str, list[list[float]]]:
    """Contender -> for each rank the values of the seeds."""
    return {name: [trial.metrics[name][metric] for trial in trials.values()] for name in CONTENDERS}


def _panel(trials: Mapping[int, Trial], title: str, unit: str, metric: str) -> Panel:
    return Panel(title, unit, _curves(trials, metric), RANKS, "rank", log_x=True)


def _finding(trials: Mapping[int, Trial], verdicts: Sequence[str], summary: str, panels: Sequence[Panel]) -> Finding:
    return Finding(
        verdict=together(verdicts),
        summary=summary,
        panels=panels,
        rates={f"{name}, rank {rank}": rate for rank, trial in trials.items() for name, rate in trial.rates.items()},
        notes=[f"Rank {rank}: {note}" for rank, trial in trials.items() for note in trial.notes],
    )


def _said(trials: Mapping[int, Trial], metric: str) -> str:
    return "; ".join(
        f"rank {rank}: " + ", ".join(f"{name} {trial.mean(name, metric):.3g}" for name in CONTENDERS)
        for rank, trial in trials.items()
    )


@claim(
    "lora-ggpo",
    "flatter",
    says="Training under noise by the norms of weights and gradients ends in flatter minima than LoRA.",
    source=SOURCE,
    trial=f"{TRIAL}Sharpness is the mean rise of the training loss under noise of {SHAKEN:g} of each row's norm, "
    f"{DRAWS} draws. Statements, for each rank from {HIGH[0]}: that of GGPO is below that of LoRA.",
)
def flatter(setting: Setting) -> Finding:
    """Compare the rise of the loss around what was found."""
    trials = _trials(setting)
    verdicts = [compare(trials[rank].gain("LoRA", "GGPO", "sharpness")) for rank in HIGH]
    panels = [
        _panel(trials, "rise of the training loss under noise", "loss", "sharpness"),
        _panel(trials, "training loss", "loss", "train"),
    ]
    return _finding(trials, verdicts, f"Sharpness, {_said(trials, 'sharpness')}.", panels)


@claim(
    "lora-ggpo",
    "generalises",
    says="It generalises better than LoRA.",
    source=SOURCE,
    trial=f"{TRIAL}Statements, for each rank from {HIGH[0]}: the test loss of GGPO is below that of LoRA; and its "
    "worst test loss over all ranks is.",
)
def generalises(setting: Setting) -> Finding:
    """Compare test losses."""
    trials = _trials(setting)
    verdicts = [compare(trials[rank].gain("LoRA", "GGPO")) for rank in HIGH]
    by_rank = _curves(trials, "test")
    worst = {name: [max(values) for values in zip(*places, strict=True)] for name, places in by_rank.items()}
    verdicts.append(compare([a - b for a, b in zip(worst["LoRA"], worst["GGPO"], strict=True)]))
    panels = [_panel(trials, "test loss", "loss", "test"), _panel(trials, "test accuracy", "accuracy", "accuracy")]
    return _finding(trials, verdicts, f"Test loss, {_said(trials, 'test')}.", panels)


@claim(
    "lora-ggpo",
    "double-descent",
    says="It mitigates the double descent of LoRA: the rise of the test loss with the rank, and in training.",
    source=SOURCE,
    trial=f"{TRIAL}A bump is how far the test loss rises above the least that it had come to: over the ranks from the "
    f"smallest on, and over {LOOKS} looks in training at rank {RANKS[-1]}. Statements: either bump of GGPO is below "
    "that of LoRA; where LoRA has none, nothing is mitigated.",
)
def double_descent(setting: Setting) -> Finding:
    """Compare the bumps."""
    trials = _trials(setting)
    last = trials[RANKS[-1]]
    over_ranks = {
        name: [bump(values) for values in zip(*places, strict=True)] for name, places in _curves(trials, "test").items()
    }
    in_training = {name: last.metrics[name]["bump"] for name in CONTENDERS}
    verdicts = [
        compare([a - b for a, b in zip(found["LoRA"], found["GGPO"], strict=True)])
        for found in (over_ranks, in_training)
    ]
    said = [
        f"{where}: " + ", ".join(f"{name} {statistics.fmean(values):.3g}" for name, values in found.items())
        for where, found in (("over ranks", over_ranks), ("in training", in_training))
    ]
    looks = sum(key.startswith("course ") for key in last.metrics["LoRA"])
    course = {name: [last.metrics[name][f"course {i}"] for i in range(looks)] for name in CONTENDERS}
    panels = [
        _panel(trials, "test loss over ranks", "loss", "test"),
        Panel(f"test loss in training, rank {RANKS[-1]}", "loss", course, list(range(looks)), "look"),
    ]
    return _finding(trials, verdicts, f"Bumps of the test loss, {'; '.join(said)}.", panels)
