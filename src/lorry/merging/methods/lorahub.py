"""LoraHub: search the weights without gradients so that a loss on a few examples becomes small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch

from lorry.core.errors import OptionError
from lorry.core.method.start import mix_seed
from lorry.merging.factors import Factors, stack
from lorry.merging.inputs import Pool, SiteInput
from lorry.merging.methods.linear import combined
from lorry.merging.registry import Knob, merge_method

Vector = list[float]
Optimizer = Literal["evolution", "random", "nelder-mead", "powell", "differential-evolution"]


def evolution(score: Callable[[Vector], float], start: Vector, bound: float, evaluations: int, seed: int) -> None:
    """Run a (1+1) evolution strategy: one Gaussian step at a time, wider after a success, narrower after a failure."""
    generator = torch.Generator().manual_seed(seed)
    here, best, step = torch.tensor(start, dtype=torch.float64), score(start), bound / 3
    for _ in range(evaluations - 1):
        move = torch.randn(len(start), generator=generator, dtype=torch.float64) * step
        trial = (here + move).clamp(-bound, bound)
        value = score(trial.tolist())
        if value < best:
            here, best, step = trial, value, min(step * 1.5, bound)
        else:
            step *= 0.9


def random_search(score: Callable[[Vector], float], start: Vector, bound: float, evaluations: int, seed: int) -> None:
    """Try the start, then uniform draws."""
    generator = torch.Generator().manual_seed(seed)
    score(start)
    for _ in range(evaluations - 1):
        score(((torch.rand(len(start), generator=generator, dtype=torch.float64) * 2 - 1) * bound).tolist())


class _Enough(Exception):
    """The budget of evaluations is used up."""


def _search(
    score: Callable[[Vector], float], start: Vector, bound: float, evaluations: int, seed: int, optimizer: Optimizer
) -> tuple[Vector, float, list[float]]:
    """Return the best weights, their score and the scores in order."""
    best: tuple[Vector, float] = (start, float("inf"))
    history: list[float] = []

    def counted(vector: Vector) -> float:
        nonlocal best
        if len(history) >= evaluations:
            raise _Enough
        clipped = [min(max(float(v), -bound), bound) for v in vector]
        value = score(clipped)
        history.append(value)
        if value < best[1]:
            best = (clipped, value)
        return value

    try:
        if optimizer == "evolution":
            evolution(counted, start, bound, evaluations, seed)
        elif optimizer == "random":
            random_search(counted, start, bound, evaluations, seed)
        else:
            from scipy import optimize

            limits = [(-bound, bound)] * len(start)
            if optimizer == "differential-evolution":
                optimize.differential_evolution(counted, limits, x0=start, rng=seed, maxiter=evaluations, polish=False)
            else:
                optimize.minimize(counted, start, method=optimizer, bounds=limits, options={"maxfev": evaluations})
    except _Enough:
        pass
    return best[0], best[1], history


@merge_method(
    "lorahub",
    space="factor",
    scope="adapter",
    source="arXiv 2307.13269",
    plain={"evaluations": 0, "form": "square"},
    linear=False,
    needs=("objective",),
    note="given weights serve as start only (start=weights) or not at all (start=zero)",
)
def lorahub(
    pool: Pool,
    *,
    evaluations: Annotated[int, Knob("Most calls of the objective; 0 takes the given weights.", at_least=0)] = 40,
    optimizer: Annotated[Optimizer, Knob("How to search; the last three are SciPy's.")] = "evolution",
    bound: Annotated[float, Knob("Weights are searched between minus and plus this.", above=0)] = 1.5,
    penalty: Annotated[float, Knob("Weight of the mean size of the weights in the loss.", at_least=0)] = 0.05,
    start: Annotated[Literal["zero", "weights"], Knob("Begin at 0, as published, or at the given weights.")] = "zero",
    form: Annotated[
        Literal["square", "delta"], Knob("Weights on both factors (published), or on the exact sum of updates.")
    ] = "square",
    seed: Annotated[int, Knob("Seed of the search.", at_least=0)] = 0,
) -> Iterator[tuple[str, Factors]]:
    """Search one weight for each adapter, minimising the objective plus ``penalty · mean |w|``."""
    sites = list(pool.sites())
    given = [next((s.weights[i] for s in sites if s.factors[i] is not None), 0.0) for i in range(len(pool.names))]

    def candidate(vector: Vector) -> dict[str, Factors]:
        weights = dict(zip(pool.names, vector, strict=True))
        return {s.path: _merged(s, weights, form) for s in sites}

    found = given
    if evaluations:
        objective = pool.objective
        if objective is None:
            raise OptionError("The merge method 'lorahub' needs an objective to search by.")

        def score(vector: Vector) -> float:
            return objective(candidate(vector)) + penalty * sum(abs(v) for v in vector) / len(vector)

        begin = [0.0] * len(given) if start == "zero" else given
        found, loss, history = _search(score, begin, bound, evaluations, mix_seed(seed, "lorahub"), optimizer)
        pool.facts.update(weights=dict(zip(pool.names, found, strict=True)), loss=loss, history=history)
    yield from candidate(found).items()


def _merged(site: SiteInput, weights: dict[str, float], form: str) -> Factors:
    rows = [(f, weights[n]) for n, f, _ in site.present()]
    if form == "delta":
        return stack([f for f, _ in rows], [w for _, w in rows])
    return combined([(f, w, 0.0) for f, w in rows], "square")
