"""Claims of ICM-Fusion: adapters rebuilt by a conditional VAE, its condition, and fusion in its latent space."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

import lorry
from lorry.merging import MergedAdapter, icm, merge
from lorry.merging.output import trial_adapter

from ..digits import base
from ..fitting import train_adapter
from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import chosen, compare, together
from ._digit_merges import VIEWS, Course, Pool, bare, carried, course, listed, measured, merged_by, own
from ._icm_scene import EPOCHS, WIDTH, Coder, Scene, coder, scene, score

#: Few-shot steps of every contender that takes any, and their rates.
FEW, RATES = 60, (0.005, 0.02, 0.1, 0.5)
REFINING = (3e-3, 1e-2, 3e-2, 1e-1)
SETUP = (
    "A 64-64-64-10 perceptron trained on 8 x 8 digits and frozen; one rank-4 LoRA for each of flip, noise, rotate and "
    "shift from one A (600 Adam steps at 3e-3), with 20 checkpoints of its second half. VAE with 32 latent and 256 "
    "hidden units, 500 epochs, each with 3 inner steps on 40 support rows of the task, which move the adapter by 1 % "
    "of its norm each; the task vector is the mean last hidden state of 30 training rows. "
)


@claim(
    "icm-fusion",
    "reconstruction",
    says="A conditional VAE over LoRA checkpoints rebuilds adapters that do their tasks as well as the originals.",
    source="arXiv 2508.04153 (AAAI 2026), and ICM-LoRA, arXiv 2501.17635, which it builds on",
    trial=SETUP
    + "Each task's last checkpoint, and its last but one, which the VAE has not seen, are decoded from their mean "
    "code. A VAE trained without the inner loop is reported beside it. Against: the rebuilt last checkpoint has less "
    "than 95 % of the original's test accuracy.",
)
def reconstruction(setting: Setting) -> Finding:
    """Accuracy of rebuilt adapters against the originals."""
    names = ("original", "rebuilt", "rebuilt, not seen in training", "rebuilt, no inner loop", "base")
    found: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, list[float]] = {"error_train": [], "error_held_out": []}
    steps: list[tuple[float, float]] = []
    for seed in setting.seeds:
        with scene(seed, setting) as one:
            made = coder(one, setting)
            found["original"].append(own(one.pool))
            for name, row in (("rebuilt", -1), ("rebuilt, not seen in training", -2)):
                found[name].append(statistics.fmean(score(one, v, made.rebuilt(v, row)) for v in VIEWS))
            without = coder(one, setting, inner=False)
            found[names[3]].append(statistics.fmean(score(one, v, without.rebuilt(v)) for v in VIEWS))
            found["base"].append(bare(one.pool)["test"])
            for key, values in errors.items():
                values.append(statistics.fmean(made.facts[key].values()))
            steps += made.facts["inner_losses"].values()
    ratios = [a / b for a, b in zip(found["rebuilt"], found["original"], strict=True)]
    means = {name: statistics.fmean(values) for name, values in found.items()}
    return Finding(
        together([compare([ratio - 0.95 for ratio in ratios])]),
        f"Rebuilt {means['rebuilt']:.3f} of {means['original']:.3f} ({statistics.fmean(ratios):.1%}, at least "
        f"{min(ratios):.1%}), a checkpoint not seen {means[names[2]]:.3f}, without the inner "
        f"loop {means[names[3]]:.3f}; base {means['base']:.3f}.",
        [Panel("Each on its own task", "mean test accuracy", {name: [values] for name, values in found.items()})],
        notes=[
            "Relative squared error of the normalised factors: "
            f"{statistics.fmean(errors['error_train']):.4f} seen, {statistics.fmean(errors['error_held_out']):.4f} not "
            "seen; neighbouring checkpoints of a run are alike.",
            "The inner loop takes the support loss of what is decoded from "
            f"{statistics.fmean(a for a, _ in steps):.3f} to {statistics.fmean(b for _, b in steps):.3f}.",
        ],
    )


@claim(
    "icm-fusion",
    "conditioning",
    says="The task vector steers what is decoded.",
    source="arXiv 2508.04153: fusion is arithmetic on task vectors",
    trial=SETUP
    + "The code of each task's last checkpoint is decoded under each other task's vector, and under its own with "
    "normal noise of 5 % of its size. Task vectors of hidden states, and projections of the weights. Against: the "
    "other task's vector costs no more test accuracy than the noise.",
)
def conditioning(setting: Setting) -> Finding:
    """Decoding under other conditions."""
    kinds = {"hidden states": True, "weights": False}
    rows = ("own vector", "own vector, noise", "another's vector")
    found: dict[str, list[list[float]]] = {f"{kind}: {row}": [[]] for kind in kinds for row in rows}
    for seed in setting.seeds:
        with scene(seed, setting) as one:
            for kind, vectors in kinds.items():
                made = coder(one, setting, vectors)
                given = _under(one, made, seed)
                for row, value in zip(rows, given, strict=True):
                    found[f"{kind}: {row}"][0].append(value)
    cost = {
        kind: [a - b for a, b in zip(found[f"{kind}: {rows[1]}"][0], found[f"{kind}: {rows[2]}"][0], strict=True)]
        for kind in kinds
    }
    return Finding(
        together([compare(values) for values in cost.values()]),
        "; ".join(
            f"{kind}: " + ", ".join(f"{row} {statistics.fmean(found[f'{kind}: {row}'][0]):.3f}" for row in rows)
            for kind in kinds
        )
        + ".",
        [Panel("Decoded from the task's own code", "mean test accuracy on the task", found)],
    )


def _under(one: Scene, made: Coder, seed: int) -> tuple[float, float, float]:
    """Mean accuracy under the own vector, the own with noise, and the others'."""
    generator = Generator().manual_seed(seed)
    right, noisy, wrong = [], [], []
    for view in VIEWS:
        mine = made.data.conditions[view]
        near = mine + 0.05 * mine.square().mean().sqrt() * torch.randn(mine.shape, generator=generator)
        right.append(score(one, view, made.rebuilt(view)))
        noisy.append(score(one, view, made.rebuilt(view, condition=near)))
        others = [made.data.conditions[other] for other in VIEWS if other != view]
        wrong.append(statistics.fmean(score(one, view, made.rebuilt(view, condition=v)) for v in others))
    return statistics.fmean(right), statistics.fmean(noisy), statistics.fmean(wrong)


