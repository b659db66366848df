"""ReMix: routes that stay spread, a router that learns as a policy, and what both are worth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.claims import fitting
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.synthetic import HELD, Teacher, rows_of, scores
from lorry.claims.verdicts import compare, together, tune
from lorry.core.life.api import log_probability
from lorry.methods.parts.routing import ranked
from lorry.training.routing import policy_loss

WIDTH, ROWS = 32, 64
#: Joint training: experts and groups, active experts, rank of each, draws, steps.
EXPERTS, ACTIVE, RANK, DRAWS, STEPS = 8, 2, 4, 4, 400
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
#: The router alone: experts, active ones, groups, draws, steps, rows of a step, and noise that nothing can predict.
POOL, PAIR, GROUPS, TRIED, ALONE, FEW, NOISE = 6, 2, 4, (2, 4, 16), 300, 8, 1.0
ROUTER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Effective experts: active ones, the shares of the run they are looked at, and the rate.
SPREAD, LOOKS, LOOK_RATE = 4, (0, 0.1, 0.25, 0.5, 0.75, 1), 1e-2

#: Makes the loss of a step from the errors of all draws, ``(draws · rows,)``.
Credit = Callable[[nn.Module, Tensor, int], Tensor]


def by_policy(model: nn.Module, losses: Tensor, draws: int) -> Tensor:
    """Lorry's loss: routers learn by comparing the draws of a row."""
    return policy_loss(model, "default", losses, draws)


def without_baseline(model: nn.Module, losses: Tensor, draws: int) -> Tensor:
    """Plain REINFORCE: each draw is credited with its own loss."""
    chosen = log_probability(model, "default")
    assert chosen is not None
    return losses.mean() + (losses.detach() * chosen).mean()


def mean_alone(model: nn.Module, losses: Tensor, draws: int) -> Tensor:
    """The mean error: ReMix's routers get no gradient, other methods need no more."""
    return losses.mean()


def learn_rows(
    model: nn.Module, teacher: Teacher, draws: int, credit: Credit, seed: int, rows: int = ROWS, noise: float = 0.0
) -> fitting.Loss:
    """The loss of a step on fresh rows, each of them drawn for `draws` times; noise is added to the targets."""
    generator = Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        x, _, y = teacher.draw(rows, generator)
        y = y + noise * torch.randn(y.shape, generator=generator)
        losses = (model(x.repeat(draws, 1)) - y.repeat(draws, 1)).square().mean(1)
        return credit(model, losses, draws)

    return loss


def remix(top_k: int = ACTIVE, **more: Any) -> dict[str, Any]:
    """A ReMix of the joint trial."""
    return {"method": "remix", "experts": EXPERTS, "top_k": top_k, "rank": RANK, "draws": DRAWS, **more}


def softmax(top_k: int = ACTIVE, **more: Any) -> dict[str, Any]:
    """The best k of a softmax, weighed by it, in training and later, without further losses if not asked for."""
    options = {"training_mode": "sparse", "inference_mode": "sparse", "renormalize_topk": True, "entropy": 0.0}
    sizes = {"experts": EXPERTS, "top_k": top_k, "rank": RANK, "load_balance": 0.0}
    return {"method": "lora-mixer", **sizes, **options, **more}


def teacher(seed: int, paired: bool) -> Teacher:
    """Eight groups of inputs with an update each, all of one norm.

    Parameters
    ----------
    seed
        Of everything.
    paired
        Each update is the sum of two of eight parts of rank 4, so that two experts of equal weight fit it; or
        else one part.
    """
    g = Generator().manual_seed(seed)
    shape = (EXPERTS, WIDTH, RANK)
    parts = torch.randn(shape, generator=g) @ torch.randn(shape, generator=g).mT
    updates = parts + parts.roll(1, 0) if paired else parts
    updates = updates * (WIDTH**0.5 / updates.flatten(1).norm(dim=1))[:, None, None]

    def update(x: Tensor, groups: Tensor) -> Tensor:
        return torch.einsum("noi,ni->no", updates[groups], x)

    centres = 4 * rows_of(EXPERTS, WIDTH, generator=g)
    return Teacher(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5, centres, update)


