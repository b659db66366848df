"""FlyLoRA: merging with little interference, balanced loads, decoupled gradients."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

import lorry
from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Run, Trial, compare, together, tune
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.method.families import Bottleneck
from lorry.merging import merge, mix
from lorry.methods.flylora import FlyLoRA
from lorry.methods.lora import LoRA

from ._three_tasks import LAYERS, SETUP, always, cosine, pairs, running, tasks

RANK, TOP_K = 32, 8
STEPS = 200
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
CONTENDERS = {
    "FlyLoRA": FlyLoRA(rank=RANK, top_k=TOP_K),
    "FlyLoRA, shared A": FlyLoRA(rank=RANK, top_k=TOP_K),
    "FlyLoRA, by magnitude": FlyLoRA(rank=RANK, top_k=TOP_K, select="magnitude"),
    "FlyLoRA, input cut off": FlyLoRA(rank=RANK, top_k=TOP_K, grad_to_input=False),
    "LoRA, rank 8": LoRA(rank=8),
    "LoRA, rank 32": LoRA(rank=32),
}
LORAS = ("LoRA, rank 8", "LoRA, rank 32")
GRID = ", ".join(f"{rate:g}" for rate in RATES)
TRIAL = f"{SETUP} {STEPS} steps of {digits.ROWS} rows; rates {GRID}. FlyLoRA of rank {RANK} with {TOP_K} active."


def _factors(entry: Entry) -> tuple[Tensor, Tensor]:
    assert isinstance(entry.method, Bottleneck)
    return entry.method.factors(entry.tensors(), entry.site)


def _product(adapter: Adapter) -> dict[str, Tensor]:
    """B A of each layer, without the choice of units."""
    found = {}
    for path, entry in adapter.entries.items():
        a, b = _factors(entry)
        found[path] = (b @ a).detach()
    return found


def _overlap(adapters: Sequence[Adapter]) -> Mapping[str, float]:
    """Mean absolute cosine of the updates of two tasks."""
    return {"cosine": statistics.fmean(cosine(a, b) for a, b in pairs([_product(one) for one in adapters]))}


def _merged(adapters: Sequence[Adapter]) -> Mapping[str, float]:
    """Mean accuracy over the tasks of the one adapter that merging gives, at weights 1/3: by its own method or as a
    sum, and as a sum without the choice of units.
    """
    inputs, network, found = {one.name: one for one in adapters}, adapters[0].state.root, {}
    gated = isinstance(adapters[0].method, FlyLoRA)
    for name, select in (("merged", "signed"), ("dense", "all")):
        one = mix(inputs, FlyLoRA(select=select)) if gated else merge(inputs, method="cat")
        carried = one.attach(network, "merged")
        found[name] = statistics.fmean(digits.accuracy(network, task.test) for task in tasks().values())
        carried.detach()
        lorry.activate(network, None)
    return found


def _measured(adapters: Sequence[Adapter]) -> Mapping[str, float]:
    return {**_overlap(adapters), **_merged(adapters)}


@cache
def _trial(setting: Setting) -> Trial:
    """Three claims look at the same runs."""
    steps = setting.much(STEPS, 2)
    contenders = {
        name: running(always(method), steps, _measured, name.endswith("shared A"))
        for name, method in CONTENDERS.items()
    }
    return tune(contenders, RATES, setting.seeds)


def _counts(trial: Trial) -> str:
    return "Parameters: " + ", ".join(f"{n} {trial.mean(n, 'parameters'):,.0f}" for n in trial.metrics) + "."


@claim(
    "flylora",
    "single",
    says="With an A that is frozen it is better than LoRA of equal and of smaller rank (Llama-3.1-8B, MMLU: 40.88 "
    "against 38.93 at rank 32 and 36.53 at rank 8).",
    source="arXiv 2510.08396, table 1",
    trial=f"{TRIAL} Against the claim: mean accuracy of the single adapters below that of LoRA of rank 8 or 32. Its "
    "variants (choice by magnitude, no gradient to the input through A) are those of the published programs.",
)
def single(setting: Setting) -> Finding:
    """Compare adapters used alone."""
    trial = _trial(setting)
    figures = ", ".join(f"{name} {trial.mean(name, 'single'):.3f}" for name in CONTENDERS)
    return Finding(
        verdict=together([compare(trial.gain("FlyLoRA", lora, "single")) for lora in LORAS]),
        summary=f"Accuracy of the adapters alone: {figures}.",
        panels=[Panel("adapters alone", "test accuracy, mean of three tasks", trial.of("single"))],
        rates=trial.rates,
        notes=[_counts(trial), *trial.notes],
    )


@claim(
    "flylora",
    "merging",
    says="Adapters of several tasks lose less when they are averaged (MMLU: 2.02 lost against 4.91 for LoRA of rank 32 "
    "and 6.48 for rank 8).",
    source="arXiv 2510.08396, table 2",
    trial=f"{TRIAL} All three adapters at once on every row, each with its own A and choice of units, added (weight 1) "
    "and averaged (weight 1/3). Statements, for both and against both LoRAs: FlyLoRA loses less accuracy to its "
    "adapters alone. The accuracies themselves are reported, and so are those of the one adapter that merging the "
    "three at weights 1/3 gives, with each its own choice of units, and as in the paper's formula without any choice.",
)
def merging(setting: Setting) -> Finding:
    """Compare adapters used together."""
    trial = _trial(setting)
    verdicts = [
        compare([-lost for lost in trial.gain("FlyLoRA", lora, f"drop {how}")])
        for how in ("averaged", "added")
        for lora in LORAS
    ]
    flies = [name for name in CONTENDERS if name not in LORAS]
    dense = {f"{name}, no choice": [trial.metrics[name]["dense"]] for name in flies}
    one_adapter = {**trial.of("merged"), **dense}
    summary = "; ".join(
        f"{how}, accuracy (lost): "
        + ", ".join(f"{n} {trial.mean(n, how):.3f} ({trial.mean(n, f'drop {how}'):.3f})" for n in ("FlyLoRA", *LORAS))
        for how in ("averaged", "added")
    )
    return Finding(
        verdict=together(verdicts),
        summary=f"{summary[0].upper()}{summary[1:]}.",
        panels=[
            *(Panel(how, "test accuracy, mean of three tasks", trial.of(how)) for how in ("averaged", "added")),
            Panel("merged into one adapter", "test accuracy, mean of three tasks", one_adapter),
        ],
        rates=trial.rates,
        notes=[
            f"Merged into one adapter: FlyLoRA {trial.mean('FlyLoRA', 'merged'):.3f} with each task's own choice of "
            f"units, {trial.mean('FlyLoRA', 'dense'):.3f} without a choice; "
            + ", ".join(f"{lora} {trial.mean(lora, 'merged'):.3f}" for lora in LORAS)
            + ".",
            _counts(trial),
            *trial.notes,
        ],
    )


@claim(
    "flylora",
    "orthogonality",
    says="Independent random A keep the updates of tasks nearly orthogonal: the expected product of two of them is 0.",
    source="arXiv 2510.08396, section 3.4",
    trial=f"{TRIAL} Mean absolute cosine between the updates B A of two tasks over layers and pairs of tasks. "
    "Statements: lower than with one A for all tasks; lower than for LoRA of rank 8 and of rank 32. The second plot is "
    "|A1 A2'| / |A1 A1'| for fresh adapters by the width of the layer.",
)
def orthogonality(setting: Setting) -> Finding:
    """Compare the overlap of trained updates, and of projections by width."""
    trial, widths = _trial(setting), (64, 256, 1024, 4096)
    others = ("FlyLoRA, shared A", *LORAS)
    overlap = [[_projection_overlap(width, seed) for seed in setting.seeds] for width in widths]
    figures = ", ".join(f"{name} {trial.mean(name, 'cosine'):.3f}" for name in ("FlyLoRA", *others))
    falls = ", ".join(f"{statistics.fmean(v):.3f} at {width}" for width, v in zip(widths, overlap, strict=True))
    return Finding(
        verdict=together([compare(trial.gain(other, "FlyLoRA", "cosine")) for other in others]),
        summary=f"Cosine between the updates of two tasks: {figures}. Overlap of two projections: {falls}.",
        panels=[
            Panel("updates of two tasks", "absolute cosine", trial.of("cosine")),
            Panel("projections", "|A1 A2'| / |A1 A1'|", {"FlyLoRA": overlap}, widths, "width", True, True),
        ],
        rates=trial.rates,
        notes=trial.notes,
    )


def _projection_overlap(width: int, seed: int) -> float:
    model = nn.Sequential(nn.Linear(width, 8))
    entries = [
        lorry.attach(model, CONTENDERS["FlyLoRA"], name=name, seed=2 * seed + number).entries["0"]
        for number, name in enumerate("ab")
    ]
    first, second = (_factors(entry)[0] for entry in entries)
    return float((first @ second.mT).norm() / (first @ first.mT).norm())


def _variation(network: nn.Module, adapter: Adapter, data: digits.Split) -> float:
    """Coefficient of variation of how often each unit fires, mean of the layers."""
    with torch.no_grad(), lorry.context(network, recording=True) as context:
        network(data.x)
    loads = [load for (_, _, name), load in context.records.items() if name == "load"]
    assert len(loads) == len(adapter.entries)
    return statistics.fmean(float(load.std(correction=0) / load.mean()) for load in loads)


@claim(
    "flylora",
    "load-balance",
    says="A bias that moves against the load keeps the units evenly used without a loss, and accuracy needs it (MMLU "
    "40.88 with it, 37.56 without).",
    source="arXiv 2510.08396, equation 9 and table 3",
    trial="Digits moved to the left on the perceptron 64 - 128 - 128 - 10, adapters on two layers, bias step 1e-3 "
    f"against none, for both rules of choice; {2 * STEPS} steps, the three higher rates. Statements, for choice by "
    "value: a lower coefficient of variation of the units' loads on test rows; a higher accuracy.",
)
def load_balance(setting: Setting) -> Finding:
    """Compare loads and accuracy with the bias on and off."""
    tried = tasks()["left"]

    def contender(select: str, step: float) -> Run:
        def run(rate: float, seed: int) -> Mapping[str, float]:
            network = digits.base(seed)
            method = FlyLoRA(rank=RANK, top_k=TOP_K, select=select, rate=step)
            adapter = digits.adapt(network, method, tried.train, setting.much(2 * STEPS, 2), rate, seed, LAYERS)
            return {**digits.scores(network, tried), "variation": _variation(network, adapter, tried.test)}

        return run

    names = {"by value": ("signed", 1e-3), "by value, no bias": ("signed", 0.0)}
    names |= {"by magnitude": ("magnitude", 1e-3), "by magnitude, no bias": ("magnitude", 0.0)}
    trial = tune({name: contender(*choice) for name, choice in names.items()}, RATES[1:], setting.seeds)
    evener = trial.gain("by value, no bias", "by value", "variation")
    figures = ", ".join(f"{n} {trial.mean(n, 'variation'):.2f} ({trial.mean(n):.3f})" for n in names)
    return Finding(
        verdict=together([compare(evener), compare(trial.gain("by value", "by value, no bias"))]),
        summary=f"Coefficient of variation of the loads (accuracy): {figures}.",
        panels=[
            Panel("loads of the units", "coefficient of variation", trial.of("variation")),
            Panel("accuracy", "test accuracy", trial.of()),
        ],
        rates=trial.rates,
        notes=trial.notes,
    )


ACTIVE = (4, 8, 16, 32)


def _coupling(top_k: int, seed: int, rows: int) -> float:
    """Sum of the absolute off-diagonal entries of the mean of (grad b_i)' (grad b_j) over rows, at the start."""
    network, data = digits.base(seed), tasks()["left"].train
    method = FlyLoRA(rank=RANK, top_k=top_k, density=TOP_K / RANK)
    adapter = lorry.attach(network, method, targets=LAYERS, seed=seed)
    moments = [torch.zeros(RANK, RANK) for _ in adapter.parameters()]
    for row in range(rows):
        loss = nn.functional.cross_entropy(network(data.x[row : row + 1]), data.y[row : row + 1])
        for moment, gradient in zip(moments, torch.autograd.grad(loss, adapter.parameters()), strict=True):
            moment += gradient.mT @ gradient / rows
    return statistics.fmean(float(m.abs().sum() - m.diagonal().abs().sum()) for m in moments)