LATENT, UNIFORM = "latent fusion, tuned", "latent fusion, uniform"
NO_INNER = "latent fusion, tuned, no inner loop"
AVERAGE, TA, TUNED = "factor average", "task arithmetic", "task arithmetic, tuned weights"
REFINED, BOTH, FRESH = "factor average, refined", "latent fusion, refined", "fresh LoRA, trained"


@claim(
    "icm-fusion",
    "fusion",
    says="Adding tasks in the latent space, with weights tuned on a few examples, makes a better adapter of several "
    "tasks than other fusions.",
    source="arXiv 2508.04153, abstract",
    trial=SETUP
    + "40 support rows of each task from outside the training rows; every contender that takes steps takes 60 on all "
    "support rows, at its best rate out of four, the others are at their best strength out of 12, on other "
    "validation rows. Against: the tuned latent fusion is not above the factor average, or below task arithmetic "
    "whose weights were tuned on the same rows with as many steps. The control to be read beside it refines the "
    "factor average itself on the same rows. A VAE that was trained without the inner loop is reported.",
)
def fusion(setting: Setting) -> Finding:
    """Latent fusion against averages and sums, and against refining on the same rows."""
    results: dict[str, dict[float, list[dict[str, float]]]] = {}
    limits, bases = [], []
    for seed in setting.seeds:
        with scene(seed, setting) as one:
            limits.append(own(one.pool))
            bases.append(bare(one.pool)["test"])
            for name, rows in contest(one, setting).items():
                for rate, row in rows.items():
                    results.setdefault(name, {}).setdefault(rate, []).append(row)
    trial = chosen(results)
    gains = [compare(trial.gain(LATENT, AVERAGE)), compare(trial.gain(LATENT, TUNED), margin=-1e-9)]
    return Finding(
        together(gains),
        f"Latent fusion {trial.mean(LATENT):.3f} tuned and {trial.mean(UNIFORM):.3f} uniform, tuned without the inner "
        f"loop {trial.mean(NO_INNER):.3f}; factor average "
        f"{trial.mean(AVERAGE):.3f}, task arithmetic {trial.mean(TA):.3f}, with tuned weights {trial.mean(TUNED):.3f}. "
        f"Refining on the same rows: the factor average {trial.mean(REFINED):.3f}, the uniform latent fusion "
        f"{trial.mean(BOTH):.3f}, a fresh LoRA {trial.mean(FRESH):.3f}.",
        [Panel("Four tasks in one adapter", "mean test accuracy", {"base": [bases], **trial.of()})],
        notes=[
            f"In order: {listed(trial)}; each adapter on its own task {statistics.fmean(limits):.3f}.",
            "Chosen strength, or rate of the steps: "
            + ", ".join(f"{name} {value:g}" for name, value in trial.rates.items())
            + ".",
            *(note.replace("rate", "strength or rate") for note in trial.notes),
        ],
    )


