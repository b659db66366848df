"""CoMoL: what a mixture of small cores does that a LoRA cannot, what it cannot do, and what many cores cost."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.synthetic import Teacher, fit, rows_of, scores
from lorry.claims.verdicts import compare, together, tune

WIDTH, RANK, GROUPS, STEPS = 32, 4, 4, 600
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
#: Cores of the cost trial, and the layer they sit in.
COUNTS, WIDE, NARROW, TOKENS = (4, 8, 16, 32, 64), 2048, 8, 128


def lora(rank: int) -> dict[str, Any]:
    """A LoRA of scale 1, as all contenders have."""
    return {"method": "lora", "rank": rank, "alpha": rank}


def comol(rank: int = RANK, experts: int = GROUPS, **more: Any) -> dict[str, Any]:
    """A CoMoL of scale 1."""
    return {"method": "comol", "rank": rank, "experts": experts, **more}


def mixture(rank: int = RANK, experts: int = GROUPS) -> dict[str, Any]:
    """A softmax mixture of whole LoRAs, without the losses that LoRA-Mixer adds."""
    return {
        "method": "lora-mixer",
        "rank": rank,
        "experts": experts,
        "inference_mode": "soft",
        "load_balance": 0.0,
        "entropy": 0.0,
    }


def shared_teacher(seed: int) -> Teacher:
    """Four groups with a core each, between one down- and one up-projection; the code tells the groups apart."""
    g = Generator().manual_seed(seed)
    down, up = rows_of(RANK, WIDTH, generator=g), rows_of(RANK, WIDTH, generator=g)
    cores = torch.randn(GROUPS, RANK, RANK, generator=g)
    centres = 3 * rows_of(GROUPS, RANK, generator=g) @ down

    def update(x: Tensor, groups: Tensor) -> Tensor:
        return torch.einsum("nrs,ns->nr", cores[groups], x @ down.T) @ up

    return Teacher(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5, centres, update)


def separate_teacher(seed: int) -> Teacher:
    """Four groups with a rank-4 update each, between subspaces of their own."""
    g = Generator().manual_seed(seed)
    down, up = rows_of(GROUPS, RANK, WIDTH, generator=g), rows_of(GROUPS, RANK, WIDTH, generator=g)
    cores = torch.randn(GROUPS, RANK, RANK, generator=g)
    updates = up.mT @ cores @ down
    centres = 4 * rows_of(GROUPS, WIDTH, generator=g)

    def update(x: Tensor, groups: Tensor) -> Tensor:
        return torch.einsum("noi,ni->no", updates[groups], x)

    return Teacher(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5, centres, update)


def learn(
    method: Mapping[str, Any], teacher: Callable[[int], Teacher], steps: int, rate: float, seed: int
) -> dict[str, float]:
    """Train one contender on the teacher of a seed."""
    what = teacher(seed)
    model, adapter = fit(method, what, steps, rate, seed)
    return {**scores(model, what, seed), "values": float(adapter.count())}


def contest(
    setting: Setting, contenders: Mapping[str, Mapping[str, Any]], teacher: Callable[[int], Teacher]
) -> tuple[Any, list[str]]:
    """Tune all contenders on the teachers of all seeds; returns the trial and notes with the trained values."""
    steps = setting.much(STEPS, 2)
    runs = {name: functools.partial(learn, method, teacher, steps) for name, method in contenders.items()}
    trial = tune(runs, RATES, setting.seeds)
    sizes = ", ".join(f"{name} {trial.mean(name, 'values'):.0f}" for name in contenders)
    return trial, [f"Trained values: {sizes}.", *trial.notes]


UNIT = "squared error, share of the bare layer's"


@claim(
    "comol",
    "shared-subspace",
    says="Cores that a token's code chooses among learn what one LoRA cannot, at about a LoRA's cost: CoMoL with 8 "
    "cores averages 84.5 on mathematics where LoRA with 1.5 % fewer values has 82.8 (Qwen3-8B); routing by the code "
    "instead of the input costs nothing (84.48 and 84.47).",
    source="arXiv 2603.00573, main results and ablation of core-space routing",
    trial="One frozen layer of width 32 and a teacher with four groups of inputs, each with a core of its own between "
    "one down- and one up-projection of rank 4. CoMoL of rank 4 with four cores against LoRA of rank 4, 5 and 6, the "
    "last with more values than CoMoL; 600 steps of 128 fresh rows. Against the claim: CoMoL leaves more than half of "
    "the error of the best LoRA, or is behind CoMoL routed by the input by a tenth of it.",
)
def shared_subspace(setting: Setting) -> Finding:
    """LoRA of rank r to r + 2 against CoMoL of rank r, where its assumption holds."""
    loras = {f"LoRA r={rank}": lora(rank) for rank in (RANK, RANK + 1, RANK + 2)}
    trial, notes = contest(
        setting,
        {
            **loras,
            "CoMoL": comol(),
            "CoMoL, cores start at zero": comol(start="core"),
            "CoMoL, routed by the input": comol(router_input="full"),
            "mixture of 4 LoRAs": mixture(),
        },
        shared_teacher,
    )
    best = min(loras, key=trial.mean)
    halved = [
        half - own for half, own in zip([e / 2 for e in errors(trial, best)], errors(trial, "CoMoL"), strict=True)
    ]
    routed = trial.gain("CoMoL, routed by the input", "CoMoL")
    verdict = together([compare(halved), compare(routed, margin=-0.1 * trial.mean(best))])
    summary = (
        f"Of the bare layer's error CoMoL leaves {trial.mean('CoMoL'):.3f}, the best LoRA ({best}) "
        f"{trial.mean(best):.3f}; routed by the whole input CoMoL leaves "
        f"{trial.mean('CoMoL, routed by the input'):.3f}, a mixture of four whole LoRAs "
        f"{trial.mean('mixture of 4 LoRAs'):.3f}."
    )
    panel = Panel("Error on fresh rows, cores in one subspace", UNIT, trial.of(), log_y=True)
    return Finding(verdict, summary, [panel], trial.rates, notes)


@claim(
    "comol",
    "separate-subspaces",
    says="Experts share both projections, so CoMoL should lose to whole LoRAs where experts need different subspaces: "
    "the limit that its parametrisation implies, not a result of the paper.",
    source="arXiv 2603.00573, method; the limit is an inference",
    trial="As shared-subspace, with a rank-4 update for each group between random subspaces of its own (rank 16 "
    "together). CoMoL of rank 4 against a softmax mixture of four whole LoRAs of rank 4; LoRA and CoMoL of rank 16 "
    "stand beside them. Against it: CoMoL of rank 4 is not behind the mixture.",
)
def separate_subspaces(setting: Setting) -> Finding:
    """The contrast: experts between different subspaces."""
    whole = "mixture of 4 LoRAs"
    trial, notes = contest(
        setting,
        {
            f"LoRA r={RANK}": lora(RANK),
            f"LoRA r={4 * RANK}": lora(4 * RANK),
            f"CoMoL r={RANK}": comol(),
            f"CoMoL r={4 * RANK}": comol(4 * RANK),
            whole: mixture(),
        },
        separate_teacher,
    )
    own, wide = f"CoMoL r={RANK}", f"CoMoL r={4 * RANK}"
    verdict = together([compare(trial.gain(own, whole))])
    summary = (
        f"CoMoL of rank {RANK} leaves {trial.mean(own):.3f} of the bare layer's error, the mixture of whole LoRAs "
        f"{trial.mean(whole):.3f}, LoRA of rank {4 * RANK} {trial.mean(f'LoRA r={4 * RANK}'):.3f}; given the rank of "
        f"all subspaces together, CoMoL leaves {trial.mean(wide):.3f}."
    )
    panel = Panel("Error on fresh rows, subspaces of their own", UNIT, trial.of(), log_y=True)
    return Finding(verdict, summary, [panel], trial.rates, notes)


def errors(trial: Any, name: str) -> Sequence[float]:
    """Test errors of a contender by seed."""
    found: Sequence[float] = trial.metrics[name]["test"]
    return found


def step_times(models: Mapping[str, nn.Module], repeats: int, seed: int) -> dict[str, float]:
    """Median processor time of a forward and backward pass of each model, measured in turns."""
    x = torch.randn(TOKENS, WIDE, generator=Generator().manual_seed(seed))
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            began = time.process_time()
            model(x).square().mean().backward()
            found[name].append(time.process_time() - began)
            model.zero_grad()
    return {name: statistics.median(times[1:]) for name, times in found.items()}  # the first is warming up


def wide_layer(method: Mapping[str, Any], seed: int) -> tuple[nn.Module, int]:
    """A layer of the cost trial with an adapter, and the adapter's values."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False))
    adapter = lorry.attach(model, method, seed=seed)
    return model.train(), adapter.count()