def joint(
    how: tuple[Mapping[str, Any], int, Credit], paired: bool, steps: int, rate: float, seed: int
) -> dict[str, float]:
    """Train experts and router of one contender together."""
    method, draws, credit = how
    what = teacher(seed, paired)
    model = what.model()
    adapter = lorry.attach(model, method, seed=seed)
    fitting.train_adapter(model, adapter, learn_rows(model, what, draws, credit, seed), steps, rate)
    return {**scores(model, what, seed), "values": float(adapter.count())}


LORA = {"method": "lora", "rank": ACTIVE * RANK, "alpha": ACTIVE * RANK}
#: Method, draws of a row, and what trains it.
JOINT: dict[str, tuple[Mapping[str, Any], int, Credit]] = {
    "ReMix": (remix(), DRAWS, by_policy),
    "ReMix, weight 2/sqrt(kr)": (remix(rank_stabilized=True), DRAWS, by_policy),
    "ReMix, random router kept": (remix(router_std=0.3), DRAWS, mean_alone),
    "softmax of the best 2": (softmax(), 1, mean_alone),
    "LoRA r=8": (LORA, 1, mean_alone),
}
UNIT = "squared error, share of the bare layer's"


@claim(
    "remix",
    "joint",
    says="Routes drawn by a policy beat one LoRA of the active rank (GSM8K: four LoRAs of rank 8 64.2, one of rank 32 "
    "59.2) and softmax routing (average of three tasks: ReMix 60.8, MixLoRA 57.4).",
    source="arXiv 2603.10160, main results on Llama 3 8B and comparison with a single LoRA",
    trial="One frozen layer of width 32 and eight groups of inputs with a random update of rank 4 each. Eight experts "
    "of rank 4, two active, four draws; against a LoRA of rank 8, the same ReMix with a random router that is not "
    "trained, and the best two of a softmax, weighed by it; 400 steps of 64 fresh rows (ReMix sees each four times). "
    "Beside it updates that are sums of two shared parts, which equal weights of two experts fit exactly. Against the "
    "claim: no less error than LoRA, than the untrained router, or than the softmax.",
)
def together_with_experts(setting: Setting) -> Finding:
    """ReMix against LoRA, itself without a policy, and softmax routing."""
    steps, soft = setting.much(STEPS, 2), "softmax of the best 2"
    single = tune({n: functools.partial(joint, how, False, steps) for n, how in JOINT.items()}, RATES, setting.seeds)
    few = ("ReMix", "ReMix, weight 2/sqrt(kr)", soft)
    pairs = tune({n: functools.partial(joint, JOINT[n], True, steps) for n in few}, RATES, setting.seeds)
    own, paired = (max(few[:2], key=lambda name: t.mean(name, "validation")) for t in (single, pairs))
    others = ("LoRA r=8", "ReMix, random router kept", soft)
    verdict = together([compare(single.gain(other, own)) for other in others])
    summary = (
        f"{own} leaves {single.mean(own):.3f} of the bare layer's error, LoRA {single.mean('LoRA r=8'):.3f}, an "
        f"untrained router {single.mean(others[1]):.3f}, softmax routing {single.mean(soft):.3f}; where pairs of "
        f"experts are right, ReMix leaves {pairs.mean(paired):.3f} and softmax routing {pairs.mean(soft):.3f}."
    )
    panels = [
        Panel("One update for each group, error on fresh rows", UNIT, single.of()),
        Panel("Sums of two updates, error on fresh rows", UNIT, pairs.of()),
    ]
    sizes = ", ".join(f"{name} {single.mean(name, 'values'):.0f}" for name in JOINT)
    notes = [f"Trained values: {sizes}.", *single.notes, *(f"Sums of two: {note}" for note in pairs.notes)]
    return Finding(verdict, summary, panels, single.rates, notes)