def contest(one: Scene, setting: Setting) -> dict[str, Course]:
    """All contenders on one seed, by their strength or rate."""
    pool, few = one.pool, setting.much(FEW)
    uniform = _fused(one, {"epochs": setting.much(EPOCHS, 2), "alternatives": False, "seed": pool.seed})
    coders = {LATENT: coder(one, setting), NO_INNER: coder(one, setting, inner=False)}
    average = merged_by(pool, ("linear", {}))
    found: dict[str, Course] = {
        AVERAGE: course(pool, average),
        TA: course(pool, merged_by(pool, ("task-arithmetic", {}))),
        UNIFORM: course(pool, uniform),
        LATENT: {},
        NO_INNER: {},
        TUNED: {},
    }
    for rate in RATES:
        for name, made in coders.items():
            found[name][rate] = tuned_fusion(one, made, few, rate)
        weights = tuned_weights(one, few, rate)
        found[TUNED][rate] = _as_is(pool, merge(dict(pool.adapters), weights=weights, method="task-arithmetic"))
    for name, start in ((REFINED, average), (BOTH, uniform), (FRESH, None)):
        found[name] = {rate: refined(one, start, few, rate) for rate in REFINING}
    return found


def tuned_fusion(one: Scene, made: Coder, steps: int, rate: float) -> dict[str, float]:
    """Latent fusion after steps on its weights over the support rows, as the merge takes them."""
    support = icm.Support(made.data.layout, one.tasks, one.pool.network)
    uniform = torch.full((len(one.tasks),), 1 / len(one.tasks))
    with torch.enable_grad(), support.carried():
        weights = made.fusion.tuned(uniform, support, steps, rate)
    with trial_adapter(one.pool.network, made.tensors(made.fusion.decoded(weights).detach())):
        return measured(one.pool)


def _fused(one: Scene, options: Mapping[str, Any]) -> MergedAdapter:
    extras = {"tasks": one.tasks}
    return merge(dict(one.pool.adapters), method="icm-fusion", options=options, model=one.pool.network, extras=extras)


def _as_is(pool: Pool, merged: MergedAdapter) -> dict[str, float]:
    with carried(pool, merged) as at:
        at(1.0)
        return measured(pool)


def support_loss(one: Scene, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over the tasks, which have equally many support rows."""
    x, y = (torch.cat([getattr(rows, part) for rows in one.support.values()]) for part in ("x", "y"))
    return nn.functional.cross_entropy(forward(x), y)


def tuned_weights(one: Scene, steps: int, rate: float) -> list[float]:
    """Weights of the updates' sum after gradient steps on the support rows; the best of those visited."""
    plain = base(one.pool.seed, WIDTH)
    frozen = {name: value.detach() for name, value in plain.named_parameters()}
    deltas = [{s.path: d.float() for s, d in adapter.deltas()} for adapter in one.pool.adapters.values()]
    weights = torch.full((len(deltas),), 1 / len(deltas), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=rate)
    best, lowest = weights.tolist(), float("inf")
    for _ in range(steps + 1):
        changed = {f"{p}.weight": frozen[f"{p}.weight"] + _weighted(weights, deltas, p) for p in deltas[0]}
        value = support_loss(one, partial(_forward, plain, {**frozen, **changed}))
        if value.item() < lowest:
            best, lowest = weights.tolist(), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return best


def _forward(network: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    found: Tensor = functional_call(network, parameters, (x,))
    return found


def _weighted(weights: Tensor, deltas: Sequence[Mapping[str, Tensor]], path: str) -> Tensor:
    return torch.einsum("n,noi->oi", weights, torch.stack([one[path] for one in deltas]))


def refined(one: Scene, start: MergedAdapter | None, steps: int, rate: float) -> dict[str, float]:
    """Train a merge, or a fresh adapter, on the support rows."""
    network = one.pool.network
    if start is None:
        adapter = lorry.attach(network, {"method": "lora", "rank": 4}, name="refined", seed=one.pool.seed)
    else:
        adapter = start.attach(network, "refined", trainable=True)
    try:
        train_adapter(network, adapter, lambda step: support_loss(one, network), steps, rate)
        return measured(one.pool)
    finally:
        adapter.detach()
        lorry.activate(network, None)