@claim(
    "comol",
    "many-cores",
    says="Cores are nearly free: from 4 to 64 of them CoMoL grows from 24.97 to 27.91 million values on Qwen3-8B, and "
    "trains with 64 experts where HydraLoRA runs out of memory at 16.",
    source="arXiv 2603.00573, scaling of the number of experts",
    trial="Two frozen layers of width 2,048 with CoMoL of rank 8, 128 tokens, one forward and backward pass: trained "
    "values and processor time for 4 to 64 cores, as shares of LoRA of rank 8, beside a mixture of as many whole "
    "LoRAs. Against the claim: from 4 to 64 cores, values grow by 15 % or a step takes a quarter longer.",
)
def many_cores(setting: Setting) -> Finding:
    """Values and step time by the number of cores."""
    repeats = setting.much(8, 1)
    methods = {"LoRA": lora(NARROW)}
    for n in COUNTS:
        methods |= {f"CoMoL {n}": comol(NARROW, n), f"mixture {n}": mixture(NARROW, n)}
    built = {name: wide_layer(method, 0) for name, method in methods.items()}
    models, sizes = {n: model for n, (model, _) in built.items()}, {n: size for n, (_, size) in built.items()}
    times = [step_times(models, repeats, seed) for seed in setting.seeds]
    kinds = {"CoMoL": "CoMoL", "mixture of whole LoRAs": "mixture"}
    values = {k: [[sizes[f"{v} {n}"] / sizes["LoRA"]] for n in COUNTS] for k, v in kinds.items()}
    spent = {k: [[t[f"{v} {n}"] / t["LoRA"] for t in times] for n in COUNTS] for k, v in kinds.items()}
    least, most = COUNTS[0], COUNTS[-1]
    grown = sizes[f"CoMoL {most}"] / sizes[f"CoMoL {least}"] - 1
    slower = [t[f"CoMoL {most}"] / t[f"CoMoL {least}"] - 1 for t in times]
    verdict = together([compare([0.15 - grown]), compare([0.25 - s for s in slower])])
    summary = (
        f"From {least} to {most} cores values grow by {grown:.0%} and a step takes {statistics.fmean(slower):+.0%}; "
        f"with {most} experts a step takes {statistics.fmean(spent['CoMoL'][-1]):.2f} times that of LoRA, and "
        f"{statistics.fmean(spent['mixture of whole LoRAs'][-1]):.2f} times with whole LoRAs, which train "
        f"{values['mixture of whole LoRAs'][-1][0]:.0f} times the values."
    )
    panels = [
        Panel("Trained values", "ratio to LoRA", values, COUNTS, "experts", log_x=True, log_y=True),
        Panel("Time of a step", "ratio to LoRA", spent, COUNTS, "experts", log_x=True, log_y=True),
    ]
    notes = [f"Median of {repeats} passes in turns; processor time of one thread, without an optimizer's step."]
    return Finding(verdict, summary, panels, notes=notes)