@claim(
    "flylora",
    "decoupling",
    says="Choosing k of r units decouples their gradients: the covariance between two columns of B falls by about "
    "(k/r)^2.",
    source="arXiv 2510.08396, theorem on gradient covariance, for a choice at random",
    trial="Fresh adapters of rank 32 with the same A on the perceptron 64 - 128 - 128 - 10, gradients of 200 single "
    "rows of digits moved to the left, k of 4, 8, 16 and 32: the sum of the absolute off-diagonal entries of the mean "
    "of (grad b_i)' (grad b_j), by that of k = 32. Statements: it falls with every halving of k; at k = 8 it is "
    "within a factor of two of (k/r)^2.",
)
def decoupling(setting: Setting) -> Finding:
    """Measure the coupling of gradients by k."""
    rows = setting.much(200, 4)
    by_seed = {seed: [_coupling(k, seed, rows) for k in ACTIVE] for seed in setting.seeds}
    ratios = [[values[place] / values[-1] for values in by_seed.values()] for place in range(len(ACTIVE))]
    law = [(k / RANK) ** 2 for k in ACTIVE]
    falls = [min(b - a for a, b in zip(values, values[1:], strict=False)) for values in by_seed.values()]
    near = [min(2 - ratio / law[1], 2 - law[1] / ratio) for ratio in ratios[1]]
    figures = ", ".join(
        f"{statistics.fmean(found):.3f} (law {expected:.3f}) at k = {k}"
        for k, found, expected in zip(ACTIVE, ratios, law, strict=True)
    )
    series = {"FlyLoRA": ratios, "(k/r)^2": [[value] * len(setting.seeds) for value in law]}
    return Finding(
        verdict=together([compare(falls), compare(near)]),
        summary=f"Coupling of gradients by that of k = r: {figures}.",
        panels=[Panel("coupling of gradients", "by that of k = r", series, ACTIVE, "active units k", True, True)],
    )
