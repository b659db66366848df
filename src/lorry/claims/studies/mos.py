"""MoS: layers that share shards against the same number of parameters apart."""

from __future__ import annotations

from functools import cache

from torch import nn

from lorry.claims import digits
from lorry.claims.ledger import Finding, Setting, claim
from lorry.claims.verdicts import Trial, compare, together
from lorry.methods.lora import LoRA
from lorry.methods.mos import MoS

from ._digits_grid import average, gain, notes_of, panels, rates_of, tuned

#: Layers of one shape, their width, the rank that is paid for and the rank that is built.
LAYERS, WIDTH, BUDGET, RANK = 6, 64, 2, 6
TASKS = ("shift", "rotate")
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
STEPS = 300
#: What counts as equal accuracy.
MARGIN = 0.01

#: The method with all its steps.
FULL = "+ private"
CONTENDERS = {
    "LoRA": LoRA(rank=BUDGET),
    "LoRA, 8 x": LoRA(rank=8 * BUDGET),
    "pure sharing": MoS(budget=BUDGET, rank=BUDGET * LAYERS, shards=1, dissociated=False),
    "+ subsets": MoS(budget=BUDGET, rank=RANK, shards=1, dissociated=False),
    "+ dissociation": MoS(budget=BUDGET, rank=RANK, shards=1),
    "+ shards": MoS(budget=BUDGET, rank=RANK, shards=4),
    FULL: MoS(budget=BUDGET, rank=RANK, shards=4, private=1),
    "private, paired": MoS(budget=BUDGET, rank=RANK, shards=4, private=1, dissociated=False),
    "private, unsharded": MoS(budget=BUDGET, rank=RANK, shards=1, private=1),
}

TRIAL = (
    f"Perceptrons trained on digits, 64 - {' - '.join([str(WIDTH)] * LAYERS)} - 10, a network for each seed; the "
    f"{LAYERS} layers of 64 x 64 carry adapters and share pools. Adapted to shifted and to rotated digits in {STEPS} "
    f"steps of {digits.ROWS} rows, at the best of the rates {', '.join(f'{rate:g}' for rate in RATES)} on validation "
    f"rows. Budget {BUDGET}, built rank {RANK}, 4 shards, 1 private rank."
)


def _base(seed: int) -> nn.Sequential:
    return digits.base(seed, WIDTH, LAYERS)


@cache
def _trials(setting: Setting) -> dict[str, Trial]:
    """Both claims look at the same runs."""
    targets = [str(2 * layer) for layer in range(LAYERS)]
    return tuned(CONTENDERS, TASKS, RATES, setting, STEPS, _base, targets)


@claim(
    "mos",
    "equal-budget",
    says="With as many parameters as a LoRA of rank 2 shared shards beat it (LLaMA2-7B, mean of five benchmarks: 36.39 "
    "against 34.98), and they reach a LoRA of eight times the count (37.63 at 20M against 37.53 at 160M).",
    source="arXiv 2410.00938, abstract and main table",
    trial=f"{TRIAL} Against the claim: MoS with all its steps, half of its budget private, not above LoRA of equal "
    f"count on the mean of both tasks, or more than {MARGIN:g} below LoRA of rank {8 * BUDGET}.",
)
def equal_budget(setting: Setting) -> Finding:
    """Compare MoS with LoRA of the same and of eight times the count."""
    trials, shown = _trials(setting), ["LoRA", "pure sharing", "+ shards", FULL, "LoRA, 8 x"]
    over, against_large = gain(trials, FULL, "LoRA"), gain(trials, FULL, "LoRA, 8 x")
    figures = {name: average(trials, name) for name in shown}
    return Finding(
        verdict=together([compare(over), compare(against_large, -MARGIN)]),
        summary=f"Mean accuracy of both tasks: MoS {figures[FULL]:.3f}, LoRA of equal count {figures['LoRA']:.3f}, "
        f"LoRA of eight times the count {figures['LoRA, 8 x']:.3f}, one update shared by all layers "
        f"{figures['pure sharing']:.3f}, MoS without private ranks {figures['+ shards']:.3f}.",
        panels=panels(trials, shown),
        rates=rates_of(trials, shown),
        notes=notes_of(trials, shown),
    )


@claim(
    "mos",
    "differentiation",
    says="Each step that makes shared layers differ helps: subsets of the pool instead of all of it (36.12 against "
    "34.33), drawing A and B apart (1.09 lower without), private shards (1.09 lower without), shards of vectors (0.41 "
    "lower without).",
    source="arXiv 2410.00938, motivation table and ablation at 20M",
    trial=f"{TRIAL} Each statement is judged as the paper does: subsets against pure sharing, and the full method "
    "against the full method without one step. Against a statement: no gain on the mean of both tasks.",
)
def differentiation(setting: Setting) -> Finding:
    """Leave out one step at a time."""
    trials = _trials(setting)
    shown = [name for name in CONTENDERS if name != "LoRA, 8 x"]
    pairs = {
        "subsets": ("+ subsets", "pure sharing"),
        "dissociation": (FULL, "private, paired"),
        "shards": (FULL, "private, unsharded"),
        "private ranks": (FULL, "+ shards"),
    }
    gains = {step: gain(trials, *pair) for step, pair in pairs.items()}
    means = ", ".join(f"{step} {sum(values) / len(values):+.3f}" for step, values in gains.items())
    ladder = ", ".join(f"{name} {average(trials, name):.3f}" for name in list(CONTENDERS)[2:7])
    return Finding(
        verdict=together([compare(values) for values in gains.values()]),
        summary=f"Gains of the steps: {means}. Adding them one after another gave {ladder}.",
        panels=panels(trials, shown),
        rates=rates_of(trials, shown),
        notes=notes_of(trials, shown),
    )
