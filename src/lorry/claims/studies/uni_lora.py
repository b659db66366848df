"""Uni-LoRA: one vector for all matrices against the same number of parameters apart."""

from __future__ import annotations

from functools import cache

from torch import nn

from lorry.claims import digits
from lorry.claims.ledger import Finding, Setting, claim
from lorry.claims.verdicts import Trial, compare, together
from lorry.methods.lora import LoRA
from lorry.methods.unilora import UniLoRA

from ._digits_grid import average, gain, notes_of, panels, rates_of, tuned

LAYERS, WIDTH = 4, 64
#: Parameters of a LoRA of rank 1 on these layers.
SIZE = LAYERS * 2 * WIDTH
TASKS = ("shift", "rotate")
STEPS = 300
RATES = (1e-2, 3e-2, 1e-1, 3e-1)

COUNTS = {
    "LoRA, rank 1": LoRA(rank=1),
    "Uni-LoRA": UniLoRA(size=SIZE),
    "Uni-LoRA, a quarter": UniLoRA(size=SIZE // 4),
}
PROJECTIONS = {
    "Uni-LoRA": COUNTS["Uni-LoRA"],
    "not normalised": UniLoRA(size=SIZE, normalize=False),
    "by layer": UniLoRA(size=SIZE, projection="local"),
    "Fastfood": UniLoRA(size=SIZE, projection="fastfood"),
    "dense Gaussian": UniLoRA(size=SIZE, projection="gaussian"),
}

TRIAL = (
    f"Perceptrons trained on digits, 64 - {' - '.join([str(WIDTH)] * LAYERS)} - 10, a network for each seed; the "
    f"{LAYERS} layers of 64 x 64 carry adapters. Adapted to shifted and to rotated digits in {STEPS} steps of "
    f"{digits.ROWS} rows, at the best of the rates {', '.join(f'{rate:g}' for rate in RATES)} on validation rows. "
    "Uni-LoRA builds rank 4."
)


def _base(seed: int) -> nn.Sequential:
    return digits.base(seed, WIDTH, LAYERS)


@cache
def _trials(setting: Setting) -> dict[str, Trial]:
    """Both claims look at the same runs."""
    targets = [str(2 * layer) for layer in range(LAYERS)]
    return tuned({**COUNTS, **PROJECTIONS}, TASKS, RATES, setting, STEPS, _base, targets)


@claim(
    "uni-lora",
    "equal-count",
    says="One trained vector with a fixed projection to all matrices uses its parameters better than its peers: the "
    "fewest parameters at equal or better accuracy; Gemma-7B at the accuracy of LoRA with 0.26 % of its count.",
    source="arXiv 2506.00799, abstract and the authors' description; their tables of scores were not at hand",
    trial=f"{TRIAL} Against the claim: with as many parameters as LoRA of rank 1 it is below it on the mean of both "
    "tasks. A quarter of that count is shown beside them.",
)
def equal_count(setting: Setting) -> Finding:
    """Compare with LoRA of equal count."""
    trials, contenders = _trials(setting), list(COUNTS)
    mean = {name: average(trials, name) for name in contenders}
    return Finding(
        verdict=together([compare(gain(trials, "Uni-LoRA", "LoRA, rank 1"))]),
        summary=f"Mean accuracy of both tasks: Uni-LoRA {mean['Uni-LoRA']:.3f} against LoRA {mean['LoRA, rank 1']:.3f} "
        f"at {SIZE} parameters; with a quarter of them {mean['Uni-LoRA, a quarter']:.3f}.",
        panels=panels(trials, contenders),
        rates=rates_of(trials, contenders),
        notes=notes_of(trials, contenders),
    )


@claim(
    "uni-lora",
    "projection",
    says="One projection for the whole model lets layers share parameters, and its normalisation keeps distances; both "
    "are meant to help.",
    source="arXiv 2506.00799, framework section, read in summaries only: which differences to expect is not known",
    trial=f"{TRIAL} {SIZE} parameters for all: the normalised global projection, one without normalisation, a "
    "projection for each layer, and two in which every entry is made of the whole vector. Reported only.",
)
def projection(setting: Setting) -> Finding:
    """Change the projection at equal count."""
    trials, contenders = _trials(setting), list(PROJECTIONS)
    figures = "; ".join(
        f"{task}: " + ", ".join(f"{name} {trial.mean(name):.3f}" for name in contenders)
        for task, trial in trials.items()
    )
    return Finding(
        verdict="reported",
        summary=f"Accuracy on {figures}.",
        panels=panels(trials, contenders),
        rates=rates_of(trials, contenders),
        notes=notes_of(trials, contenders),
    )