def effective(method: Mapping[str, Any], draws: int, credit: Credit, steps: int, seed: int) -> list[float]:
    """Effective experts of a token at shares of a training run, `LOOKS`."""
    what = teacher(seed, False)
    model = what.model()
    adapter = lorry.attach(model, method, seed=seed)
    x = what.draw(HELD, Generator().manual_seed(30_000 + seed))[0]
    found: list[float] = []

    learn = learn_rows(model, what, draws, credit, seed)

    def look() -> None:
        model.eval()
        with torch.no_grad(), lorry.context(model, recording=True) as context:
            model(x)
        found.extend(float(v) for (_, _, name), v in context.records.items() if name == "effective")
        model.train()

    def looking(step: int) -> Tensor:
        if step in {round(share * steps) for share in LOOKS}:
            look()
        return learn(step)

    fitting.train_adapter(model, adapter, looking, steps, LOOK_RATE)
    look()
    return found


@claim(
    "remix",
    "effective-experts",
    says="Softmax routing collapses: MixLoRA's effective number of experts falls from 4 to 1 within 1,000 steps; ReMix "
    "keeps k by construction.",
    source="arXiv 2603.10160, effective support size",
    trial="As joint, with four of eight experts active, at a rate of 0.01 for all: the effective number (sum w)^2 / "
    "sum w^2 of each token's weights, averaged over 2,000 rows, in the course of 400 steps. ReMix against the best "
    "four of a softmax, weighed by it, without and with a balance loss of 0.1. Against the claim: ReMix is not at 4 "
    "throughout, or a softmax without balancing stays at 2.5 or above.",
)
def effective_experts(setting: Setting) -> Finding:
    """ReMix's weights stay equal, those of a softmax do not."""
    steps = setting.much(STEPS, len(LOOKS))
    runs: dict[str, tuple[Mapping[str, Any], int, Credit]] = {
        "ReMix": (remix(SPREAD), DRAWS, by_policy),
        "softmax of the best 4": (softmax(SPREAD), 1, mean_alone),
        "the same, balanced": (softmax(SPREAD, load_balance=0.1), 1, mean_alone),
    }
    course = {name: [effective(*how, steps, seed) for seed in setting.seeds] for name, how in runs.items()}
    series = {name: [list(values) for values in zip(*seeds, strict=True)] for name, seeds in course.items()}
    kept = [1e-3 - abs(value - SPREAD) for values in series["ReMix"] for value in values]
    soft, even = series["softmax of the best 4"], series["the same, balanced"]
    verdict = together([compare(kept), compare([2.5 - value for value in soft[-1]])])
    mean = [sum(values) / len(values) for values in (soft[0], soft[-1], even[-1])]
    summary = (
        f"ReMix uses {SPREAD} experts for a token throughout; the softmax starts at {mean[0]:.2f} and ends at "
        f"{mean[1]:.2f} effective experts, at {mean[2]:.2f} with a balance loss."
    )
    places = [round(share * steps) for share in LOOKS]
    return Finding(verdict, summary, [Panel("Effective experts of a token", "number", series, places, "step")])


def router_teacher(seed: int) -> tuple[Teacher, Tensor, Tensor, Tensor]:
    """A teacher that is a known pair of frozen LoRAs for each group; with A, B of the pool and the pairs."""
    g = Generator().manual_seed(seed)
    a = torch.randn(POOL * RANK, WIDTH, generator=g) / WIDTH**0.5
    b = torch.randn(WIDTH, POOL * RANK, generator=g) / RANK**0.5
    pairs = torch.combinations(torch.arange(POOL), 2)
    pairs = pairs[torch.randperm(len(pairs), generator=g)[:GROUPS]]
    gates = torch.zeros(GROUPS, POOL).scatter(1, pairs, 1.0).repeat_interleave(RANK, 1)

    def update(x: Tensor, groups: Tensor) -> Tensor:
        wanted: Tensor = 2 / (PAIR * RANK) * ((x @ a.T) * gates[groups]) @ b.T
        return wanted

    centres = 4 * rows_of(GROUPS, WIDTH, generator=g)
    return Teacher(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5, centres, update), a, b, pairs


