"""SHiRA: sparse adapters of high rank used alone and several at once, beside LoRA of equal count."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Trial, compare, together, tune
from lorry.core.life.adapter import Adapter
from lorry.methods.lora import LoRA
from lorry.methods.shira import SHiRA

from ._three_tasks import SETUP, always, pairs, running

STEPS = 200
RATES = (3e-2, 1e-1, 3e-1, 1.0)


def _apart(number: int) -> SHiRA:
    """The largest weights that the tasks before have left."""
    return SHiRA(rank=1, mask="wm", part=number)


CONTENDERS: dict[str, Callable[[int], Any]] = {
    "LoRA": always(LoRA(rank=1)),
    "rand": always(SHiRA(rank=1, mask="rand")),
    "wm": always(SHiRA(rank=1, mask="wm")),
    "wm, apart": _apart,
    "snip": always(SHiRA(rank=1, mask="snip")),
    "grad": always(SHiRA(rank=1, mask="grad")),
}
MASKS = [name for name in CONTENDERS if name != "LoRA"]
TRIAL = (
    f"{SETUP} {STEPS} steps of {digits.ROWS} rows; rates {', '.join(f'{rate:g}' for rate in RATES)}. As many "
    "parameters as LoRA of rank 1 for all; grad and snip see 8 batches. 'wm' trains the same largest weights for all "
    "tasks, 'wm, apart' the next largest for each next task."
)


def _awor(a: Tensor, b: Tensor) -> float:
    """Share of zeros in A' B."""
    return float(((a.mT @ b) == 0).float().mean())


def _awom(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of A' B, by the norms of A and B."""
    return float((a.mT @ b).norm() / (a.norm() * b.norm()).clamp_min(1e-12))


def _orthogonality(adapters: Sequence[Adapter]) -> Mapping[str, float]:
    found = pairs([{site.path: delta.detach() for site, delta in one.deltas()} for one in adapters])
    return {
        "awor": statistics.fmean(_awor(a, b) for a, b in found),
        "awom": statistics.fmean(_awom(a, b) for a, b in found),
    }


@cache
def _trial(setting: Setting) -> Trial:
    """All claims look at the same runs."""
    steps = setting.much(STEPS, 2)
    return tune({n: running(m, steps, _orthogonality) for n, m in CONTENDERS.items()}, RATES, setting.seeds)


def _figures(trial: Trial, metric: str, places: int = 3) -> str:
    return ", ".join(f"{name} {trial.mean(name, metric):.{places}f}" for name in CONTENDERS)


def _notes(trial: Trial) -> list[str]:
    return [f"Parameters: {_figures(trial, 'parameters', 0)}.", *trial.notes]


@claim(
    "shira",
    "single",
    says="Alone it is better than LoRA at about equal count (LLaMA-7B, eight commonsense tasks: grad 76.6, wm 77.0, "
    "snip 77.4, LoRA 74.7).",
    source="arXiv 2406.13175, table of commonsense reasoning",
    trial=f"{TRIAL} Statements: each of the three masks is above LoRA in mean accuracy of the adapters alone.",
)
def single(setting: Setting) -> Finding:
    """Compare adapters used alone."""
    trial = _trial(setting)
    verdicts = [compare(trial.gain(mask, "LoRA", "single")) for mask in ("grad", "wm", "snip")]
    return Finding(
        verdict=together(verdicts),
        summary=f"Accuracy of the adapters alone: {_figures(trial, 'single')}.",
        panels=[Panel("adapters alone", "test accuracy, mean of three tasks", trial.of("single"))],
        rates=trial.rates,
        notes=_notes(trial),
    )


@claim(
    "shira",
    "fusing",
    says="Several adapters added lose less of their accuracy, and are better, than LoRAs added (LLaMA2-7B, three "
    "tasks: 78.45 to 74.02 with wm, 77.54 to 73.92 with wm apart, LoRA 78.41 to 67.33).",
    source="arXiv 2406.13175, table of multi-adapter fusion",
    trial=f"{TRIAL} All three adapters added on every row. Statements, for wm and wm apart: less lost than by LoRA, "
    "and a higher accuracy after adding. Other masks, and averages, are reported.",
)
def fusing(setting: Setting) -> Finding:
    """Compare adapters used together."""
    trial = _trial(setting)
    masks = ("wm", "wm, apart")
    less_lost = [compare(trial.gain("LoRA", mask, "drop added")) for mask in masks]
    better = [compare(trial.gain(mask, "LoRA", "added")) for mask in masks]
    return Finding(
        verdict=together([*less_lost, *better]),
        summary=f"Added: {_figures(trial, 'added')}; lost by it: {_figures(trial, 'drop added')}; averaged: "
        f"{_figures(trial, 'averaged')}.",
        panels=[Panel(how, "test accuracy, mean of three tasks", trial.of(how)) for how in ("added", "averaged")],
        rates=trial.rates,
        notes=_notes(trial),
    )


@claim(
    "shira",
    "orthogonality",
    says="Updates of two tasks are closer to orthogonal than those of LoRA: most entries of A1' A2 are zero, and it is "
    "smaller.",
    source="arXiv 2406.13175, section on multi-adapter fusion, AWOR and AWOM",
    trial=f"{TRIAL} Of the trained updates of two tasks, mean over layers and pairs: AWOR, the share of zeros in A1' "
    "A2; AWOM, its Frobenius norm, by |A1| |A2|, since rates differ. Statements, for every mask: AWOR above, AWOM "
    "below that of LoRA.",
)
def orthogonality(setting: Setting) -> Finding:
    """Compare the overlap of trained updates."""
    trial = _trial(setting)
    sparser = [compare(trial.gain(mask, "LoRA", "awor")) for mask in MASKS]
    smaller = [compare(trial.gain("LoRA", mask, "awom")) for mask in MASKS]
    return Finding(
        verdict=together([*sparser, *smaller]),
        summary=f"AWOR: {_figures(trial, 'awor')}. AWOM by norms: {_figures(trial, 'awom')}.",
        panels=[
            Panel("AWOR", "share of zeros", trial.of("awor")),
            Panel("AWOM", "norm of A1' A2 by |A1| |A2|", trial.of("awom")),
        ],
        rates=trial.rates,
        notes=_notes(trial),
    )