def route(draws: int, credit: Credit, steps: int, rate: float, seed: int) -> dict[str, float]:
    """Train the router alone; ``right`` is the share of groups whose centre gets its pair."""
    what, a, b, pairs = router_teacher(seed)
    model = what.model()
    method = {"method": "remix", "experts": POOL, "top_k": PAIR, "rank": RANK, "draws": draws}
    tensors = lorry.attach(model, method, seed=seed).entries["0"].tensors()
    with torch.no_grad():
        tensors["A"].copy_(a)
        tensors["B"].copy_(b)
    loss = learn_rows(model, what, draws, credit, seed, FEW, NOISE)
    model.train()
    fitting.train([tensors["router"]], loss, steps, rate, inside=lambda: lorry.context(model))
    model.eval()
    best = ranked(what.centres @ tensors["router"].detach().T, PAIR).sort(1).values
    return {**scores(model, what, seed), "right": float((best == pairs).all(1).float().mean())}


@claim(
    "remix",
    "draws",
    says="More draws of a row train the router better (2 to 32 draws: 56.0 to 58.8 on GSM8K), and the leave-one-out "
    "baseline makes the policy's gradient usable.",
    source="arXiv 2603.10160, scaling of training compute, and method",
    trial="The router alone: six frozen random LoRAs of rank 4, two active, four groups of inputs whose target is a "
    "known pair each, with noise of variance 1 that nothing predicts. 2, 4 and 16 draws of each of 8 rows in 300 "
    "steps, with the leave-one-out baseline and without, the rate tuned for each. Against the claim: 16 draws leave no "
    "less error than 2, or the baseline no less than none, over the three numbers of draws together.",
)
def more_draws(setting: Setting) -> Finding:
    """Draws of a row, with and without a baseline, for a router by itself."""
    steps = setting.much(ALONE, 2)
    kinds = {"with baseline": by_policy, "without": without_baseline}
    runs = {f"{kind}, {m}": functools.partial(route, m, credit, steps) for kind, credit in kinds.items() for m in TRIED}
    trial = tune(runs, ROUTER_RATES, setting.seeds)
    by_kind = {
        metric: {kind: [list(trial.metrics[f"{kind}, {m}"][metric]) for m in TRIED] for kind in kinds}
        for metric in ("test", "right")
    }
    least, most = (f"with baseline, {m}" for m in (TRIED[0], TRIED[-1]))
    worse = [trial.gain(f"without, {m}", f"with baseline, {m}") for m in TRIED]
    verdict = together([compare(trial.gain(least, most)), compare([sum(gains) for gains in zip(*worse, strict=True)])])
    said = {
        kind: (
            ", ".join(f"{trial.mean(f'{kind}, {m}', 'right'):.0%}" for m in TRIED),
            ", ".join(f"{trial.mean(f'{kind}, {m}'):.3f}" for m in TRIED),
        )
        for kind in kinds
    }
    right, left = said["with baseline"]
    summary = (
        f"With 2, 4 and 16 draws {right} of the groups get their pair and {left} of the error is left; without a "
        f"baseline {said['without'][0]} and {said['without'][1]}."
    )
    panels = [
        Panel("Error on fresh rows", UNIT, by_kind["test"], TRIED, "draws", log_x=True),
        Panel("Groups with their pair", "share", by_kind["right"], TRIED, "draws", log_x=True),
    ]
    return Finding(verdict, summary, panels, trial.rates, trial.notes)
